"""The plan: steps, phases, rates, what trains, and what it refuses."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from nets import layer, resnet_like, vgg_like

from tlx.base import plug
from tlx.base.durations import Duration, Period, Point, Steps
from tlx.base.errors import UserError
from tlx.base.layers import Layer, LayerMap, Parameter
from tlx.plan.config import Config, dump, parse
from tlx.plan.explicit import written_out
from tlx.plan.phase_settings import PhaseSettings
from tlx.plan.plan import Plan
from tlx.plan.timetable import timetable
from tlx.plan.unfreeze import Assignment


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


def without_biases():
    weights = [
        Layer(f"conv{i}", i, "backbone", (Parameter(f"conv{i}.weight", (4, 3), "weight"),), (), ()) for i in (0, 1)
    ]
    return LayerMap((*weights, layer("fc", 2, role="head")))


NOTHING = {
    "no norms": (
        "norms_only",
        "frozen_is_frozen",
        vgg_like(4),
        r"5 layers \(their norms\).*there to train; only the head",
    ),
    "norms fixed": ("norms_only", "norms_fixed", resnet_like(), r"6 layers .* under the norm policy \(norms_fixed\)"),
    "no biases": ("biases_only", "frozen_is_frozen", without_biases(), r"2 layers \(their biases\)"),
    "no parameters": (
        {"name": "explicit", "phases": [{"name": "x", "layers": {"features.1": "all", "head": "all"}}]},
        "frozen_is_frozen",
        vgg_like(4),
        r"explicit asks to train features.1 \(all of them\)",
    ),
}


@pytest.mark.parametrize("case", NOTHING)
def test_a_schedule_without_effect_is_refused(case):
    schedule, norm, layers, said = NOTHING[case]
    with pytest.raises(UserError, match=said):
        make(layers, unfreeze=schedule, phases={"each": {"lr": 0.1, "duration": "1ep", "norm": norm}})


def test_a_schedule_that_trains_some_of_what_it_asks_for_has_an_effect():
    each = {"each": {"lr": 0.1, "duration": "1ep", "norm": "norms_fixed"}}
    assert make(unfreeze="biases_only", phases=each).phases[0].trained(resnet_like().match("layer1")[0])
    make(vgg_like(4), unfreeze="classifier", phases=each)
    make(resnet_like(), unfreeze="classifier", phases=each)  # whose classifier block is the head


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


def falls(curve, *, warmup=5, length=20, epoch=10):
    """Steps of a phase at which a falling curve falls, after its warm-up."""
    each = {"lr": 1.0, "duration": length, "warmup": warmup, "curve": curve}
    phase = make(samples=32 * epoch, unfreeze="all", phases={"each": each}).phases[0]
    rates = [phase.rates(t)["fc"] for t in range(length)]
    assert rates[:warmup] == [(t + 1) / warmup for t in range(warmup)]
    return [t for t in range(1, length) if rates[t] < rates[t - 1]]


@pytest.mark.parametrize(
    ("at", "steps"),
    [(["90%"], [18]), (["50%"], [10]), ([10], [10]), (["1ep"], [10]), (["50%", "1.9ep", 12], [10, 12, 19]), ([5], [5])],
)
def test_places_of_a_curve_are_counted_from_the_start_of_the_phase_in_every_unit(at, steps):
    assert falls({"name": "multi_step", "at": at}) == steps


@pytest.mark.parametrize(
    ("every", "steps"), [(6, [6, 12, 18]), ("30%", [6, 12, 18]), ("0.6ep", [6, 12, 18]), (5, [5, 10, 15])]
)
def test_a_step_curve_falls_at_multiples_of_the_phase(every, steps):
    assert falls({"name": "step", "every": every}) == steps


@pytest.mark.parametrize(
    ("curve", "message"),
    [
        (
            {"name": "multi_step", "at": ["50%", "100%"]},
            r"100% is step 20 of the phase, whose last is step 19: never reached",
        ),
        ({"name": "multi_step", "at": [25]}, "25 steps is step 25 of the phase, whose last is step 19: never reached"),
        ({"name": "multi_step", "at": ["20%"]}, "20% is step 4 of the phase, within its warm-up of 5 steps"),
        ({"name": "multi_step", "at": []}, "at least 1 item"),
        ({"name": "step", "every": 0}, "a period of nothing"),
    ],
)
def test_places_that_are_never_reached_or_within_the_warm_up_are_refused(curve, message):
    with pytest.raises(UserError, match=message):
        falls(curve)


def test_multiples_of_a_period_within_the_warm_up_have_passed():
    """timm's EfficientNet: a fall of 0.97 every 2.4 epochs, a warm-up of 3."""
    each = {"lr": 1.0, "duration": "8ep", "warmup": "3ep", "curve": {"name": "step", "every": "2.4ep", "gamma": 0.97}}
    phase = make(samples=320, unfreeze="all", phases={"each": each}).phases[0]
    rates = [phase.rates(t)["fc"] for t in range(80)]
    assert rates[29:48] == [1.0] + [0.97] * 18
    assert rates[48:72] == pytest.approx([0.97**2] * 24)
    assert rates[72:] == pytest.approx([0.97**3] * 8)


