"""Inpainting Error Maximization on images whose masks are known: python3 -m bench.iem FOLDER

Discs of one texture on another, the textures of ever more contrast; single pieces of Tetrominoes; and, where
scikit-image is installed, the horse's silhouette that comes with it. Beside each the centred square that the search
begins with. Leaves FOLDER/iem.json, and photographs.png: what it finds, as figure and ground and as 3 and 5 regions, in
the photographs that come with scikit-image and scikit-learn.
"""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from bench.runs import usage
from data import TetrominoesGenerator
from models import iem
from training.files import write
from training.versions import versions

SIZE = 128
PHOTOGRAPHS = {
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
    "skimage": [f"data/{name}" for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "camera.png",
                                            "motorcycle_left.png", "horse.png", "coins.png")],
}  # fmt: skip


def discs(num: int, contrast: float) -> tuple[Tensor, Tensor]:
    """Images (B, 3, 128, 128) of checks on stripes that differ by a color each, with noise; masks (B, 128, 128)."""
    random = torch.Generator().manual_seed(0)
    row, column, radius = torch.rand(3, num, 1, 1, generator=random) * SIZE
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    row, column, radius = 0.35 * SIZE + 0.3 * row, 0.35 * SIZE + 0.3 * column, 0.2 * SIZE + 0.2 * radius
    inside = (y - row) ** 2 + (x - column) ** 2 < radius**2
    stripes, checks = (x + 2 * y) % 9 < 4, (x // 3 + y // 3) % 2 == 1
    texture = torch.where(inside, checks, stripes).unsqueeze(1).float() - 0.5
    color = torch.where(
        inside.unsqueeze(1), *(torch.tensor(c).view(3, 1, 1) for c in ([0.7, 0.5, 0.3], [0.3, 0.4, 0.3]))
    )
    noise = 0.05 * torch.randn(num, 3, SIZE, SIZE, generator=random)
    return (color + contrast * texture + noise).clamp(0, 1), inside


def pieces(num: int) -> tuple[Tensor, Tensor]:
    """The first piece of each of so many scenes of Tetrominoes, enlarged to 128 x 128."""
    pixels, labels = TetrominoesGenerator(num).batch(torch.arange(num))
    mask = torch.nn.functional.interpolate((labels == 1).float().unsqueeze(1), SIZE)
    return torch.nn.functional.interpolate(pixels.float() / 255, SIZE) * mask, mask[:, 0] > 0


def photographs() -> dict[str, Tensor]:
    """Centred squares (3, 128, 128) of what the installed packages bring along."""
    found = {}
    for package, files in PHOTOGRAPHS.items():
        if (spec := importlib.util.find_spec(package)) is not None:
            for file in (Path(spec.origin).parent / name for name in files):
                if file.exists():
                    square = ImageOps.fit(Image.open(file).convert("RGB"), (SIZE, SIZE), Image.Resampling.NEAREST)
                    found[file.stem] = torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255
    return found


def overlap(figure: Tensor, mask: Tensor) -> Tensor:
    """Intersection over union (B,) of masks (B, H, W), of figure or ground, whichever is nearer."""
    each = [(x & mask).sum((1, 2)) / (x | mask).sum((1, 2)) for x in (figure, ~figure)]
    return torch.maximum(*each)


def main(out: Path) -> None:
    cases = {f"24 discs, texture of contrast {contrast}": discs(24, contrast) for contrast in (0.05, 0.1, 0.15, 0.2)}
    cases["64 pieces of Tetrominoes"] = pieces(64)
    photos = photographs()
    if "horse" in photos:
        silhouette = photos["horse"].unsqueeze(0)
        cases["the horse of scikit-image"] = silhouette, silhouette.mean(1) < 0.5
    rows = {}
    for name, (images, mask) in cases.items():
        begun = time.process_time()
        found = overlap(iem.segment(images), mask)
        seconds = (time.process_time() - begun) / len(images)
        square = overlap(iem.segment(images, 0), mask)
        rows[name] = {"iou": found.mean().item(), "at_least_0.9": (found >= 0.9).double().mean().item(),
                      "square_iou": square.mean().item(), "cpu_seconds_an_image": round(seconds, 3)}  # fmt: skip
        print(f"{name}: IoU {rows[name]['iou']:.2f}, of the square {rows[name]['square_iou']:.2f}", flush=True)
    write(out / "iem.json", json.dumps({"rows": rows, "versions": versions()}, indent=2) + "\n")
    if photos:
        images = torch.stack(list(photos.values()))
        colors = torch.from_numpy(iem.COLORS) / 255
        rows_of_picture = [images, images * (0.3 + 0.7 * iem.segment(images).unsqueeze(1))]
        for K in (3, 5):
            rows_of_picture.append(0.5 * images + 0.5 * colors[iem.segment_kway(images, K)].movedim(-1, 1))
        sheet = torch.cat([torch.cat(list(row), 2) for row in rows_of_picture], 1)
        picture = io.BytesIO()
        Image.fromarray((sheet * 255).byte().permute(1, 2, 0).numpy()).save(picture, "png")
        write(out / "photographs.png", picture.getvalue())


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        usage(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    main(folder)
