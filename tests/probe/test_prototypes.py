"""A head of prototypes begins as class means of the pictures that are trained on."""

from __future__ import annotations

import pytest
import torch
from composed import composer, raw_of
from images import make_shards

from tlx.base.errors import UserError
from tlx.models import heads
from tlx.models.head_modules import Prototypes
from tlx.plan.config import parse
from tlx.train import command as training
from tlx.train.cached import input_of
from tlx.train.loop import begin
from tlx.train.solved import solve_head


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("s") / "s", classes=3, per_class={"train": 8, "val": 5}, size=24)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TLX_FEATURES", str(tmp_path / "features"))
    monkeypatch.delenv("RANK", raising=False)


OVER = {
    "backbone": {"name": "timm/test_resnet", "weights": "none"},
    "input": {"size": 32},
    "transforms": [{"name": "resize", "size": [32, 32]}],
    "unfreeze": "head_only",
    "cache": "exact",
}


def test_logits_are_distances():
    head, features = heads.prototype(6, 4, scale=0.5), torch.randn(3, 6)
    expected = -0.5 * ((features[:, None] - head.weight[None]) ** 2).sum(2)
    torch.testing.assert_close(head(features), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_prototypes_are_means_of_a_few_pictures_of_each_class(shards, tmp_path, monkeypatch, dropout):
    limit = {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 4, "sampling": {"limit": 2}}
    head = {"name": "prototype", "dropout": dropout}
    run = composer(shards, tmp_path / "run", monkeypatch)(**OVER, data=limit, head=head)
    begin(run, run.plan.phases[0])
    source = input_of(run, run.plan.phases[0])
    solve_head(run, source)
    weight = next(one for one in run.net.modules() if isinstance(one, Prototypes)).weight
    few, stored = run.stream.loader.among, source.stream.stored
    assert len(few) == 6
    rows = torch.from_numpy(stored.store.rows(0)[few].copy())
    labels = run.stream.manifest.labels[few]
    for label in range(3):
        torch.testing.assert_close(weight[label], rows[labels == label].mean(0), rtol=1e-5, atol=1e-6)


def test_a_training_begins_with_them_and_says_so(shards, tmp_path, capsys):
    head = {"name": "prototype", "scale": 0.1}
    training.train(parse(raw_of(shards, tmp_path / "run", **OVER, head=head)))
    assert "prototypes are class means of 24 views of 24 pictures" in capsys.readouterr().out
    with pytest.raises(UserError, match="prototypes begin as class means of features"):
        training.train(parse(raw_of(shards, tmp_path / "other", **{**OVER, "cache": "off"}, head=head)))