def test_a_period_that_is_longer_than_one_of_the_phases_is_said():
    each = {"lr": 0.01, "curve": {"name": "step", "every": "7ep"}, "norm": "norms_fixed"}
    phases = {"each": each, "feature_extraction": {"duration": "5ep"}, "fine_tuning": {"duration": "20ep"}}
    plan = make(samples=320, phases=phases, data={"train": "x", "val": "y", "batch": 32})
    assert plan.warnings == (
        "phases.feature_extraction: the curve (step) does something every 7ep, which is not shorter than the phase: "
        "it never comes to that",
    )
    assert {plan.phases[0].rates(t)["fc"] for t in range(50)} == {0.01}
    assert [t for t in range(51, 250) if plan.lr(plan.layers.head, t) < plan.lr(plan.layers.head, t - 1)] == [
        120, 190,
    ]  # fmt: skip


def test_without_a_warm_up_the_first_step_is_no_place_to_fall():
    with pytest.raises(UserError, match="0 steps is step 0 of the phase, its first: the rate has not risen yet"):
        falls({"name": "multi_step", "at": [0]}, warmup=0)


def test_lengths_and_places_of_an_own_curve_arrive_counted():
    over = {"each": {"lr": 1.0, "duration": 20, "warmup": 5, "curve": {"name": "test_plan:recorded", "hold": "25%"}}}
    over["each"]["curve"] |= {"place": "50%", "places": {"a": "80%"}, "every": "35%"}
    make(samples=320, unfreeze="all", phases=over)
    assert RECORDED == {"steps": 15, "hold": 5, "place": 5, "places": {"a": 11}, "every": [2, 9]}


RECORDED: dict = {}


def recorded(step, steps, *, hold: Steps, place: Point, places: dict[str, Point], every: Period):
    RECORDED.update(steps=steps, hold=hold, place=place, places=places, every=list(every))
    return 1.0


def test_a_warm_up_of_all_steps_but_one_leaves_the_curve_its_first_value():
    for curve in ("cosine", "linear", "one_cycle"):
        each = {"lr": 1.0, "duration": 4, "warmup": 3, "curve": curve}
        phase = make(samples=320, unfreeze="all", phases={"each": each}).phases[0]
        assert [phase.rates(t)["fc"] for t in range(4)] == [1 / 3, 2 / 3, 1.0, 1.0]


def test_intervals_are_of_the_plan_as_it_was_planned():
    over = {"each": {"lr": 1.0}, "fine_tuning": {"duration": "2ep"}}
    over["feature_extraction"] = {"duration": {"max": "10ep", "patience": 2}}
    whole = make(samples=320, phases=over)
    cut = make(samples=320, phases=over, ends={"feature_extraction": 30})
    assert (whole.steps, cut.steps, whole.planned, cut.planned) == (120, 50, 120, 120)
    for every, steps in (
        (Duration(10, "%"), 12),
        (Duration(0.5, "ep"), 5),
        (Duration(7, "steps"), 7),
        (Duration(0.1, "%"), 1),
    ):
        assert whole.interval(every) == cut.interval(every) == steps


