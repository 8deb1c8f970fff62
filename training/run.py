"""A run: its phases, from the beginning or the last checkpoint, to the scores."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import Scenes
from models.optimizer import Optimizer
from training.building import build_model, build_optimizer
from training.checkpoints import load_checkpoint, save_checkpoint
from training.config import Config, to_json
from training.console import say
from training.cores import Cores
from training.evaluation import SCORES, evaluate
from training.files import write
from training.metrics_log import Metrics
from training.plan import greeting
from training.processes import any_rank, mean_over_ranks, num_ranks, rank, same_on_all_ranks, share
from training.random_numbers import draw_noise
from training.run_folder import PICTURES
from training.scenes import Order, objects_of
from training.schedule import learning_rate, phase_steps
from training.signals import Interrupted, stop_if_asked
from training.step import Batch, Step
from training.tables import ERRORS, PERCENT, row_name, table
from training.versions import versions
from training.weights import KEPT, load_weights, restore, save_weights


class Diverged(Exception):
    """The loss is no longer a number."""


class Run:
    """A run of all phases in its folder, from the last checkpoint if the folder holds one."""

    def __init__(self, config: Config, folder: Path, source: Scenes, signalled: Callable[[], int | None]) -> None:
        self.begun, self.signalled = time.monotonic(), signalled
        if config.from_ is not None:
            config, weights = load_weights(config.from_, config)
        self.config, self.folder, self.source, self.phases = config, folder, source, phase_steps(config)
        self.model, self.order = build_model(config, source.size), Order(config)
        if config.from_ is not None:
            restore(self.model, weights, config.from_)
        self.unseen = torch.arange(config.num_scenes, config.num_scenes + config.eval_scenes)
        state: dict[str, Any] = {"phase": 0, "step": 0, "seconds": 0.0, "results": "{}", "optimizer": None}
        if rank() == 0 and (folder / "checkpoint.pt").exists():
            state = load_checkpoint(folder / "checkpoint.pt", config)
            restore(self.model, state["model"], folder / "checkpoint.pt")
        state = same_on_all_ranks({name: value for name, value in state.items() if name != "model"})
        self.phase, self.step, self.optimizer_state = state["phase"], state["step"], state["optimizer"]
        self.seconds_before, self.results = state["seconds"], json.loads(state["results"])
        done = sum(list(self.phases.values())[: self.phase]) + self.step
        self.metrics = Metrics(folder, done) if rank() == 0 else None
        say(greeting(config, self.phases, done, self.model, source))
        # What is trained: with several processes, the model with its gradients averaged over them.
        self.trained: nn.Module = self.model
        if num_ranks() > 1:
            devices = [torch.cuda.current_device()] if torch.device(config.device).type == "cuda" else None
            # An implicit gradient leaves the initial slots out.
            unused = config.gradient == "implicit"
            self.trained = DistributedDataParallel(self.model, devices, find_unused_parameters=unused)

    def steps_before(self, phase: str) -> int:
        """How many steps the phases before this one take."""
        return sum(self.phases[earlier] for earlier in list(self.phases)[: list(self.phases).index(phase)])

    @property
    def seconds(self) -> float:
        """What the run has taken, without the time in which it was interrupted."""
        return self.seconds_before + time.monotonic() - self.begun

    def awaits(self, phase: str) -> bool:
        """Whether the run has this phase, and has not finished it."""
        return phase in list(self.phases)[self.phase :]

    def train_phase(self, phase: str) -> None:
        """Train a phase, the first that the run awaits, from `self.step` to its end."""
        if self.phase > 0 and self.step == 0:
            stop_if_asked(self.signalled)
        config, steps = self.config, self.phases[phase]
        first = self.steps_before(phase)
        optimizer = build_optimizer(self.model, config)
        if self.optimizer_state is not None:
            optimizer.load_state_dict(self.optimizer_state)
        step_once = Step(self.trained, optimizer, phase, config, self.step)
        saved, good, latest, cores = time.monotonic(), self.step, {}, Cores()
        quiet = rank() > 0 or not sys.stderr.isatty()
        with tqdm(total=steps, initial=self.step, desc=phase, unit="step", disable=quiet) as bar:
            for step in range(self.step, steps):
                rate = learning_rate(step, phase, config)
                indices = self.order(first + step)
                pixels = self.source.images(indices, device=config.device)
                noise = share(draw_noise(config, config.batch_size, self.model.noise_shape, self.phase, step))
                step_once(Batch(pixels, noise, objects_of(config, self.source, indices)), rate)
                bar.update()

                last = step + 1 == steps
                logs = (step + 1) % config.log_every == 0 or last
                interrupt = self.signalled()
                if num_ranks() > 1:  # all stop together, where they meet anyway
                    interrupt = (any_rank(interrupt or 0) or None) if logs else None
                saves = time.monotonic() - saved > config.checkpoint_every or last or interrupt is not None
                if logs or (saves and rank() == 0):
                    bad = int(step_once.bad)
                    bad = any_rank(bad) if logs else bad
                    if bad >= 0:
                        raise self.diverged(phase, bad + 1, good)
                if logs:
                    with bar.external_write_mode():
                        cores.look(self.folder)
                    values = {name: mean_over_ranks(value).item() for name, value in step_once.values.items()}
                    self.log(first + step + 1, phase, lr=rate, **values)
                    latest |= {name: value for name, value in values.items() if name != "gradient_norm"}
                    bar.set_postfix({name: f"{value:.4g}" for name, value in latest.items()})
                if phase == "pre-training" and step + 1 in config.score_steps and not last:
                    self.score(f"step-{step + 1}", phase, first + step + 1)
                if (step + 1) % config.eval_every == 0 and not last:
                    scored = evaluate(self.model, self.source, self.unseen[:128], 1, config)
                    self.log(first + step + 1, phase, **{f"eval_{n}": scored[n] for n in SCORES[config.task]})
                    first_two = [n for n in PERCENT if n in scored][:2]
                    latest |= {name: scored[name] for name in first_two}
                    if rank() == 0:
                        words = [f"{ERRORS[n]} {scored[n]:.4f}" for n in ERRORS if n in scored]
                        words += [f"{PERCENT[n]} {100 * scored[n]:.1f}" for n in first_two]
                        with bar.external_write_mode():
                            say(f"{phase} {step + 1:,}/{steps:,}  {self.seconds / 60:.1f} min  {'  '.join(words)}")
                if saves:
                    self.save(self.phase, step + 1, optimizer)
                    saved, good = time.monotonic(), step + 1
                if interrupt is not None:
                    raise Interrupted(interrupt)

    def score_phase(self, phase: str) -> None:
        """Score the model at the end of a phase, and go on to the next."""
        self.score(KEPT[phase], phase, self.steps_before(phase) + self.phases[phase], self.phase + 1)
        self.phase, self.step, self.optimizer_state = self.phase + 1, 0, None

    def score(self, key: str, phase: str, step: int, next_phase: int | None = None) -> None:
        """Score the model on all scoring scenes; keep scores and weights under `key`. `next_phase` begins then."""
        scored = self.results[key] = evaluate(self.model, self.source, self.unseen, self.config.eval_draws, self.config)
        if rank() == 0:
            save_weights(self.folder / f"{key}.safetensors", self.model, self.config, scored)
        if next_phase is not None:
            self.save(next_phase, 0, None)
        self.log(step, phase, **{f"{key}_{n}": value for n, value in scored.items() if n != "by_objects"})
        when = f"{phase} at step {step:,}" if step else "at the start"
        say(f"{when} after {self.seconds / 60:.1f} min\n{table({row_name(key, self.config): scored})}")

    def log(self, step: int, phase: str, **values: Any) -> None:
        if self.metrics is not None:
            self.metrics.log(step, seconds=round(self.seconds, 1), phase=phase, **values)

    def save(self, phase: int, step: int, optimizer: Optimizer | None) -> None:
        if rank() == 0:
            save_checkpoint(self.folder, {
                "phase": phase, "step": step, "seconds": self.seconds, "results": json.dumps(self.results),
                "optimizer": None if optimizer is None else optimizer.state_dict(), "model": self.model.state_dict(),
            })  # fmt: skip

    def save_summary(self) -> None:
        """Leave the scores: the run is finished."""
        if rank() == 0:
            summary = {**self.results, "config": to_json(self.config), "versions": versions(),
                       "seconds": round(self.seconds, 1)}  # fmt: skip
            write(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")

    def print_scores(self) -> None:
        config = self.config
        rows = {row_name(key, config): scored for key, scored in self.results.items()}
        say(f"\nScores on {len(self.unseen):,} unseen scenes, mean ± std over {config.eval_draws} draws of the "
            f"noise, after {self.seconds / 60:.1f} min:\n{table(rows)}\n\n"
            f"Scores, weights and picture: {self.folder}/summary.json, *.safetensors, {PICTURES[config.task]}"
        )  # fmt: skip

    def diverged(self, phase: str, step: int, good: int) -> Diverged:
        """What ends a run whose loss is no number at a step; its last checkpoint, if it has one, is of step `good`."""
        checkpoint, again = self.folder / "checkpoint.pt", "There is no checkpoint yet: start anew"
        if checkpoint.exists():
            again = (f"The last good checkpoint is {checkpoint}, of step {good}; continued from there the same would "
                     f"happen again: start anew in another --out")  # fmt: skip
        rate = "--lr" if phase == "pre-training" else "--fine-tune-lr"
        clip = "" if 0 < self.config.clip <= 1 else ", or with --clip 1"
        return Diverged(
            f"the loss is no longer a number at step {step} of {phase}. {again} with a smaller {rate}{clip}"
        )
