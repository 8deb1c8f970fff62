"""A folder as the original CLEVR is, made up: images and what is in them."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

SIZES, MATERIALS = ("small", "large"), ("rubber", "metal")
SHAPES = ("cube", "sphere", "cylinder")
COLORS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")


def picture(random):
    """480 x 320 pixels, smooth like a photograph's, with the alpha channel that CLEVR's have."""
    coarse = random.integers(0, 256, (8, 12, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((480, 320), Image.Resampling.BILINEAR))
    return np.concatenate([pixels, np.full((320, 480, 1), 255, np.uint8)], 2)


def scene(split, number, count, random):
    """A scene as CLEVR's lists have it, with all that is not read, too."""
    objects = [
        {
            "color": str(random.choice(COLORS)),
            "size": str(random.choice(SIZES)),
            "rotation": float(random.uniform(0, 360)),
            "shape": str(random.choice(SHAPES)),
            "3d_coords": [float(x) for x in random.uniform(-3, 3, 3)],
            "material": str(random.choice(MATERIALS)),
            "pixel_coords": [int(random.integers(480)), int(random.integers(320)), float(random.uniform(7, 14))],
        }
        for _ in range(count)
    ]
    return {
        "image_index": number,
        "objects": objects,
        "relationships": {side: [[] for _ in objects] for side in ("right", "behind", "front", "left")},
        "image_filename": f"CLEVR_{split}_{number:06d}.png",
        "split": split,
        "directions": {"right": [0.66, 0.75, 0.0], "above": [0.0, 0.0, 1.0]},
    }


def write(folder, counts=None, seed=0):
    """CLEVR's folder of scenes with these numbers of objects, by split; returns pictures and scenes in order."""
    random, pictures, scenes = np.random.default_rng(seed), [], []
    for split, numbers in (counts or {"train": (3, 10, 5), "val": (4,)}).items():
        (folder / "images" / split).mkdir(parents=True)
        (folder / "scenes").mkdir(exist_ok=True)
        listed = [scene(split, number, count, random) for number, count in enumerate(numbers)]
        for each in listed:
            pictures.append(picture(random))
            Image.fromarray(pictures[-1]).save(folder / "images" / split / each["image_filename"])
        about = {"split": split, "license": "Creative Commons", "version": "1.0", "date": "2/14/2017"}
        path = folder / "scenes" / f"CLEVR_{split}_scenes.json"
        path.write_text(json.dumps({"info": about, "scenes": listed}))
        scenes += listed
    return pictures, scenes