def test_percent_is_of_the_whole():
    over = {"duration": "20ep", "phases": {"feature_extraction": {"duration": "25%"}, "fine_tuning": {"duration": 77}}}
    over["phases"]["each"] = {"lr": 0.1}
    plan = make(samples=320, **over)
    assert [(p.start, p.stop) for p in plan.phases] == [(0, 50), (50, 127)]
    with pytest.raises(UserError, match="is a percentage, and the whole"):
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
    over = {"data": {"train": "x", "val": "y", "batch": batch}, "loop": {"micro_batch": micro}}
    if refused:
        with pytest.raises(UserError, match=r"data\.drop_last=true"):
            make(samples=samples, world=world, **over)
    else:
        assert any("depend on the micro-batch" in w for w in make(samples=samples, world=world, **over).warnings)
    fixed = {"each": {"lr": 0.1, "duration": "1ep", "norm": "norms_fixed"}}
    assert not make(samples=samples, world=world, phases=fixed, **over).warnings


OWN = {"name": "explicit", "phases": [{"name": "own", "layers": {"*": "all"}}]}


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"phases": {"fine_tunning": {"lr": 1}}}, 'no phase "fine_tunning"; did you mean "fine_tuning"'),
        ({"phases": {"each": {"lr": 1}}, "unfreeze": OWN}, "no duration"),
        ({"phases": {"each": {"duration": 3}}, "unfreeze": OWN}, "no learning rate"),
        ({"phases": {"each": {"duration": 3}}, "optimizer": "sgd"}, r"no learning rate.*adamw and adam have default"),
        (
            {"phases": {"each": {"lr": 1, "duration": "3ep", "warmup": "3ep"}}},
            r"fills the phase of 12 \(3ep\)\n  -> a longer duration .*each.warmup=0|fills the phase",
        ),
        ({"data": {"train": "x", "batch": 2}, "ranks": 4}, "cannot be split across 4 ranks"),
    ],
)
def test_what_a_plan_refuses(over, message):
    over = dict(over)
    world = over.pop("ranks", 1)
    with pytest.raises(UserError, match=message):
        make(world=world, **over)


def fails(step, steps):
    return 1 / (5 - step)


def falls_below(step, steps):
    return 1.0 - step


def nan(step, steps):
    return float("nan") if step == 3 else 1.0


def word(step, steps):
    return "0.5"


def nought(step, steps):
    return 0.0


def list_of_names(layers):
    return ["head"]


def unknown_layer(layers):
    return [Assignment("one", {"layer9": "all"})]


def unknown_mode(layers):
    return [Assignment("one", {"fc": "al"})]


def worded_duration(layers):
    return [Assignment("one", {"fc": "all"}, "2ep")]


def one_name_twice(layers):
    return [Assignment("one", {"fc": "all"}), Assignment("one", {"fc": "all"})]


def broken(layers):
    raise KeyError("stage9")


def negative(layers):
    return dict.fromkeys(layers.names, -0.1)


def infinite(layers):
    return dict.fromkeys(layers.names, float("inf"))


def unknown_factor(layers):
    return dict.fromkeys(layers.names, 1.0) | {"layer9": 1.0}


def zeros(layers):
    return dict.fromkeys(layers.names, 0.0)


@pytest.mark.parametrize(
    ("group", "part", "message"),
    [
        (
            "curve",
            "fails",
            r"curve test_plan:fails fails at step 5 of 20 of the phase: ZeroDivisionError.*test_plan\.py",
        ),
        ("curve", "falls_below", "curve test_plan:falls_below gives -1.0 at step 2 of 20"),
        ("curve", "nan", "curve test_plan:nan gives nan at step 3 of 20"),
        ("curve", "word", "curve test_plan:word gives 0.5 at step 0 of 20.*a finite factor"),
        ("curve", "nought", "curve test_plan:nought gives 0 at every step: nothing would train"),
        ("unfreeze", "list_of_names", r"returned \['str'\][\s\S]*list of tlx.plan.unfreeze.Assignment"),
        ("unfreeze", "unknown_layer", r"names layers that are not there: \['layer9'\]; did you mean \"layer4\""),
        ("unfreeze", "unknown_mode", 'gives layer fc the mode al; did you mean "all"'),
        ("unfreeze", "worded_duration", "the duration 2ep is not a tlx.base.durations.Duration"),
        ("unfreeze", "one_name_twice", "each with a name of its own"),
        ("unfreeze", "broken", r"unfreeze test_plan:broken fails: KeyError: 'stage9' \(test_plan\.py"),
        ("layer_decay", "broken", r"layer_decay test_plan:broken fails: KeyError: 'stage9' \(test_plan\.py"),
        ("layer_decay", "negative", "layer_decay test_plan:negative gives layer conv1 the factor -0.1"),
        ("layer_decay", "infinite", "gives layer conv1 the factor inf"),
        (
            "layer_decay",
            "unknown_factor",
            r"factors for layers that are not there: \['layer9'\]; did you mean \"layer4\"",
        ),
        ("layer_decay", "list_of_names", "returned list; it must return a dictionary"),
        ("layer_decay", "zeros", "nothing trains in this phase: the layer decay gives every layer"),
    ],
)
def test_an_own_part_that_returns_the_wrong_thing_is_named(group, part, message):
    named = f"test_plan:{part}"
    each = {"lr": 0.1, "duration": 20, **({group: named} if group != "unfreeze" else {})}
    with pytest.raises(UserError, match=message):
        make(samples=320, unfreeze=named if group == "unfreeze" else "all", phases={"each": each})


