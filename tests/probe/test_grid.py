"""A grid of heads that train together: each is what it would be alone, and what a training would make of it."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from composed import finished, raw_of
from images import make_shards
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from tlx.base.errors import UserError
from tlx.cli.main import app
from tlx.cli.probe import numbers
from tlx.features.knn import Table
from tlx.models import heads
from tlx.plan.config import load, parse
from tlx.plan.parts import Part
from tlx.probe import grid
from tlx.probe.choice import Judged, halves
from tlx.probe.features import probed
from tlx.probe.members import Member, Optimizer, Stack
from tlx.probe.regression import chosen_c, folds, regressions

PLAIN = [{"name": "resize", "size": [32, 32]}]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("s") / "s", classes=3, per_class={"train": 8, "val": 5}, size=24)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TLX_FEATURES", str(tmp_path / "features"))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(tmp_path)


def settings(shards, run, **over):
    own = {"backbone": {"name": "timm/test_resnet", "weights": "none"}, "input": {"size": 32}, "transforms": PLAIN}
    phases = {"each": {"lr": 0.02, "duration": "3ep", "curve": "cosine", "warmup": 2}}
    return raw_of(shards, run, **{**own, "unfreeze": "head_only", "phases": phases, **over})


def data(width=12, many=40, classes=3, seed=0):
    torch.manual_seed(seed)
    labels = torch.arange(many) % classes
    return torch.randn(many, width) + torch.randn(classes, width)[labels], labels


TORCH = {
    "adamw": lambda p, lr, decay: torch.optim.AdamW(p, lr=lr, weight_decay=decay),
    "adam": lambda p, lr, decay: torch.optim.Adam(p, lr=lr, weight_decay=decay),
    "sgd": lambda p, lr, decay: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=decay, nesterov=True),
}


def groups(net, kinds, decay):
    """Weights decay, all else does not."""
    own = {
        kind: [p for name, p in net.named_parameters() if (kinds[name] == "weight") is kind] for kind in (True, False)
    }
    return [{"params": own[True], "weight_decay": decay}, {"params": own[False], "weight_decay": 0}]


@pytest.mark.parametrize("optimizer", TORCH)
@pytest.mark.parametrize(
    "head", [Part(name="linear"), Part(name="cosine"), Part(name="mlp", args={"hidden": [7], "dropout": 0.3})]
)
def test_each_member_is_what_it_would_be_alone(head, optimizer):
    if optimizer == "sgd" and head.name == "mlp":  # Adam makes steps of the rounding before a norm
        head = Part(name="mlp", args={**head.args, "norm": True})
    rows, labels = data()

    def make():
        torch.manual_seed(1)
        return getattr(heads, head.name)(12, 3, **head.args)

    members = [Member(head, lr, decay) for lr in (0.01, 0.1) for decay in (0.0, 0.2)]
    args = {"nesterov": True} if optimizer == "sgd" else {}
    stack = Stack(members, make)
    update = Optimizer.of(Part(name=optimizer, args=args), ["bias", "norm", "scale"], 0.5).updater(stack)
    for step in range(1, 8):
        torch.manual_seed(step)
        nn.functional.cross_entropy(stack(rows).flatten(0, 1), labels.repeat(4), reduction="sum").div(40).backward()
        update(step, 1 / step)
    for number, member in enumerate(members):
        alone = make()
        own = TORCH[optimizer](groups(alone, stack.kinds(), member.weight_decay), member.lr, 0)
        for step in range(1, 8):
            torch.manual_seed(step)
            own.zero_grad()
            nn.functional.cross_entropy(alone(rows), labels).backward()
            nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
            for group in own.param_groups:
                group["lr"] = member.lr / step
            own.step()
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(stack.state(number)[name], value, rtol=1e-4, atol=1e-5)


def test_a_member_is_what_a_training_makes_of_it(shards, tmp_path):
    """The same first weights, batches, course of rates, clipping: the weights that `tlx train` saves."""
    optimizer = {"name": "adamw", "weight_decay": 0.3}
    raw = settings(shards, tmp_path / "run", loop={"clip": 0.7}, cache="exact", optimizer=optimizer)
    saved = load_file(finished(raw) / "checkpoints" / "latest" / "model.safetensors")
    config = parse(raw)
    members = grid.members_of(config, grid.Wanted(lrs=[0.001, 0.02], decays=[0.3]))
    with probed(config, plain=False) as own:
        stacks = grid.stacks_of(own, members)
        grid.train(own, stacks, Optimizer.of(config.optimizer, config.no_decay, config.loop.clip), None)
    torch.testing.assert_close(stacks[0].state(1)["weight"], saved["fc.weight"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stacks[0].state(1)["bias"], saved["fc.bias"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(stacks[0].state(0)["weight"], saved["fc.weight"], atol=1e-3)


@pytest.mark.parametrize("c", [0.01, 1.0, 10.0])
def test_regression_is_that_of_scikit_learn(c):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rows, labels = data(width=20, many=90)
    rows[:, 3] = 5.0  # a constant one
    table = Table(rows, labels, torch.arange(90))
    own = list(regressions(table, 3, sorted({0.001, c})))[-1]
    scaled = StandardScaler().fit_transform(rows.double().numpy())
    other = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(scaled, labels.numpy())
    there = torch.from_numpy(other.predict_proba(scaled))
    torch.testing.assert_close(own.logits(rows).softmax(1), there, rtol=1e-4, atol=1e-5)


def test_the_command_writes_a_configuration_to_train_from_and_never_writes_over_one(shards, tmp_path):
    raw = settings(shards, tmp_path / "run", cache="exact")
    finished(raw)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    words = ["probe", "c.yaml", "--lr", "1e-3..1e-1:log/3", "--weight-decay", "0,0.1", "--heads", "linear,cosine"]
    done = CliRunner().invoke(app, [*words, "--json", "--bootstrap", "50", "seed=0"], catch_exceptions=False)
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert "computing" not in done.stderr  # the training has left its features
    assert len(found["candidates"]) == 3 * 2 * 2 + 5
    assert all(0 <= one["accuracy"]["low"] <= one["accuracy"]["high"] <= 1 for one in found["candidates"])
    best = next(one for one in found["candidates"] if "head" in one)
    winner = load("c-probe.yaml")
    assert winner.settings("feature_extraction").lr == best["lr"]
    assert winner.head.name == best["head"]["name"] if isinstance(best["head"], dict) else best["head"]
    assert winner.optimizer.args["weight_decay"] == best["weight_decay"]
    assert winner.run.name == "c-probe"
    before = (tmp_path / "c-probe.yaml").read_text()
    with pytest.raises(UserError, match="stays as it is"):
        CliRunner().invoke(app, [*words, "--out", "c-probe.yaml"], catch_exceptions=False, standalone_mode=False)
    CliRunner().invoke(app, ["probe", "c.yaml", "--lr", "0.01"], catch_exceptions=False)
    assert (tmp_path / "c-probe.yaml").read_text() == before
    assert (tmp_path / "c-probe-2.yaml").exists()


def test_without_validation_pictures_a_fifth_is_held_out(shards, tmp_path):
    raw = settings(shards, tmp_path / "run")
    del raw["data"]["val"]
    found = grid.search(parse(raw), grid.Wanted(lrs=[0.01], resamples=0))
    assert "held out" in found.judged_on
    assert found.trained_on.startswith("20 pictures, ")  # of 24


def test_folds_keep_views_together_and_classes_apart():
    table = Table(torch.zeros(60, 1), torch.arange(30).repeat(2) % 3, torch.arange(30).repeat(2))
    fold = folds(table, seed=1)
    assert torch.equal(fold[:30], fold[30:])
    assert torch.stack([torch.bincount(fold[table.labels == c], minlength=5) for c in range(3)]).unique().tolist() == [
        4
    ]
    assert not torch.equal(fold, folds(table, seed=2))


def test_c_is_chosen_on_pictures_that_were_held_out():
    rows, labels = data(width=60, many=60)
    noise = Table(torch.randn(60, 60), labels, torch.arange(60))
    assert chosen_c(Table(rows, labels, torch.arange(60)), 3, [1e-6, 1e-2], seed=0) == 1e-2
    assert chosen_c(noise, 3, [1e-4], seed=0) == 1e-4


def test_what_choosing_is_worth_is_judged_on_pictures_that_did_not_choose():
    """Candidates that guess: the best of many looks good, and choosing is worth a guess."""
    torch.manual_seed(0)
    labels = torch.arange(400) % 4
    hits = torch.rand(300, 400) < 0.25
    judged = Judged(hits, torch.rand(300, 400), labels)
    best = float(hits[judged.best()].double().mean())
    assert best > 0.29
    assert abs(float(judged.crossed(0).mean()) - 0.25) < 0.04
    assert halves(labels, 0).sum() == 200


@pytest.mark.parametrize(
    ("text", "found"),
    [("1e-3..1e-1:log/3", [0.001, 0.01, 0.1]), ("0.1,1e-2", [0.01, 0.1]), ("1..3:lin/3", [1, 2, 3])],
)
def test_ranges(text, found):
    assert numbers(text, "--lr") == pytest.approx(found)


@pytest.mark.parametrize("text", ["x", "1e-3..x:log/3", "0..1:log/3", "-1", "1,,2", "nan", "3..1:lin/2", "0"])
def test_ranges_that_are_none(text):
    with pytest.raises(UserError, match="no numbers"):
        numbers(text, "--lr")


def test_heads_and_optimizers_that_a_grid_cannot_train(shards, tmp_path):
    config = parse(settings(shards, tmp_path / "run"))
    with pytest.raises(UserError, match="pools by itself"):
        grid.members_of(config, grid.Wanted(heads=[Part(name="concat_pool")]))
    with pytest.raises(UserError, match="a grid trains with adamw"):
        Optimizer.of(Part(name="rmsprop"), [], None)
