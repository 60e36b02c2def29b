"""Five tars that are elsewhere, and no patience with what does not come."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from images import make_shards

from tlx.data.remote import files as remote
from tlx.data.remote import prefetch, shard_cache


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """40 training pictures in five tars."""
    return make_shards(tmp_path_factory.mktemp("made") / "s", per_class={"train": 14, "val": 4}, shard_samples=9)


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made / "train", tmp_path / "elsewhere" / "train"))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE_S", 0.0)
    monkeypatch.setattr(shard_cache, "LOOK_S", 0.01)
    monkeypatch.setattr(prefetch, "LOOK_S", 0.01)