def test_a_curve_that_outgrows_floats_is_refused_with_the_step():
    each = {"lr": 0.1, "duration": 400, "curve": {"name": "step", "every": 1, "gamma": 1e10}}
    with pytest.raises(UserError, match="curve step fails at step 31 of 400 of the phase: OverflowError"):
        make(samples=320, unfreeze="all", phases={"each": each})


def below_zero_once(step, steps):
    return -0.5 if step == 1000 else 1.0


def test_a_value_that_the_plan_has_not_looked_at_is_refused_when_it_is_due():
    """Gradients are not climbed."""
    each = {"lr": 0.1, "duration": 5000, "warmup": 100, "curve": "test_plan:below_zero_once"}
    phase = make(samples=320, unfreeze="all", phases={"each": each}).phases[0]
    assert phase.rates(1099)["fc"] == 0.1
    with pytest.raises(
        UserError, match=r"curve test_plan:below_zero_once gives -0\.5 at step 1100 of 5000 of the phase"
    ):
        phase.rates(1100)


def warned(**over):
    data = {"train": "x", "val": "y", "batch": 32}
    each = {"lr": 0.01, "duration": "2ep", "norm": "norms_fixed"}
    raw = {"unfreeze": "all", "data": data, **over, "phases": {"each": {**each, **over.get("each", {})}}}
    raw.pop("each", None)
    return "\n".join(make(samples=3200, **raw).warnings)


def test_what_is_hardly_meant_is_warned_of():
    assert warned() == ""
    assert "no validation data (data.val)" in warned(data={"train": "x", "batch": 32})
    said = warned(each={"duration": 8})
    assert 'phases.each.duration: 8 is 8 steps, less than an epoch (100 steps); did you mean "8ep"?' in said
    assert 'If not, write "8 steps"' in said
    assert 'duration: 24 is 24 steps, less than an epoch (100 steps); did you mean "24ep"?' in warned(
        duration=24, each={"duration": "100%"}
    )
    assert "100 is 100 steps, one epoch; did you mean" in warned(each={"duration": 100})
    assert "150 is 150 steps, 1.5 epochs of 100 steps; did you mean" in warned(each={"duration": 150})
    further = {"more": {"duration": 8}}
    assert warned(further=further).startswith("further.more.duration: 8 is 8 steps, less than an epoch (100 steps);")
    for meant in ("8 steps", "100 steps", 201, "0.5ep"):
        assert warned(each={"duration": meant}) == ""
    assert "8 is 8 steps" in warned(each={"duration": {"max": 8}})


