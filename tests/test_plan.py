"""The plan: steps, phases, rates, what trains, and what it refuses."""

from __future__ import annotations

import json

import pytest
from nets import layer, resnet_like, vgg_like

from tlx.config import parse
from tlx.errors import UserError
from tlx.layers import LayerMap
from tlx.plan import Plan
from tlx.timetable import timetable


def config(**over):
    raw = {
        "run": "runs/x",
        "data": {"train": "shards/train", "batch": 32},
        "backbone": {"name": "toys:small"},
        "phases": {
            "feature_extraction": {"duration": "16ep", "lr": 1e-3},
            "fine_tuning": {"duration": "8ep", "lr": 1e-4, "layer_decay": {"name": "exponential", "factor": "1/3"}},
        },
    }
    return parse({**raw, **over})


def make(layers=None, samples=6149, world=1, ends=None, **over):
    return Plan.make(config(**over), layers or resnet_like(), samples=samples, world=world, ends=ends)


def test_the_articles_recipe():
    plan = make()
    assert plan.steps_per_epoch == 193
    assert [(p.name, p.start, p.stop) for p in plan.phases] == [
        ("feature_extraction", 0, 16 * 193),
        ("fine_tuning", 16 * 193, 24 * 193),
    ]
    by_name = {y.name: y for y in plan.layers}
    last = plan.steps - 1
    assert plan.lr(by_name["fc"], 0) == 1e-3
    assert plan.lr(by_name["layer4"], 0) == 0.0
    assert plan.lr(by_name["fc"], last) == 1e-4
    assert plan.lr(by_name["layer4"], last) == pytest.approx(1e-4 / 3)
    assert plan.lr(by_name["conv1"], last) == pytest.approx(1e-4 / 729)
    assert all(type(rate) is float for rate in plan.phases[1].rates(last).values())


def test_frozen_means_frozen_by_default():
    phase = make().phases[0]
    by_name = {y.name: y for y in resnet_like()}
    assert [p.name for p in phase.trained(by_name["fc"])] == ["fc.weight", "fc.bias"]
    assert phase.trained(by_name["layer1"]) == ()
    assert phase.norm_state(by_name["layer1"]).statistics == "fixed"


@pytest.mark.parametrize(
    ("policy", "frozen", "trained"),
    [  # (statistics move, affine learns), first of a frozen layer, then of a trained one
        ("frozen_is_frozen", (False, False), (True, True)),
        ("statistics_move", (True, False), (True, True)),
        ("norms_train", (True, True), (True, True)),
        ("norms_fixed", (False, False), (False, False)),
        ("statistics_fixed", (False, False), (False, True)),
        (
            {
                "frozen": {"statistics": "fixed", "affine": "trained"},
                "trained": {"statistics": "moving", "affine": "frozen"},
            },
            (False, True),
            (True, False),
        ),
    ],
)
def test_norm_policies_express_every_row_of_the_article(policy, frozen, trained):
    plan = make(phases={"each": {"norm": policy, "lr": 0.1, "duration": "1ep"}})
    layer1 = plan.layers.match("layer1")[0]
    for phase, expected in zip(plan.phases, (frozen, trained), strict=True):
        affine = any(p.kind == "norm" for p in phase.trained(layer1))
        assert (phase.norm_state(layer1).statistics == "moving", affine) == expected


def test_the_heads_norms_are_new_and_learn():
    layers = LayerMap((layer("a", 0, norm=True), layer("fc", 1, role="head", norm=True)))
    phase = make(layers, phases={"each": {"norm": "norms_fixed", "lr": 0.1, "duration": "1ep"}}).phases[0]
    assert phase.norm_state(layers.head).statistics == "moving"
    assert len(phase.trained(layers.head)) == 4


def test_biases_only_trains_additive_terms_norms_included():
    plan = make(unfreeze="biases_only", phases={"each": {"lr": 0.1, "duration": "1ep"}})
    names = [p.name for p in plan.phases[0].trained(plan.layers.match("layer1")[0])]
    assert names == ["layer1.bias", "layer1.norm.bias"]


def test_vgg_is_linear_over_44_modules():
    over = {"phases": {"each": {"lr": 1e-4, "duration": "8ep", "layer_decay": {"name": "linear", "ratio": 1e-3}}}}
    plan = make(vgg_like(), unfreeze="all", **over)
    rates = plan.phases[0].rates(0)
    assert rates["classifier"] == rates["classifier.6"] == 1e-4
    assert rates["features.0"] == pytest.approx(1e-7)
    assert rates["features.42"] == pytest.approx(1e-4 + (1e-7 - 1e-4) / 44 * 2)


def test_warmup_then_curve():
    over = {"each": {"lr": 1.0, "duration": "10ep", "warmup": "2ep", "curve": "linear"}}
    phase = make(samples=320, unfreeze="all", phases=over).phases[0]
    head = [phase.rates(t)["fc"] for t in range(100)]
    assert head[:3] == [1 / 20, 2 / 20, 3 / 20]
    assert head[19] == head[20] == 1.0
    assert head[60] == pytest.approx(0.5)


