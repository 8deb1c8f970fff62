"""Files of weights, and the architecture, scores and scenes that they tell."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from data import DATASETS
from models import MODELS
from training.config import Config, UsageError
from training.files import write
from training.networks import NETWORK_OF, NETWORKS

#: The sizes that a model is built from.
SIZES = ("channels", "kernel_size", "input_size", "downsample", "slot_size", "num_slots", "iterations")

#: All that it is built from: weights carry it with them.
ARCHITECTURE = ("task", "model", "ablation", "network_of", "pixel_sigma", "background_sigma", "iodine_source", *SIZES)

#: What else bears on the scores of given weights.
SCORING = ("eval_only", "dataset", "data", "preset", "num_scenes", "eval_scenes", "eval_draws", "coordinate_scale",
           "seed", "device", "precision", "out")  # fmt: skip


def save_weights(path: Path, model: nn.Module, config: Config, results: dict) -> None:
    """Weights as safetensors, with what is needed to build the model again."""
    about = {"architecture": {name: getattr(config, name) for name in ARCHITECTURE}, "scores": results}
    about |= {"num_scenes": config.num_scenes, "dataset": config.dataset}
    about |= {"data": data_name(config)}
    # All under one key: safetensors writes several in an order of its own, and equal runs shall leave equal files.
    metadata = {"iio_kernels": json.dumps(about)}
    write(path, to_safetensors({k: v.contiguous() for k, v in model.state_dict().items()}, metadata))


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights, and what they carry: their architecture, their scores, and which scenes they were trained on."""
    content = path.read_bytes()  # safe_open takes no name that is no UTF-8
    tensors = from_safetensors(content)
    about = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    if "iio_kernels" in about:
        return tensors, json.loads(about["iio_kernels"])
    # Earlier ones kept each under a key of its own.
    return tensors, about | {key: json.loads(about[key]) for key in ("architecture", "scores") if key in about}


def completed(shape: dict[str, Any], dataset: str) -> dict[str, Any]:
    """The architecture that weights or a run tell, with what those of older versions leave out: `dataset` is theirs."""
    shape = {"task": "discovery", "model": "slot-attention", "ablation": "none", "pixel_sigma": None,
             "background_sigma": None, "iodine_source": None, "network_of": None,
             "slot_size": 64, "downsample": None} | shape  # fmt: skip
    recipe = MODELS[shape["model"]][shape["task"]]
    unsaid = dict(recipe.unsaid)
    if "network_of" in recipe.options:
        unsaid["network_of"] = NETWORK_OF.get(dataset, NETWORKS[0])
    return shape | {name: value for name, value in unsaid.items() if shape.get(name) is None}


def load_weights(path: Path, config: Config) -> tuple[Config, dict[str, Tensor]]:
    """Weights, and the configuration with their architecture in it. To score them, K and T may be other ones."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder: give the weights in it, such as {path / 'before.safetensors'}")
    try:
        tensors, about = read_weights(path)
        shape = about["architecture"]
        dataset = about.get("dataset", config.dataset)
        shape = completed(shape, dataset)
        if config.eval_only is not None:
            shape |= {n: getattr(config, n) for n in ("num_slots", "iterations") if getattr(config, n) is not None}
        sizes = {name: None if shape[name] is None else int(shape[name]) for name in SIZES}
        config = dataclasses.replace(config, **{n: shape[n] for n in ARCHITECTURE if n not in SIZES}, **sizes)
        seen = scenes_seen(about, config)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{path} holds no weights of a run ({error})") from None
    if dataset in DATASETS and DATASETS[dataset].size != DATASETS[config.dataset].size:
        raise UsageError(f"--dataset {config.dataset}: {path.name} was trained on {dataset}, whose images have another "
                         f"size; add --dataset {dataset}")  # fmt: skip
    if config.num_scenes is None and config.eval_only is not None and seen:
        config = dataclasses.replace(config, num_scenes=seen)
    if config.num_scenes is not None and config.num_scenes < seen:
        raise UsageError(f"--num-scenes {config.num_scenes}: {path.name} was trained on the first {seen:,} scenes, so "
                         f"those that follow are not unseen; expected at least {seen}")  # fmt: skip
    return config, tensors


def check_weights(config: Config) -> None:
    """Refuse weights to start from that cannot be."""
    if config.from_ is not None:
        load_weights(config.from_, config)


def scenes_seen(about: dict[str, Any], config: Config) -> int:
    """How many of the scenes asked for, the first, weights were trained on, by what they carry: 0 if on others."""
    source = config.dataset, data_name(config)
    trained_on = about.get("dataset", config.dataset), about.get("data", "")
    return int(about.get("num_scenes", 0)) if trained_on == source else 0


def data_name(config: Config) -> str:
    """The name of the file or folder of scenes, of `--data .` the folder's own; nothing where they are generated."""
    return "" if config.data is None else os.path.basename(os.path.abspath(config.data))


#: The weights that come with this, before and after fine-tuning.
PRETRAINED = Path(__file__).parents[1] / "models" / "pretrained"


def pretrained(config: Config) -> list[Path]:
    """The weights that come with this for the data set, before and after fine-tuning."""
    paths = [PRETRAINED / f"{config.dataset}-{when}.safetensors" for when in KEPT.values()]
    if not all(path.exists() for path in paths):
        names = sorted({path.name.rpartition("-")[0] for path in PRETRAINED.glob("*.safetensors")})
        raise UsageError(f"--dataset {config.dataset}: weights come with this for {', '.join(names)} alone")
    return paths


def restore(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError:
        expected = model.state_dict()
        wrong = sorted(
            name for name in tensors.keys() | expected.keys()
            if name not in tensors or name not in expected or tensors[name].shape != expected[name].shape
        )  # fmt: skip
        raise UsageError(
            f"{path} holds another network's weights, perhaps an earlier version's: {len(wrong)} of "
            f"{len(expected)} tensors do not fit, such as {wrong[0]}"
        ) from None


#: By phase, the name under which a run keeps scores and weights of its end.
KEPT = {"pre-training": "before", "fine-tuning": "after"}