@pytest.mark.parametrize(
    ("over", "said"),
    [
        (
            {"checkpoint": {"keep": {"every": "3ep"}}},
            "checkpoint.keep.every: 3ep is longer than the whole training (200 steps, 2 epochs of 100 steps): no "
            "checkpoint is kept for good by it; set a shorter one, or leave it out",
        ),
        ({"checkpoint": {"every": 201}}, "checkpoint.every: 201 steps is longer than the whole training (200 steps"),
        ({"evaluate": {"every": "50ep"}}, "validation runs only at the end of each phase"),
        ({"track": {"every": 500}}, "track.every: 500 steps is longer than the whole training"),
        # evaluated at steps 50, 100, 150 and at the last, 200, where there is nothing left to stop
        ({"evaluate": {"every": 50, "patience": 2}}, None),
        (
            {"evaluate": {"every": 50, "patience": 3}},
            "evaluate.patience: 3 never stops a phase early: that takes 4 evaluations, and no phase has more than "
            "3 evaluations before its last step; set a smaller patience, or evaluate more often (evaluate.every)",
        ),
        ({"each": {"duration": {"max": "5ep", "patience": 3}}}, None),
        (
            {"each": {"duration": {"max": "4ep", "patience": 3}}},
            "phases.fine_tuning.duration.patience: 3 never ends the phase early: that takes 4 evaluations, and the "
            "phase has 3 evaluations before its last step",
        ),
        ({"mix": {"prob": 0.5}}, "mix: nothing is mixed, since mixup and cutmix are both 0"),
        ({"loop": {"sync_batchnorm": True}}, "loop.sync_batchnorm: does nothing here"),
        ({"loop": {"nonfinite": {"limit": 3}}}, "loop.nonfinite.limit: does nothing with policy stop"),
        ({"loop": {"nonfinite": {"policy": "skip", "limit": 3}}}, None),
        ({"checkpoint": {"every": "2ep", "keep": {"every": "200 steps"}}, "track": {"every": 200}}, None),
        ({"each": {"duration": "3 steps"}}, None),  # nothing was said of the intervals
    ],
)
def test_settings_without_any_effect_are_told(over, said):
    text = warned(**over)
    assert said in text if said else text == ""
    assert len(text.splitlines()) == (1 if said else 0), text


@pytest.mark.parametrize(
    ("optimizer", "lr", "said"),
    [
        ("adamw", 30, True),
        ("adamw", 0.1, False),
        ("adam", 0.2, True),
        ("rmsprop", 0.2, True),
        ("sgd", 10, False),
        ("sgd", 30, True),
    ],
)
def test_a_rate_that_cannot_be_meant(optimizer, lr, said):
    text = warned(optimizer=optimizer, each={"lr": lr})
    assert (f"the learning rate reaches {lr}, and {optimizer} hardly ever trains above" in text) == said
    assert (text == "") == (not said)
    assert "is 1e-09 at most" in warned(each={"lr": 1e-9})


def test_the_rate_that_counts_is_the_one_that_is_reached():
    table = {"name": "table", "rates": {"head": 20}}
    assert "reaches 0.2, and adamw" in warned(each={"lr": 0.01, "layer_decay": table})
    assert warned(each={"lr": 0.01, "layer_decay": {"name": "table", "rates": {"head": 5}}}) == ""


def test_what_several_phases_have_in_common_is_said_once():
    said = warned(unfreeze={"name": "gradual", "every": 2, "step": 3}, each={"lr": 30, "duration": None}).splitlines()
    assert said[0].startswith("unfreeze.every: 2 is 2 steps, less than an")
    assert said[1].startswith("phases.head, phases.from_layer2, phases.from_conv1: the learning rate reaches 30")
    assert len(said) == 2


def test_percentages_that_are_not_the_whole():
    phases = {"feature_extraction": {"duration": "25%"}, "fine_tuning": {"duration": "50%"}, "each": {"lr": 0.01}}
    data = {"train": "x", "val": "y", "batch": 32}
    said = make(samples=320, duration="20ep", phases=phases, data=data).warnings
    assert (
        "the phases add up to 150 steps, 75% of duration: 20ep (200 steps): feature_extraction 25%, fine_tuning 50%; "
        "training ends after 150 steps" in said
    )
    phases["fine_tuning"] = {"duration": "75%"}
    assert not any("add up" in w for w in make(samples=320, duration="20ep", phases=phases, data=data).warnings)
    more = {"more": {"duration": "10ep"}}  # after the whole, of which it is no part
    made = make(samples=320, duration="20ep", phases=phases, data=data, further=more)
    assert made.steps == 300
    assert not any("add up" in w for w in made.warnings)
    phases["fine_tuning"] = {"duration": "50%"}
    made = make(samples=320, duration="20ep", phases=phases, data=data, further=more)
    assert any("add up to 150 steps, 75% of duration" in w and "ends after 250 steps" in w for w in made.warnings)
    thirds = {"each": {"lr": 0.01, "duration": "33.3333%"}}
    schedule = {"name": "explicit", "phases": [{"name": n, "layers": {"head": "all"}} for n in "abc"]}
    plan = make(samples=320, duration="20ep", phases=thirds, unfreeze=schedule, data=data)
    assert (plan.steps, plan.warnings) == (201, ())


