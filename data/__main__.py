"""A contact sheet: some scenes of a data set and, below each, its true segmentation.

python -m data clevr-like sheet.png
python -m data multi-dsprites sheet.png --file multi_dsprites_colored_on_grayscale.tfrecords
"""

import math
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image

from data import DATASETS, generator, load
from data.scenes import Scenes

COLORS = np.array(
    [(0, 0, 0), (230, 60, 60), (60, 180, 75), (67, 99, 216), (255, 225, 25), (245, 130, 49), (145, 30, 180),
     (66, 212, 244), (240, 50, 230), (191, 239, 69), (250, 190, 212)], np.uint8,
)  # fmt: skip
GAP = 4  # pixels between pictures
SIDE = 128  # pixels of a picture, about


def sheet(source: Scenes, indices: torch.Tensor, columns: int) -> np.ndarray:
    """Lay out the scenes `indices` row by row, each over its labels in colors: uint8 (height, width, 3)."""
    image, labels = source.batch(indices, "cpu")
    height, width = source.size
    line = np.full((len(image), 1, width, 3), 255, np.uint8)
    pair = np.concatenate([image.permute(0, 2, 3, 1).numpy(), line, COLORS[labels.numpy() % len(COLORS)]], 1)
    pair = pair.repeat(zoom := max(1, round(SIDE / height)), 1).repeat(zoom, 2)
    rows = math.ceil(len(pair) / columns)
    cells = np.full((rows * columns, (2 * height + 1) * zoom + GAP, width * zoom + GAP, 3), 255, np.uint8)
    cells[: len(pair), :-GAP, :-GAP] = pair
    cells = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)
    return cells.reshape(rows * cells.shape[1], -1, 3)


def main(
    dataset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")],
    picture: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SHEET")],
    /,
    file: Path | None = None,
    scenes: int = 24,
    columns: int = 8,
    seed: int = 0,
) -> None:
    """Write a contact sheet.

    Args:
        dataset: the data set's name.
        picture: the PNG file to write.
        file: a file of the data set, or CLEVR's folder, to read instead of generating scenes.
        scenes: how many scenes, the first ones.
        columns: how many scenes in a row.
        seed: of the generator.
    """
    if scenes < 1 or columns < 1:
        raise ValueError(f"scenes and columns: expected at least 1, got {scenes} and {columns}")
    if file is None and dataset in DATASETS and DATASETS[dataset].generator is None:
        raise ValueError(f"{dataset} cannot be generated: give a file of it as --file")
    if file is None:
        source = generator(dataset, scenes, seed)
    else:
        source = load(file, dataset=dataset)
    drawn = sheet(source, torch.arange(min(scenes, len(source))), columns)
    picture.parent.mkdir(parents=True, exist_ok=True)
    partial = picture.with_name(f".{picture.name}.part")
    Image.fromarray(drawn).save(partial, "png")
    partial.replace(picture)
    print(picture)


if __name__ == "__main__":
    try:
        about = "A contact sheet: some scenes of a data set and, below each, its true segmentation."
        tyro.cli(main, prog="python -m data", description=f"{about}\n\nData sets: {', '.join(DATASETS)}.")
    except (ValueError, OSError) as error:
        print(f"python -m data: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
