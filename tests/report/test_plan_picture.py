"""The plan as a heat map: what is drawn is what the plan says."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from nets import layer, resnet_like, vgg_like
from PIL import Image

from tlx.base.layers import LayerMap
from tlx.plan.config import parse
from tlx.plan.plan import Plan
from tlx.report.plan_picture import COLUMNS, FROZEN, NAMED_LAYERS, _legend, _named, _sampled, _trains_only, picture

EACH = {"lr": 1e-3, "duration": "3ep", "curve": "cosine"}


def plan_of(layers=None, *, samples=3200, **over):
    raw = {"run": "runs/x", "data": {"train": "x", "batch": 32}, "backbone": {"name": "toys:small"}}
    return Plan.make(parse({**raw, "phases": {"each": EACH}, **over}), layers or resnet_like(), samples=samples)


def pixels(plan, title="run x\ntoys:small"):
    image = Image.open(io.BytesIO(picture(plan, title=title)))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB"))


def share_of(colour, image):
    return (image == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).mean()


@pytest.mark.parametrize("samples", [320, 32_000])
def test_columns_tile_time_and_hold_the_plans_rates(samples):
    plan = plan_of(samples=samples, unfreeze={"name": "gradual", "every": "2ep"})
    columns = _sampled(plan).columns
    assert len(columns) == pytest.approx(min(plan.steps, COLUMNS), abs=len(plan.phases))
    assert [columns[0].start, *(c.stop for c in columns)] == [*(c.start for c in columns), plan.steps]
    for column in columns:
        phase = plan.phase(column.start)
        assert phase.stop >= column.stop
        middle = (column.start + column.stop - 1) // 2
        for y, rate in zip(plan.layers, column.rates, strict=True):
            assert math.isnan(rate) == (not phase.trained(y))
            assert math.isnan(rate) or rate == plan.lr(y, middle)


def test_time_is_in_epochs_or_in_steps_where_the_plan_is_shorter():
    assert _sampled(plan_of()).unit == 100
    short = plan_of(unfreeze="all", phases={"each": {**EACH, "duration": 7}})
    assert _sampled(short).unit == 1
    assert len(_sampled(short).columns) == 7


def test_colours_reach_over_every_layer_and_most_of_the_time():
    decay = {"name": "exponential", "factor": "1/3"}
    steps = {"name": "step", "every": "1ep"}
    plan = plan_of(unfreeze="all", phases={"each": {**EACH, "curve": steps, "layer_decay": decay}})
    drawing = _sampled(plan)
    assert drawing.high == 1e-3
    assert drawing.low == pytest.approx(1e-3 * (1 / 3) ** 6 / 100)
    flat = _sampled(plan_of(unfreeze="all", phases={"each": {**EACH, "curve": "constant"}}))
    assert flat.low == pytest.approx(flat.high / 10)


def test_frozen_layers_are_grey_and_trained_ones_are_not():
    one, both, whole = (share_of(FROZEN, pixels(plan_of(unfreeze=name))) for name in ("head_only", "two_phase", "all"))
    assert one > 1.8 * both > 0.2
    assert whole < 0.01


@pytest.mark.parametrize(
    ("over", "marks"),
    [
        ({"unfreeze": "norms_only"}, {"layer1": "norms", "bn1": None, "conv1": None, "fc": None}),
        ({"unfreeze": "biases_only"}, {"layer1": "biases", "bn1": "biases", "conv1": "biases", "fc": None}),
        (
            {"unfreeze": "head_only", "phases": {"each": {**EACH, "norm": "norms_train"}}},
            {"layer1": "norms", "fc": None},
        ),
        ({"unfreeze": "all", "phases": {"each": {**EACH, "norm": "norms_fixed"}}}, {"layer1": None}),
    ],
    ids=str,
)
def test_layers_that_train_in_norms_or_biases_alone_are_marked(over, marks):
    plan = plan_of(**over)
    by_name = {y.name: y for y in plan.layers}
    assert {name: _trains_only(plan.phases[0], by_name[name]) for name in marks} == marks
    from matplotlib.figure import Figure

    said = {handle.get_label() for handle in _legend(Figure().subplots(), _sampled(plan))}
    assert {f"only {mark} train" for mark in marks.values() if mark} == {s for s in said if s.startswith("only")}


def test_of_many_layers_some_are_named_the_ends_among_them():
    assert _named(5) == [0, 1, 2, 3, 4]
    assert len(_named(NAMED_LAYERS)) == NAMED_LAYERS
    for count in (61, 100, 121, 400):
        named = _named(count)
        assert (named[0], named[-1]) == (0, count - 1)
        assert len(named) <= NAMED_LAYERS
        gaps = np.diff(named)
        assert gaps.min() >= math.ceil(count / NAMED_LAYERS)


@pytest.mark.parametrize(
    "plan",
    [
        lambda: plan_of(LayerMap((layer("fc", 0, role="head"),)), phases={"each": {**EACH, "duration": 1}}),
        lambda: plan_of(unfreeze="all", phases={"each": {**EACH, "layer_decay": {"name": "linear", "ratio": 0}}}),
        lambda: plan_of(phases={"each": {**EACH, "duration": {"max": "3ep"}}}),
        lambda: plan_of(
            vgg_like(150), unfreeze={"name": "gradual", "every": 2}, phases={"each": {"lr": 1e-30, "warmup": 1}}
        ),
    ],
    ids=["one layer", "a rate of 0", "plateau", "150 layers, 76 phases"],
)
def test_odd_plans_are_drawn(plan, recwarn):
    image = pixels(plan(), title="a $run$ with_ \\dollars\n" + "long/" * 60)
    assert image.shape[1] == 1430
    # processes of tests before it, which are forgotten at any time, warn too
    assert not [str(w.message) for w in recwarn.list if not issubclass(w.category, ResourceWarning)]
