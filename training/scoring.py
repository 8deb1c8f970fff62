"""Scoring given weights, without training."""

from __future__ import annotations

import json
import tempfile

import torch

from training.building import build_model, recipe_of
from training.config import Config, UsageError, to_json
from training.console import say
from training.evaluation import evaluate
from training.files import write
from training.processes import rank
from training.scenes import open_scenes
from training.tables import table
from training.versions import versions
from training.weights import load_weights, pretrained, read_weights, restore, scenes_seen


def score_weights(config: Config) -> None:
    """Score given weights on the scoring scenes, or, of a file they were not trained on and that is too short to have
    any, on its first.

    With --out the scores are left there, too, as scores.json.
    """
    if config.out is not None and rank() == 0:
        try:
            config.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=config.out).close()
        except OSError as error:
            raise UsageError(f"--out: cannot write to {config.out}: {error.strerror}") from None
    results = {}
    for path in pretrained(config) if str(config.eval_only) == "pretrained" else [config.eval_only]:
        config, tensors = load_weights(path, config)
        source = open_scenes(config)
        first = config.num_scenes
        if len(source) < first + config.eval_scenes:
            if scenes_seen(read_weights(path)[1], config):
                raise UsageError(
                    f"--eval-scenes {config.eval_scenes}: {config.data} holds {len(source):,} scenes, and "
                    f"{path.name} was trained on the first {first:,}; expected at most {len(source) - first}"
                )
            first = 0
        indices = torch.arange(first, min(first + config.eval_scenes, len(source)))
        model = build_model(config, source.size)
        restore(model, tensors, path)
        name = [path.name, recipe_of(config).title, f"K {config.num_slots}"]
        name += [] if config.iterations is None else [f"T {config.iterations}"]
        results[", ".join(name)] = evaluate(model, source, indices, config.eval_draws, config)
    try:
        if config.out is not None and rank() == 0:
            kept = {"rows": results, "config": to_json(config), "versions": versions()}
            write(config.out / "scores.json", json.dumps(kept, indent=2) + "\n")
    finally:
        say(f"Scores on {len(indices):,} scenes from number {first:,} on, mean ± std over {config.eval_draws} draws of "
            f"the noise:\n{table(results)}")  # fmt: skip
