"""Features over processes: the same of any number of ranks; after kill -9 the same bits."""

from __future__ import annotations

import pytest
import torch
from commands import rows, write_config
from images import make_shards
from safetensors.torch import load_file
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
    "track": {"every": 1, "report": False},
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


@pytest.mark.slow
def test_any_number_of_ranks_computes_the_same_features_and_trains_the_same_head(stage, tmp_path):
    features, heads, metrics = [], [], []
    for ranks in (1, 2, 3):
        run, folder = tmp_path / f"run{ranks}", tmp_path / f"features{ranks}"
        launch = stage.start(run, "unfreeze=head_only", ranks=ranks, TLX_FEATURES=str(folder))
        stage.ended_well(launch)
        features.append({file.parent.name: file.read_bytes() for file in folder.glob("*/values")})
        heads.append(load_file(run / "checkpoints" / "latest" / "model.safetensors")["fc.weight"])
        metrics.append([row["val/loss"] for row in rows(run) if "val/loss" in row])
    assert len(features[0]) == 2
    assert features[0] == features[1] == features[2]
    for head, losses in zip(heads[1:], metrics[1:], strict=True):
        torch.testing.assert_close(head, heads[0], rtol=1e-5, atol=1e-6)
        assert losses == pytest.approx(metrics[0], rel=1e-5)