def test_curve_arguments_are_durations():
    over = {"each": {"lr": 1.0, "duration": "25ep", "curve": {"name": "step", "every": "7ep"}}}
    phase = make(samples=320, unfreeze="all", phases=over).phases[0]
    assert [round(phase.rates(t)["fc"], 6) for t in (0, 69, 70, 140, 249)] == [1.0, 1.0, 0.1, 0.01, 0.001]


def test_percent_is_of_the_whole():
    over = {"duration": "20ep", "phases": {"feature_extraction": {"duration": "25%"}, "fine_tuning": {"duration": 77}}}
    over["phases"]["each"] = {"lr": 0.1}
    plan = make(samples=320, **over)
    assert [(p.start, p.stop) for p in plan.phases] == [(0, 50), (50, 127)]
    with pytest.raises(UserError, match="of what"):
        make(phases={"each": {"lr": 0.1, "duration": "25%"}})


def test_a_phase_that_ended_early_moves_the_next_and_keeps_its_curve():
    over = {"each": {"lr": 1.0, "curve": "cosine"}, "fine_tuning": {"duration": "2ep"}}
    over["feature_extraction"] = {"duration": {"max": "10ep", "patience": 2}}
    whole = make(samples=320, phases=over)
    cut = make(samples=320, phases=over, ends={"feature_extraction": 30})
    assert [(p.start, p.stop) for p in cut.phases] == [(0, 30), (30, 50)]
    assert cut.phases[0].rates(29) == whole.phases[0].rates(29)
    assert whole.phases[0].plateau.patience == 2


def test_steps_of_an_epoch_with_and_without_a_short_batch():
    assert make(samples=100, data={"train": "x", "batch": 32}).steps_per_epoch == 4
    assert make(samples=100, data={"train": "x", "batch": 32, "drop_last": True}).steps_per_epoch == 3
    with pytest.raises(UserError, match="drops them all"):
        make(samples=10, data={"train": "x", "batch": 32, "drop_last": True})
    with pytest.raises(UserError, match="no training sample"):
        make(samples=0)


@pytest.mark.parametrize(
    ("samples", "batch", "world", "micro", "refused"),
    [
        (33, 32, 1, None, True),
        (34, 32, 2, None, True),
        (36, 32, 2, None, False),
        (64, 32, 1, 1, True),
        (33, 33, 2, 11, False),
    ],
)
def test_moving_batchnorm_on_one_sample_is_refused_and_names_drop_last(samples, batch, world, micro, refused):
    over = {"data": {"train": "x", "batch": batch}, "loop": {"micro_batch": micro}}
    if refused:
        with pytest.raises(UserError, match=r"data\.drop_last=true"):
            make(samples=samples, world=world, **over)
    else:
        assert any("depend on the micro-batch" in w for w in make(samples=samples, world=world, **over).warnings)
    fixed = {"each": {"lr": 0.1, "duration": "1ep", "norm": "norms_fixed"}}
    assert not make(samples=samples, world=world, phases=fixed, **over).warnings


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"phases": {"fine_tunning": {"lr": 1}}}, 'no phase "fine_tunning"; did you mean "fine_tuning"'),
        ({"phases": {"each": {"lr": 1}}}, "no duration"),
        ({"phases": {"each": {"duration": 3}}}, "no learning rate"),
        ({"phases": {"each": {"lr": 1, "duration": "3ep", "warmup": "3ep"}}}, "fills the phase"),
        ({"data": {"train": "x", "batch": 2}, "ranks": 4}, "cannot be dealt to 4 ranks"),
    ],
)
def test_what_a_plan_refuses(over, message):
    over = dict(over)
    world = over.pop("ranks", 1)
    with pytest.raises(UserError, match=message):
        make(world=world, **over)


def test_the_plan_is_printable_and_plain_data():
    plan = make()
    text = timetable(plan)
    for shown in ("feature_extraction", "16", "193 steps per epoch", "fc (head)", "3.333e-05", "1.372e-07"):
        assert shown in text
    assert json.loads(json.dumps(plan.data()))["phases"][1]["layers"]["layer4"]["lr"] == pytest.approx(1e-4 / 3)


def test_the_schedule_written_out_makes_the_same_plan():
    plan = make(unfreeze={"name": "gradual", "every": "2ep"}, phases={"each": {"lr": 0.1, "curve": "cosine"}})
    again = make(**plan.explicit())
    assert [(p.name, p.start, p.stop, p.trains) for p in again.phases] == [
        (p.name, p.start, p.stop, p.trains) for p in plan.phases
    ]
    assert all(a.rates(a.start + 3) == b.rates(b.start + 3) for a, b in zip(again.phases, plan.phases, strict=True))
