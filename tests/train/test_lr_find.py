"""`tlx lr-find`: a curve whose end is known, on any number of ranks, from pictures or features; nothing stays."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from commands import invoke, tlx, write_config
from composed import finished, raw_of
from images import make_target_shards
from torch.func import functional_call
from trainings import values
from typer.testing import CliRunner

import tlx.train.lr_find as finding
from tlx.base.errors import UserError
from tlx.cli.main import app
from tlx.data.shards.targets import Target
from tlx.plan.config import parse
from tlx.tasks import Truth
from tlx.train.cached import input_of
from tlx.train.loop import begin
from tlx.train.lr_curve import Curve, Ramp, Suggestion, steepest, valley
from tlx.train.lr_find import LrFindOptions, lr_find

TWO = {"each": {"lr": 0.02, "duration": "2ep"}, "feature_extraction": {}, "fine_tuning": {}}
SHORT = Ramp(1e-4, 1.0, 24)


def raw(shards, run="unused", **over):
    return raw_of(shards, run, **{"phases": TWO, "transforms": ["resize"], **over})


# The curve, by hand


def test_the_ramp_is_geometric():
    assert [Ramp(1e-4, 1.0, 5).rate(at) for at in range(5)] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_smoothing_is_not_biased_and_divergence_ends_it():
    curve = Curve()
    assert not any(curve.add(rate, 2.0) for rate in (0.1, 0.2, 0.3))
    assert curve.smoothed == pytest.approx([2.0] * 3)
    assert curve.add(0.4, 1000.0)
    assert (curve.ended, curve.last) == ("diverged", 0.4)
    other = Curve()
    other.add(0.1, 1.0)
    assert other.add(0.2, math.nan)
    assert (other.ended, other.rates) == ("not finite", [0.1])


def test_rules_by_hand():
    flat_then_down_then_up = [5.0, 5.0, 5.0, 4.9, 4.5, 3.5, 2.8, 2.5, 2.4, 3.0, 6.0]
    assert valley(flat_then_down_then_up) == 4  # falls over 7 points to place 8: 8 - 7 + 2 + 1
    assert steepest(flat_then_down_then_up) == 5  # (2.8 - 4.5) / 2 is the largest fall
    assert valley([1.0, 2.0, 3.0]) is None
    assert steepest([1.0, 2.0, 3.0]) is None
    curve = Curve(
        rates=[float(n) for n in range(1, 31)], smoothed=[30.0 - n if n < 20 else float(n) for n in range(30)]
    )
    assert curve.suggestions()["minimum/10"] == 2.0  # the lowest is at the rate 20
    assert Curve().suggestions() == {"valley": None, "steepest": None, "minimum/10": None}


def test_what_several_seeds_suggest():
    suggestion = Suggestion({0: 1e-3, 1: 1e-1, 2: 1e-2, 3: None})
    assert (suggestion.rate, suggestion.factor) == (1e-2, pytest.approx(100))
    assert Suggestion({0: 1e-3, 1: 1e-1}).rate == 1e-2
    assert Suggestion({0: None}).rate is None


# A quadratic, whose divergent rate is 2 / L


def test_a_quadratic_diverges_above_two_over_its_curvature(tmp_path, compose):
    numbers = np.random.default_rng(0).normal(size=(24, 1)).astype(np.float32)
    make_target_shards(tmp_path / "s", [(Target("weight", "number", (), 1), numbers)])
    quadratic = {
        "data": {"train": str(tmp_path / "s"), "val": None, "batch": 24, "workers": 0},
        "task": {"name": "regression", "target": "weight"},
        "backbone": {"name": "toys:straight", "weights": "none"},
        "transforms": ["resize"],
        "unfreeze": {"name": "explicit", "phases": [{"name": "all", "layers": {"*": "all"}}]},
        "phases": {"all": {"lr": 0.01, "duration": "2ep"}},
        "optimizer": {"name": "sgd", "momentum": 0, "weight_decay": 0},
    }
    divergent = 2 / largest_curvature(compose(**quadratic))
    ramp = Ramp(divergent / 100, divergent * 100, 300)
    (found,) = lr_find(parse(raw_of(tmp_path, "unused", **quadratic)), LrFindOptions(ramp))
    (curve,) = found.curves.values()
    rises = [r for r, a, b in zip(curve.rates, curve.losses, curve.losses[1:], strict=False) if b > a * (1 + 1e-6)]
    assert divergent < rises[0] < 4 * divergent  # what grows first is what has shrunk most by then
    assert curve.ended in ("diverged", "not finite")
    rates = curve.suggestions()
    assert 0.01 * divergent < rates["valley"] < divergent
    assert 0.01 * divergent < rates["minimum/10"] < divergent  # the steepest point of a smoothed curve comes late


def largest_curvature(run):
    """Of the loss of all samples, over all weights."""
    (batch,) = run.stream.batches(0, 1)
    images, net = run.normalise(batch.images), run.net.train()
    names = [name for name, _ in net.named_parameters()]
    shapes = [p.shape for p in net.parameters()]

    def loss(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        weights = {n: part.view(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}
        return run.task.loss(functional_call(net, weights, images), Truth.of(batch)) / batch.total

    start = torch.cat([p.detach().flatten() for p in net.parameters()])
    return float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, start))[-1])


# The steps of a training


def test_the_first_loss_is_that_of_the_training(shards, compose):
    trained = []
    run = compose(**{k: v for k, v in raw(shards).items() if k not in ("run", "data")})
    phase = run.plan.phases[0]
    for _step, loss in finding._losses(run, phase, started(run, phase)):
        trained.append(loss)
    (found, _) = lr_find(parse(raw(shards)), LrFindOptions(SHORT, lead_in=4))
    assert found.curves[0].losses[0] == pytest.approx(trained[0], rel=1e-5)


def started(run, phase):
    run.progress.step = phase.start
    begin(run, phase)
    return input_of(run, phase)


def test_layers_keep_their_ratios(shards, monkeypatch):
    seen, real = [], finding.set_rates

    def noted(optimizer, phase, step):
        real(optimizer, phase, step)
        seen.append({group["layer"]: group["lr"] for group in optimizer.param_groups})

    monkeypatch.setattr(finding, "set_rates", noted)
    decay = {
        **TWO,
        "each": {"lr": 0.02, "duration": "2ep", "warmup": 3, "layer_decay": {"name": "exponential", "factor": 0.5}},
    }
    lr_find(parse(raw(shards, phases=decay)), LrFindOptions(SHORT, phase="fine_tuning", lead_in=0))
    assert [rates["fc"] for rates in seen] == pytest.approx([SHORT.rate(at) for at in range(len(seen))])
    assert len(seen) > 5
    assert {round(rates["features.2.0"] / rates["fc"], 6) for rates in seen} == {0.5}
    assert {round(rates["features.0.0"] / rates["fc"], 6) for rates in seen} == {0.125}


def test_earlier_phases_lead_in(shards):
    starts = []
    for steps in (0, 6):
        (found,) = lr_find(parse(raw(shards)), LrFindOptions(SHORT, phase="fine_tuning", lead_in=steps))
        assert found.lead_in == steps
        starts.append(found.curves[0].losses[0])
    assert starts[1] < starts[0] - 0.05


def test_features_give_the_curve_of_pictures(shards, tmp_path):
    backbone = {"name": "timm/test_resnet", "weights": "none"}
    curves = []
    for cache in ("off", {"mode": "exact", "folder": str(tmp_path / "f")}):
        config = parse(raw(shards, input={"size": 32}, backbone=backbone, cache=cache))
        (found,) = lr_find(config, LrFindOptions(SHORT, phase="feature_extraction"))
        assert found.input.startswith("pictures" if cache == "off" else "features (input of fc")
        curves.append(found.curves[0].losses)
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert len(list((tmp_path / "f").glob("*/values"))) == 2


def test_other_seeds_give_other_curves(shards):
    found, _ = lr_find(parse(raw(shards, seed=4)), LrFindOptions(SHORT, seeds=2, lead_in=2))
    assert list(found.curves) == [4, 5]
    assert found.curves[4].losses[0] != found.curves[5].losses[0]
    assert set(found.data()["suggestions"]["steepest"]["seeds"]) == {"4", "5"}


# Nothing is left behind


def test_weights_and_optimizer_are_what_they_were(compose):
    run = compose(loop={"ema": {"decay": 0.5}}, phases=TWO, optimizer="adamw")
    phase = run.plan.phases[-1]
    source = started(run, phase)
    for _ in finding._losses(run, run.plan.phases[0], source):  # the optimizer has a state
        pass
    before, ema = values(run.net), values(run.ema.module)
    states = {n: {k: v.clone() for k, v in s.items()} for n, s in run.optimizer.state_dict()["state"].items()}
    updates = run.ema.updates
    with finding._restored(run):
        assert len(finding._curve(run, phase, source, SHORT).losses) > 5
        assert any(not torch.equal(t, before[n]) for n, t in run.net.named_parameters())
    after = values(run.net), values(run.ema.module)
    assert all(torch.equal(t, before[n]) for n, t in after[0].items())
    assert all(torch.equal(t, ema[n]) for n, t in after[1].items())
    now = run.optimizer.state_dict()["state"]
    assert {n: set(s) for n, s in now.items()} == {n: set(s) for n, s in states.items()}
    assert all(torch.equal(now[n][k], v) for n, s in states.items() for k, v in s.items())
    assert run.ema.updates == updates


def test_a_run_that_is_there_is_left_alone_and_none_is_made(shards, tmp_path):
    run = finished(raw(shards, tmp_path / "run"))
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in run.rglob("*") if file.is_file()}
    lr_find(parse(raw(shards, run)), LrFindOptions(SHORT, lead_in=2))
    lr_find(parse(raw(shards, tmp_path / "none")), LrFindOptions(SHORT, lead_in=2))
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in run.rglob("*") if file.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# The command


@pytest.fixture
def config(shards, tmp_path):
    return write_config(tmp_path / "c.yaml", raw(shards, str(tmp_path / "run")))


def test_a_table_an_override_and_files(config, tmp_path):
    done = invoke(
        "lr-find", config, "--steps", 40, "--low", 1e-4, "--seeds", 2, "--lead-in", 2, "--out", tmp_path / "o"
    )
    assert done.exception is None, done.stdout
    said = json.loads((tmp_path / "o" / "lr-find.json").read_text())
    pasted = said["overrides"]
    assert f"by minimum/10:  {' '.join(pasted)}" in done.stdout
    assert parse_with(config, pasted)
    assert [phase["phase"] for phase in said["phases"]] == ["feature_extraction", "fine_tuning"]
    assert (tmp_path / "o" / "lr-find.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "run").exists()


def parse_with(config, pasted):
    from tlx.plan.config import load

    rates = {word.split(".")[1]: float(word.split("=")[1]) for word in pasted}
    made = load(config, pasted)
    return rates and all(made.phases[name].lr == rate for name, rate in rates.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--phase", "fine_tunning"), "did you mean .fine_tuning"),
        (("--rule", "steep"), "did you mean .steepest"),
        (("--low", "1", "--high", "0.1"), "a ramp goes up"),
        (("--out", "THERE"), "it is there already"),
        (("--out", "gone/o"), "no such folder"),
        (("data.batch=0",), "data.batch"),
    ],
)
def test_a_mistake_is_told(config, tmp_path, words, message):
    words = [str(tmp_path) if word == "THERE" else word for word in words]
    with pytest.raises(UserError, match=message):
        raise CliRunner().invoke(app, ["lr-find", str(config), *words]).exception


@pytest.mark.slow
def test_two_ranks_give_the_curve_of_one(shards, tmp_path):
    same = {"name": "toys:small", "weights": "none", "args": {"norm": "group"}}
    config = write_config(tmp_path / "c.yaml", raw(shards, str(tmp_path / "run"), backbone=same))
    words = ("lr-find", config, "--json", "--lead-in", "3", "--steps", "60", "--low", "1e-4", "--high", "1e6")
    curves = []
    for ranks in (1, 2):
        done = tlx(*words, ranks=ranks, is_forked=True)
        assert done.returncode == 0, done.stderr
        curves.append([next(iter(phase["curves"].values())) for phase in json.loads(done.stdout)["phases"]])
    for one, two in zip(*curves, strict=True):
        assert one["ended"] == two["ended"]
        assert one["ended"] != "end of the ramp"  # which they have agreed on
        assert two["rates"] == one["rates"]
        assert two["losses"][:30] == pytest.approx(one["losses"][:30], rel=1e-4)
