"""Train a slot model, fine-tune its masks with the IIO loss, score it on unseen scenes.

    python train.py --dataset tetrominoes --fine-tune iio            # the preset fits the machine
    python train.py --model iodine --dataset multi-dsprites          # another model, other scenes
    python train.py --task set-prediction --dataset clevr-like       # the objects' properties instead of their masks
    python train.py --resume runs/tetrominoes-quick-iio-seed0        # continue an interrupted run
    python train.py --eval-only runs/.../after.safetensors --data tetrominoes_train.tfrecords
    python train.py --from-pretrained --fine-tune iio                # fine-tune the weights that come with this
    python train.py --table1 --seeds 3                               # the paper's table 1, mean and std
    torchrun --nproc-per-node 4 train.py --fine-tune iio             # on four processes, a GPU each

Each step below is a file of `training/`, the models are in `models/`, the scenes in `data/`.
"""

from __future__ import annotations

import training  # noqa: F401, before torch is loaded: it tells OpenMP how threads are to wait

# isort: split
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from data import Scenes
from training.config import Config, from_command_line, several
from training.console import open_standard_streams
from training.endings import explained_endings
from training.memory import keep_freed_memory
from training.pictures import draw
from training.processes import any_rank, meet_other_ranks
from training.resolve import resolve
from training.run import Run
from training.run_folder import claim_again, is_finished, open_run, reopen_run
from training.scenes import open_scenes
from training.scoring import score_weights
from training.several_runs import run_several
from training.signals import deferred_signals
from training.weights import check_weights


def main() -> None:
    open_standard_streams()
    given = from_command_line()
    keep_freed_memory()
    with explained_endings() as place, ExitStack() as claims:
        # The options: those of the run to resume, or those given and the preset's.
        if given.resume is not None:
            config, place.folder = reopen_run(given)
        else:
            config = resolve(given)
        meet_other_ranks(config)
        if config.eval_only is not None:
            score_weights(config)
            return

        # The data and the run's folder: all that can be refused is refused before there is a new one.
        check_weights(config)
        if place.folder is not None:
            claim_again(place.folder, claims)
        source = open_scenes(config)
        if place.folder is None:
            place.folder = open_run(config, claims)

        with deferred_signals() as signalled:
            if any_rank(is_finished(place.folder)):  # but for its picture
                draw(place.folder, config, source)
            elif several(config):
                run_several(train, config, place.folder, claims, source, signalled)
            else:
                train(config, place.folder, source, signalled)


def train(config: Config, folder: Path, source: Scenes, signalled: Callable[[], int | None]) -> None:
    """Train one run, or what is left of it; leave scores, weights and picture in its folder."""
    run = Run(config, folder, source, signalled)  # the model, new or as the last checkpoint has it
    if run.awaits("pre-training"):
        run.train_phase("pre-training")
        run.score_phase("pre-training")
    if run.awaits("fine-tuning"):
        run.train_phase("fine-tuning")
        run.score_phase("fine-tuning")
    run.save_summary()
    draw(folder, run.config, source)
    run.print_scores()


if __name__ == "__main__":
    main()
