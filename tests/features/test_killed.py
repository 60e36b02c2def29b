"""kill -9 while features are computed and in phases that train from them: the same bits."""

from __future__ import annotations

import pytest
from commands import write_config
from images import make_shards
from survival import Stage, differences

RAW = {
    "run": "unset",
    "seed": 5,
    "input": {"size": 32},
    "transforms": [{"name": "resize", "size": [32, 32]}],
    "backbone": {"name": "timm/test_resnet", "weights": "none"},
    "unfreeze": {"name": "gradual", "every": "2ep"},
    "phases": {"each": {"lr": 0.02, "duration": "2ep"}},
    "evaluate": {"batch": 4},
    "checkpoint": {"every": 2},
    "track": {"every": 1},
    "loop": {"ema": {"decay": 0.8}},
    "cache": "exact",
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage")
    shards = make_shards(folder / "s", classes=3, per_class={"train": 10, "val": 4}, size=24)
    data = {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 8, "workers": 1}
    return Stage(folder / "logs", write_config(folder / "c.yaml", {**RAW, "data": data}))


@pytest.fixture(scope="module")
def whole(stage, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    stage.ended_well(stage.start(folder / "run", TLX_FEATURES=str(folder / "features")))
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills",
    [
        ["0:tlx.features.store.FeatureStore.write:3:group"],  # in the first part of several cuts
        ["1:tlx.features.store.FeatureStore.write:7:rank"],
        ["0:tlx.features.store.FeatureStore.write:22:group", "0:tlx.train.step.Updater.update:1:group"],
        ["0:tlx.train.step.Updater.update:7:group", "1:tlx.train.step.Updater.update:5:rank"],  # phases from features
    ],
)
def test_killed_while_features_are_computed_and_in_phases_that_train_from_them(stage, whole, tmp_path, kills):
    features = str(tmp_path / "features")
    for kill in kills:
        launch = stage.start(tmp_path / "run", TLX_FEATURES=features, KILL_AT=kill)
        assert launch.code() != 0, launch.said()
    launch = stage.start(tmp_path / "run", TLX_FEATURES=features)
    stage.ended_well(launch)
    assert differences(tmp_path / "run", whole) == []
