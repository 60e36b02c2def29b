"""The plan: steps, phases, rates, what trains, and what it refuses."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from nets import layer, resnet_like, vgg_like

from tlx import plug
from tlx.config import Config, PhaseSettings, dump, parse
from tlx.errors import UserError
from tlx.layers import LayerMap
from tlx.plan import Plan
from tlx.plan_written import written_out
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
    over = {"data": {"train": "x", "val": "y", "batch": batch}, "loop": {"micro_batch": micro}}
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


SCHEDULES = [
    "head_only",
    "classifier",
    "all",
    "two_phase",
    {"name": "two_phase", "first": "classifier"},
    {"name": "last_n", "n": 2},
    {"name": "gradual", "every": "2ep"},
    {"name": "gradual", "every": 7, "last": "1.7ep", "step": 2},
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
