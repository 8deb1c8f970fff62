"""What a step of training takes beside other programs: python3 -m bench.busy [--json FILE]

The step of `quick` (pre-training, 16 scenes) alone, and beside two programs that keep a core busy each: as OpenMP's
threads wait for one another by default, as train.py lets them, and with one thread, which waits for none. Takes a
minute; the machine must be idle otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

#: Environments of the processes that measure: OpenMP reads them once, when it is loaded.
WAITING = {
    "OpenMP's default": {"GOMP_SPINCOUNT": "300000"},
    "train.py": {},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
PROGRAMS = 2
SECONDS = 6.0  # of each measurement, after a warm-up


def measure() -> None:
    """In a process of its own: print seconds of a step alone and beside other programs, and how many threads."""
    import training  # noqa: F401, before torch, as where it is the program
    import torch  # isort: skip

    from training.building import build_model, build_optimizer
    from training.config import Config
    from training.memory import keep_freed_memory
    from training.random_numbers import draw_noise
    from training.resolve import resolve
    from training.scenes import open_scenes
    from training.step import Batch, Step

    keep_freed_memory()
    config = resolve(Config(preset="quick", device="cpu", num_scenes=64, eval_scenes=1))
    source = open_scenes(config)
    model = build_model(config, source.size)
    step = Step(model, build_optimizer(model, config), "pre-training", config)
    pixels = source.images(torch.arange(config.batch_size))
    batch = Batch(pixels, draw_noise(config, config.batch_size, model.noise_shape, 0), None)

    def seconds_per_step() -> float:
        step(batch, 1e-3)
        begun, steps = time.perf_counter(), 0
        while time.perf_counter() < begun + SECONDS:
            step(batch, 1e-3)
            steps += 1
        return (time.perf_counter() - begun) / steps

    seconds_per_step()
    alone = seconds_per_step()
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(PROGRAMS)]
    try:
        time.sleep(1)
        beside = seconds_per_step()
    finally:
        for other in others:
            other.kill()
            other.wait()
    print(json.dumps({"alone": alone, "beside": beside, "threads": torch.get_num_threads()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to leave the figures")
    file = parser.parse_args().json
    rows = {}
    for name, environment in WAITING.items():
        code = "from bench.busy import measure; measure()"
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, stdout=subprocess.PIPE)
        if done.returncode:
            sys.exit(done.returncode)
        row = rows[name] = json.loads(done.stdout)
        print(f"{name:16} {row['threads']} threads: {1e3 * row['alone']:6.1f} ms alone, {1e3 * row['beside']:6.1f} ms "
              f"beside {PROGRAMS} busy programs, {row['beside'] / row['alone']:.1f} times", flush=True)  # fmt: skip
    if file is not None:
        from training.files import write
        from training.versions import versions

        about = {"programs": PROGRAMS, "cores": os.cpu_count(), "versions": versions()}
        write(file, json.dumps({"seconds": rows, **about}, indent=2) + "\n")


if __name__ == "__main__":
    main()
