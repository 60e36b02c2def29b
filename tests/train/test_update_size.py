"""The gradient's norm and the update-to-weight ratio of each layer: against numbers by hand, and through a training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from composed import raw_of, two_phases
from images import make_shards
from updates import batch, phase_model

from tlx.plan.config import parse
from tlx.runs.metrics_file import read_rows
from tlx.train import command as training
from tlx.train.update_size import UpdateSize


def test_numbers_by_hand() -> None:
    """SGD of rate 0.5: weights (3, 4) with gradient (6, 8); in the head (1, 0), (0, 2) with (0, 0), (4, 0)."""
    a, b, c, frozen = (torch.nn.Parameter(torch.tensor(v)) for v in ([3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [9.0]))
    groups = [{"params": [a], "layer": "stem"}, {"params": [b], "layer": "head"}, {"params": [c], "layer": "head"}]
    optimizer = torch.optim.SGD([*groups, {"params": [frozen], "layer": "below"}], lr=0.5)
    a.grad, b.grad, c.grad = torch.tensor([6.0, 8.0]), torch.zeros(2), torch.tensor([4.0, 0.0])
    size = UpdateSize()
    size.before(optimizer, torch.tensor(math.sqrt(100 + 16)))
    optimizer.step()
    size.after()
    # stem: ||(3, 4)|| = 5 moves by 5; head: ||(1, 0, 0, 2)|| = sqrt 5 moves by 2
    assert size.row() == pytest.approx(
        {"train/grad_norm": math.sqrt(116), "update_ratio/stem": 1.0, "update_ratio/head": 2 / math.sqrt(5)}, rel=1e-5
    )


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_is_the_same_whether_it_is_measured_or_not(kind) -> None:
    (first, own), (second, other) = phase_model(kind), phase_model(kind)
    before = {name: p.detach().clone() for name, p in own.net.named_parameters()}
    size = UpdateSize()
    first.update(own, 0, [batch()], size=size)
    second.update(other, 0, [batch()])
    for (name, p), q in zip(own.net.named_parameters(), other.net.parameters(), strict=True):
        assert torch.equal(p, q), name
    by_layer: dict[str, list[str]] = {}
    for group in first.optimizer.param_groups:
        by_layer.setdefault(group["layer"], []).extend(group["names"])
    now, told = {name: p.detach() for name, p in own.net.named_parameters()}, size.row()
    for layer, names in by_layer.items():
        moved = math.sqrt(sum(float((now[n] - before[n]).double().square().sum()) for n in names))
        were = math.sqrt(sum(float(before[n].double().square().sum()) for n in names))
        assert told[f"update_ratio/{layer}"] == pytest.approx(moved / were, rel=1e-4)


def test_a_step_that_moved_nothing_tells_nothing() -> None:
    updater, net = phase_model(torch.optim.AdamW)
    broken = batch()
    with torch.no_grad():
        next(net.net.parameters())[0] = math.nan
    size = UpdateSize()
    updater.update(net, 0, [broken], size=size)
    assert size.row() == {}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("s"), classes=3, per_class={"train": 8, "val": 4}, size=16)


def sizes(run: Path) -> list[dict]:
    return [row for row in read_rows(run / "metrics.jsonl") if "train/lr_head" in row]


def test_rows_tell_the_layers_that_train_and_the_phase(shards, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    raw = {**two_phases(shards, tmp_path / "run"), "track": {"every": 2, "report": False}}
    training.train(parse(raw))
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    layers = [layer["name"] for layer in plan["layers"]]
    found = sizes(tmp_path / "run")
    assert [row["step"] for row in found] == [2, 4, 6, 8, 10, 12]
    for row in found:
        trains = layers if row["phase_index"] else layers[-1:]
        for kind in ("lr", "update_ratio"):
            assert sorted(k for k in row if k.startswith(f"{kind}/")) == sorted(f"{kind}/{name}" for name in trains)
        assert row["train/grad_norm"] > 0
        assert 0 <= row["time/data_wait"] <= 1
    assert {(row["phase"], row["phase_index"]) for row in found} == {("feature_extraction", 0), ("fine_tuning", 1)}


def test_micro_batches_give_the_same_sizes(shards, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    for name, micro in (("whole", 8), ("dealt", 4)):
        raw = raw_of(shards, tmp_path / name, loop={"micro_batch": micro}, track={"every": 2, "report": False})
        raw["phases"]["each"]["norm"] = "statistics_fixed"
        training.train(parse(raw))
    for one, other in zip(sizes(tmp_path / "whole"), sizes(tmp_path / "dealt"), strict=True):
        for key in (k for k in one if k.startswith("update_ratio/") or k == "train/grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=2e-3)
