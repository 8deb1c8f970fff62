"""How a training ends that does not reach its end: a line that says why and how to go on, and an exit code."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from data import DataError
from training.config import UsageError
from training.console import say
from training.processes import num_ranks, part_from_other_ranks, rank
from training.run import Diverged
from training.run_folder import resume_command, to_continue
from training.signals import Interrupted


@dataclass
class Place:
    """Where a training is, as far as it knows.

    Attributes:
        folder: of the run; None before there is one.
    """

    folder: Path | None = None


@contextmanager
def explained_endings() -> Iterator[Place]:
    """Turn what ends a training into a line on stderr and an exit code, and leave the other processes in order."""
    place = Place()
    try:
        yield place
    except Interrupted as stop:
        part_from_other_ranks(stop)
        say(f"\nInterrupted; all is saved. To continue: {resume_command(place.folder)}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt as error:
        leave(f"\ntrain.py: interrupted{to_continue(place.folder)}", 130, error)
    except Diverged as error:
        leave(f"train.py: {error}", 1, error)
    except RuntimeError as error:
        if num_ranks() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            part_from_other_ranks(error)
            raise
        reason, going_on = str(error).splitlines()[0], "" if place.folder is None else (
            f" The last checkpoint is whole: continue with {resume_command(place.folder)}, on as many processes as you "
            f"like"
        )  # fmt: skip
        print(f"train.py: process {rank()} of {num_ranks()} lost another one ({reason}).{going_on}", file=sys.stderr)
        part_from_other_ranks(error)
        sys.exit(1)
    except (UsageError, DataError) as error:
        leave(f"train.py: {error}", 2, error)
    except OSError as error:  # the disk is full, for one
        leave(f"train.py: {error}{to_continue(place.folder)}", 2, error)
    else:
        part_from_other_ranks()


def leave(words: str, exit_code: int, error: BaseException) -> None:
    """Say the words and exit."""
    say(words, file=sys.stderr)
    if rank() > 0:
        time.sleep(3)  # torchrun kills the others as soon as one has left: let the first speak
    part_from_other_ranks(error)
    sys.exit(exit_code)
