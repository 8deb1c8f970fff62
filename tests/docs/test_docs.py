"""What the README shows in Python runs, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from families import Locatello
from torch import nn

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_python_blocks_run(tmp_path: Path):
    inputs = torch.randn(2, 6 * 6, 32)
    names = {
        "torch": torch, "F": F, "inputs": inputs, "x": inputs, "iterations": 2, "h": 6, "w": 6,
        "model": Locatello(2, 3, 32, 64, 128), "images": inputs, "theirs": Locatello(2, 3, 32, 64, 128),
        "image": torch.rand(2, 3, 12, 12), "reconstruction_error": torch.tensor(0.1), "norm_slots": nn.LayerNorm(64),
        "norm_mlp": nn.LayerNorm(64), "to_q": nn.Linear(64, 64), "to_k": nn.Linear(32, 64), "to_v": nn.Linear(32, 64),
        "gru": nn.GRUCell(64, 64), "mlp": nn.Linear(64, 64), "mean": torch.zeros(2, 4, 8, requires_grad=True),
        "deviation": torch.ones(2, 4, 8), "decoder": nn.Sequential(nn.Linear(8, 576), nn.Unflatten(2, (4, 12, 12))),
    }  # fmt: skip
    assert len(BLOCKS) >= 7
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for block in BLOCKS:
            exec(compile(block, str(README), "exec"), names)
    finally:
        dist.destroy_process_group()
    assert names["slots"].shape == (2, 7, 64)
    assert names["attention"].shape == (2, 7, 36)
    assert names["loss"].isfinite()
    (d_z,) = torch.autograd.grad(names["nll"], names["z"])
    torch.testing.assert_close(names["d_z"], 2 * d_z)  # as printed, of a mean over the two images
    assert "forward" in vars(names["model"]), "accelerated"