def test_layers_that_are_left_behind():
    decay = {"name": "exponential", "factor": 0.1}  # over 6 depths: 1e-6 at conv1, 1e-5 at bn1
    assert (
        "phases.fine_tuning: the layer decay (exponential) leaves conv1 1e-06 of the rate, and 2 of 7 layers less than "
        "0.0001" in warned(each={"layer_decay": decay, "norm": "frozen_is_frozen"})
    )
    assert warned(each={"layer_decay": {"name": "exponential", "factor": "1/3"}}) == ""
    assert "leaves conv1 0 of the rate" in warned(each={"layer_decay": {"name": "linear", "ratio": 0}})


def test_curves_that_are_out_for_most_of_the_phase():
    assert "the curve (step) is below 0.0001 of the rate for 75% of the phase" in warned(
        each={"curve": {"name": "step", "every": "5%"}}
    )
    assert warned(each={"curve": "cosine"}) == warned(each={"curve": "one_cycle"}) == ""


def test_the_plan_is_printable_and_plain_data():
    plan = make()
    text = timetable(plan)
    for shown in ("feature_extraction", "16", "193 steps per epoch", "fc (head)", "3.333e-05", "1.372e-07"):
        assert shown in text
    assert json.loads(json.dumps(plan.data()))["phases"][1]["layers"]["layer4"]["lr"] == pytest.approx(1e-4 / 3)


SCHEDULES = [
    "head_only",
    "classifier",
    "all",
    "two_phase",
    {"name": "two_phase", "first": "classifier"},
    {"name": "last_n", "n": 2},
    {"name": "gradual", "every": "2ep"},
    {"name": "gradual", "every": 7, "last": "1.7ep", "step": 2, "first": "classifier"},
    "norms_only",
    "biases_only",
    {
        "name": "explicit",
        "phases": [
            {"name": "a", "layers": {"head": "all"}},
            {"name": "b", "layers": {"*": "norms", "head": "all"}, "duration": "33.3333%"},
            {"name": "c", "layers": {"*[024]": "biases", "backbone": "all"}, "duration": 5},
        ],
    },
]
DECAYS = [
    "none",
    {"name": "exponential", "factor": "1/3"},
    {"name": "exponential", "factor": 0.7},
    {"name": "linear", "ratio": 0.001},
    {"name": "groups", "body": "1/7"},
    {"name": "table", "rates": {"*": 0.1, "*1": "1/3", "head": 2}, "rest": 0.3},
]
CURVES = [
    "constant",
    {"name": "cosine", "final": 0.01},
    "linear",
    {"name": "step", "every": "0.7ep"},
    {"name": "step", "every": "45%", "gamma": "1/3"},
    {"name": "multi_step", "at": ["0.5ep", 9, "70%"]},
    {"name": "multi_step", "at": ["61.2345%", "90%"], "gamma": 0.3},
    "one_cycle",
]
DURATIONS = ["3ep", "2.123456789ep", 41, "12.3456789%", {"max": "4.5ep", "patience": 2, "min_delta": 0.1 + 0.2}]
OWN_POLICY = {
    "frozen": {"statistics": "fixed", "affine": "trained"},
    "trained": {"statistics": "moving", "affine": "frozen"},
}
PHASES = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-9, 10, exclude_min=True),
        "duration": st.sampled_from(DURATIONS),
        "warmup": st.sampled_from([0, 3, "0.3ep", "10%"]),
        "curve": st.sampled_from(CURVES),
        "layer_decay": st.sampled_from(DECAYS),
        "norm": st.sampled_from(["frozen_is_frozen", "norms_train", "statistics_fixed", OWN_POLICY]),
        "stochastic": st.sampled_from(["off_in_frozen", "on"]),
        "optimizer_state": st.sampled_from(["keep", "reset"]),
        "start_from": st.sampled_from(["last", "best"]),
    }
)


def written(asked, plan):
    return parse(yaml.safe_load(written_out(asked, plan, command="tlx plan")))


