"""The table of data sets, and the contact sheets."""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch

from data import DATASETS, ObjectScenes, Scenes, generator
from data.__main__ import main


@pytest.mark.parametrize("name", DATASETS)
def test_the_table_tells_what_the_scenes_are(name):
    entry = DATASETS[name]
    assert entry.name == name
    assert entry.citation
    assert entry.origin
    if entry.generator is None:
        assert entry.file is not None
        with pytest.raises(ValueError, match=f"name: expected one of .*, got '{name}': its scenes come from a file"):
            generator(name, 1)
        return
    scenes = generator(name, 2, seed=1, first=3)
    assert isinstance(scenes, Scenes)
    assert (scenes.name, len(scenes), scenes.seed, scenes.first) == (name, 2, 1, 3)
    assert (scenes.size, scenes.num_entities) == (entry.size, entry.num_entities)
    assert torch.equal(scenes.images(torch.arange(2)), scenes.batch(torch.arange(2))[0])
    assert isinstance(scenes, ObjectScenes) == entry.properties
    if entry.file is not None:
        assert (entry.file.size, entry.file.num_entities) == (entry.size, entry.num_entities)


def test_no_such_data_set():
    with pytest.raises(ValueError, match=r"name: expected one of 'tetrominoes', .*, got 'clever': no such data set"):
        generator("clever", 1)


@pytest.mark.long
def test_the_command_without_docstrings_and_with_a_backend_of_matplotlib_that_does_not_exist():
    command, environment = [sys.executable, "-OO", "-m", "data", "--help"], os.environ | {"MPLBACKEND": "module"}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "A contact sheet: some scenes of a data set" in done.stdout


def test_contact_sheet(tmp_path):
    main("tetrominoes", tmp_path / "sheet.png", scenes=3, columns=2)
    (written,) = tmp_path.iterdir()
    picture = (matplotlib.image.imread(written)[..., :3] * 255).round().astype("uint8")
    assert picture.shape == (2 * (2 * 140 + 4 + 4), 2 * (140 + 4), 3)
    assert (picture[140:144] == 255).all()
    image, _ = generator("tetrominoes", 3).batch(torch.arange(3))
    assert (picture[288:428:4, :140:4] == image[2].permute(1, 2, 0).numpy()).all()
    assert (picture[:140, 144:284:4][::4] == image[1].permute(1, 2, 0).numpy()).all()
    main("shapes", tmp_path / "new" / "sheet.png", scenes=1)
    assert (tmp_path / "new" / "sheet.png").exists()
    with pytest.raises(ValueError, match="scenes and columns: expected at least 1, got 0 and 8"):
        main("tetrominoes", tmp_path / "sheet.png", scenes=0)
    with pytest.raises(ValueError, match="objects-room cannot be generated: give a file of it as --file"):
        main("objects-room", tmp_path / "sheet.png")
