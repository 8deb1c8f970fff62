"""Steps and learning rates of the phases."""

import contextlib
import dataclasses
import itertools
import typing
from pathlib import Path

import pytest

from data import DATASETS
from models import MODELS, Task
from training.config import Config, UsageError
from training.resolve import refuse_impossible, resolve
from training.schedule import learning_rate, phase_steps, warm_up


def test_the_learning_rate_warms_up_and_halves():
    config = Config(lr=1.0, warmup_steps=100, fine_tune_lr=0.1, fine_tune_warmup_steps=10, half_life=100_000)
    assert learning_rate(49, "pre-training", config) == pytest.approx(0.5, rel=1e-3)
    assert learning_rate(99_999, "pre-training", config) == pytest.approx(0.5, rel=1e-3)
    assert learning_rate(199_999, "pre-training", config) == pytest.approx(0.25, rel=1e-3)
    assert learning_rate(4, "fine-tuning", config) == pytest.approx(0.05, rel=1e-3)
    assert learning_rate(99_999, "fine-tuning", config) == pytest.approx(0.05, rel=1e-3)


def recipes():
    """What can be trained at each preset, as options: every task, model and data set that go together."""
    for task, model, dataset, preset in itertools.product(
        typing.get_args(Task), MODELS, DATASETS, ("paper", "quick", "smoke")
    ):
        if DATASETS[dataset].num_entities == 1:
            continue  # an empty room is for scoring alone
        fine_tune = "iio" if task == "discovery" else "none"
        config = Config(task=task, model=model, dataset=dataset, preset=preset, fine_tune=fine_tune, device="cpu")
        if DATASETS[dataset].file is not None:
            config = dataclasses.replace(config, data=Path("scenes.tfrecords"))
        with contextlib.suppress(UsageError):
            refuse_impossible(config)
            yield pytest.param(config, id=f"{model} {task} {dataset} {preset}")


@pytest.mark.parametrize("config", list(recipes()))
def test_every_phase_reaches_its_learning_rate(config):
    """A warm-up that outlasts a phase, or decay before its end, would keep it from the rate that is stated."""
    config = resolve(config)
    for phase, steps in phase_steps(config).items():
        peak, warming = warm_up(phase, config)
        reached = learning_rate(max(1, min(steps, warming)) - 1, phase, config)
        assert reached >= 0.85 * peak > 0, phase


def test_a_warm_up_that_outlasts_its_phase_is_told(capsys):
    resolve(Config(preset="quick", device="cpu", steps=50, warmup_steps=100, lr=1e-3))
    assert "climbs to 0.00049, not to the 0.001 asked for" in capsys.readouterr().out
