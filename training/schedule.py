"""The phases of a run: their steps and learning rates."""

from __future__ import annotations

import math

from training.config import Config


def phase_steps(config: Config) -> dict[str, int]:
    """The phases of a run in order, and how many steps each takes."""

    def steps(steps: int | None, epochs: float | None) -> int:
        return steps if steps is not None else math.ceil(epochs * config.num_scenes / config.batch_size)

    phases = {"pre-training": steps(config.steps, config.epochs)}
    if config.fine_tune != "none":
        phases["fine-tuning"] = steps(config.fine_tune_steps, config.fine_tune_epochs)
    return phases


def warm_up(phase: str, config: Config) -> tuple[float, int]:
    """The peak of a phase's learning rate, and the steps in which it gets there."""
    if phase == "fine-tuning":
        return config.fine_tune_lr, config.fine_tune_warmup_steps
    return config.lr, config.warmup_steps


def learning_rate(step: int, phase: str, config: Config) -> float:
    """Linear warm-up times exponential decay, both from the phase's beginning."""
    peak, steps = warm_up(phase, config)
    return peak * min(1.0, (step + 1) / max(1, steps)) * 0.5 ** (step / config.half_life)
