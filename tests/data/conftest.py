"""Where tests of files write them."""

import pytest


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Where a test writes its file: an empty folder, beside an empty cache of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "files").mkdir()
    return tmp_path / "files" / "train.tfrecords"
