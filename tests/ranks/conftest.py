"""The training that ranks are lost in: its shards, its configuration, its folder."""

from __future__ import annotations

import pytest
from commands import write_config
from images import make_shards
from plain_ranks import RAW


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "s", classes=3, per_class={"train": 10, "val": 7}, size=24)


@pytest.fixture
def config(shards, tmp_path):
    data = {**RAW["data"], "train": str(shards / "train"), "val": str(shards / "val")}
    return write_config(tmp_path / "c.yaml", {**RAW, "run": str(tmp_path / "run"), "data": data})


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"
