"""Runs that the tests beside this file share."""

import shutil

import numpy as np
import pytest
import torch
from commands import NAME, SHORT, TINY, call

from data import DATASETS


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A whole tiny run, never interrupted."""
    out = tmp_path_factory.mktemp("run") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, *TINY, "--out", out) == 0
    return out


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run whose surroundings are in order."""
    out = tmp_path_factory.mktemp("run") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, *SHORT, "--out", out) == 0
    return out


@pytest.fixture
def unfinished(whole, tmp_path):
    """The same run, killed before it left its scores."""
    run = tmp_path / "unfinished"
    shutil.copytree(whole, run)
    (run / "summary.json").unlink()
    return run


@pytest.fixture
def scenes(tmp_path):
    """A file of as many scenes as the run takes."""
    image, labels = DATASETS["tetrominoes"].generator(46).batch(torch.arange(46))
    masks = torch.stack([labels == k for k in range(4)], 1)
    path = tmp_path / f"{NAME}.npz"
    np.savez(path, image=image.permute(0, 2, 3, 1).numpy(), mask=masks.numpy())
    return path