def same(a, b):
    """But for warnings, some of which are about how a number is written."""
    assert {**a.data(), "warnings": None} == {**b.data(), "warnings": None}
    assert a.explicit() == b.explicit()
    for one, other in zip(a.phases, b.phases, strict=True):
        assert (one.norm, one.plateau is None, one.length) == (other.norm, other.plateau is None, other.length)
        assert all(one.trained(y) == other.trained(y) for y in a.layers)
        assert all(one.rates(t) == other.rates(t) for t in {*range(one.start, one.stop, 5), one.stop - 1})


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.filter_too_much],
)
@given(each=PHASES, own=PHASES, layers=st.sampled_from([resnet_like(), vgg_like(8)]))
def test_the_schedule_written_out_is_the_same_plan(schedule, each, own, layers):
    norms_learn = OWN_POLICY not in (each["norm"], own["norm"]) and any(y.norms for y in layers)
    assume(norms_learn or "norms" not in str(schedule))  # or the schedule has no effect
    last = unfreeze_names(schedule, layers)[-1]
    if "gradual" in str(schedule):  # which says itself how long its phases last
        del each["duration"]
    asked = config(unfreeze=schedule, duration="11ep", phases={"each": each, last: own})
    try:
        plan = Plan.make(asked, layers, samples=333)
    except UserError as error:
        assume("never reached" not in str(error) and "not risen" not in str(error))  # a short phase with this curve
        raise
    again = written(asked, plan)
    same(Plan.make(again, layers, samples=333), plan)
    assert written(again, plan) == again
    ends = {plan.phases[0].name: plan.phases[0].stop - 1}
    same(Plan.make(again, layers, samples=333, ends=ends), Plan.make(asked, layers, samples=333, ends=ends))


def unfreeze_names(schedule, layers):
    said = {"name": schedule} if isinstance(schedule, str) else schedule
    arguments = {key: value for key, value in said.items() if key != "name"}
    function = plug.find("unfreeze", said["name"])
    return [a.name for a in function(layers, **plug.arguments(function, arguments, label="unfreeze"))]


def test_a_dumped_configuration_makes_the_same_plan_to_the_last_digit():
    for duration in DURATIONS:
        asked = config(duration="11.00000001ep", phases={"each": {"lr": 0.1, "duration": duration}})
        again = parse(yaml.safe_load(dump(asked)))
        assert again.settings("each") == asked.settings("each")
        assert again.duration == asked.duration


def test_layers_whose_names_are_patterns_or_roles_are_written_so_that_each_means_itself():
    names = ["a0", "a[0]", "a*", "head", "classifier"]
    layers = LayerMap((*(layer(n, i) for i, n in enumerate(names)), layer("head.fc", 5, role="head")))
    by_name = {y.name: y for y in layers}
    assert [layers.match(layers.only(y)) for y in layers] == [(y,) for y in layers]
    assert by_name["a[0]"] in layers.match("a[0]")
    decay = {"name": "table", "rates": {layers.only(y): 1 / (i + 3) for i, y in enumerate(layers)}}
    for trained in names:
        phases = [{"name": "x", "layers": {layers.only(by_name[trained]): "all"}}]
        asked = config(
            unfreeze={"name": "explicit", "phases": phases},
            phases={"each": {"duration": 9, "lr": 0.1, "layer_decay": decay}},
        )
        plan = Plan.make(asked, layers, samples=333)
        assert [n for n, mode in plan.phases[0].trains.items() if mode == "all"] == [trained]
        same(Plan.make(written(asked, plan), layers, samples=333), plan)


def test_what_is_written_out_says_everything_and_is_for_people():
    curve = {"name": "multi_step", "at": ["0.5ep", "50%", 3]}
    each = {"lr": 0.1, "curve": curve, "warmup": "0.2ep", "norm": OWN_POLICY}
    asked = config(unfreeze={"name": "gradual", "every": "2ep"}, phases={"each": each})
    plan = Plan.make(asked, resnet_like(), samples=320)
    text = written_out(asked, plan, command="tlx plan c.yaml\nrun: elsewhere\u2028run: elsewhere")
    raw = yaml.safe_load(text)
    assert raw["run"] == "runs/x"
    assert "10 steps are an epoch" in text
    assert not any(mark in text for mark in ("&id", "*id", "!!"))
    assert "each" not in raw["phases"]
    assert all(set(PhaseSettings.model_fields) == set(said) for said in raw["phases"].values())
    assert set(raw) == set(Config.model_fields)
    head = raw["phases"]["head"]
    assert (head["duration"], head["warmup"], head["curve"]["at"]) == ("20 steps", "2 steps", [5, 10, 3])
    assert raw["unfreeze"]["phases"][1]["layers"] == {"layer4": "all", "fc": "all"}
