"""Unfreeze schedules, curves and layer decay: pure functions, against numbers written by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from nets import layer, resnet_like, vgg_like

from tlx.base.durations import duration
from tlx.base.errors import TlxError, UserError
from tlx.base.layers import LayerMap
from tlx.plan import curves, layer_decay, unfreeze


def trained(assignment):
    return [name for name, mode in assignment.trains.items() if mode == "all"]


def test_two_phases():
    first, second = unfreeze.two_phase(resnet_like())
    assert (first.name, trained(first)) == ("feature_extraction", ["fc"])
    assert second.name == "fine_tuning"
    assert len(trained(second)) == 7
    assert trained(unfreeze.two_phase(vgg_like(), first="classifier")[0]) == ["classifier", "classifier.6"]


def test_classifier_and_last_n():
    assert trained(unfreeze.classifier(vgg_like())[0]) == ["classifier", "classifier.6"]
    assert trained(unfreeze.last_n(resnet_like(), n=1)[0]) == ["layer4", "fc"]
    assert trained(unfreeze.last_n(resnet_like(), n=0)[0]) == ["fc"]
    with pytest.raises(UserError, match="6 depths"):
        unfreeze.last_n(resnet_like(), n=7)


def test_gradual_thaws_from_the_head_down():
    phases = unfreeze.gradual(resnet_like(), every=duration("2ep"), last=duration("9ep"))
    assert [p.name for p in phases] == [
        "head", "from_layer4", "from_layer3", "from_layer2", "from_layer1", "from_bn1", "from_conv1",
    ]  # fmt: skip
    assert trained(phases[1]) == ["layer4", "fc"]
    assert [str(p.duration) for p in phases] == ["2ep"] * 6 + ["9ep"]
    two = unfreeze.gradual(resnet_like(), every=duration("1ep"), step=4)
    assert [p.name for p in two] == ["head", "from_layer1", "from_conv1"]


def attention_pooled():
    """A vision transformer whose last norm and pooling share the head's depth."""
    tops = [layer("norm", 2, norm=True), layer("pool", 2, role="classifier"), layer("head", 2, role="head")]
    return LayerMap((layer("embed", 0), layer("blocks.0", 1), *tops))


def test_the_head_thaws_before_the_rest_of_its_block():
    every = duration("1ep")
    phases = unfreeze.gradual(vgg_like(4), every=every)
    assert [(p.name, trained(p)) for p in phases] == [
        ("head", ["classifier.6"]),
        ("classifier", ["classifier", "classifier.6"]),
        ("from_features.2", ["features.2", "features.3", "classifier", "classifier.6"]),
        ("from_features.0", [*(f"features.{i}" for i in range(4)), "classifier", "classifier.6"]),
    ]
    together = unfreeze.gradual(vgg_like(4), every=every, first="classifier")
    assert [p.name for p in together] == ["head", "from_features.2", "from_features.0"]
    assert trained(together[0]) == ["classifier", "classifier.6"]
    two = unfreeze.gradual(vgg_like(4), every=every, step=2)
    assert [p.name for p in two] == ["head", "from_features.2", "from_features.0"]
    assert [trained(p) for p in unfreeze.gradual(attention_pooled(), every=every)][:2] == [
        ["head"], ["norm", "pool", "head"],
    ]  # fmt: skip
    assert trained(unfreeze.last_n(vgg_like(4), n=0)[0]) == ["classifier.6"]
    assert trained(unfreeze.last_n(vgg_like(4), n=1)[0]) == ["features.2", "features.3", "classifier", "classifier.6"]


def test_a_last_norm_thaws_with_the_head_where_nothing_is_between_them():
    vit = LayerMap((layer("embed", 0), layer("blocks.0", 1), layer("norm", 2), layer("head", 2, role="head")))
    phases = unfreeze.gradual(vit, every=duration("1ep"))
    assert [(p.name, trained(p)[0]) for p in phases] == [
        ("head", "norm"), ("from_blocks.0", "blocks.0"), ("from_embed", "embed"),
    ]  # fmt: skip
    assert trained(unfreeze.last_n(vit, n=0)[0]) == ["norm", "head"]
    assert trained(unfreeze.two_phase(vit)[0]) == trained(unfreeze.head_only(vit)[0]) == ["head"]


def test_norms_and_biases_only():
    assert unfreeze.norms_only(resnet_like())[0].trains == dict.fromkeys(
        ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"], "norms"
    ) | {"fc": "all"}
    assert unfreeze.biases_only(resnet_like())[0].trains["layer1"] == "biases"


def test_explicit_phases_take_patterns_and_later_ones_win():
    phases = [unfreeze.ExplicitPhase(name="one", layers={"layer*": "all", "layer1": "norms", "head": "all"})]
    (assignment,) = unfreeze.explicit(resnet_like(), phases=phases)
    assert assignment.trains == {"layer1": "norms", "layer2": "all", "layer3": "all", "layer4": "all", "fc": "all"}
    with pytest.raises(UserError, match='no layer matches "layer9"; did you mean "layer4"'):
        unfreeze.explicit(resnet_like(), phases=[unfreeze.ExplicitPhase(name="x", layers={"layer9": "all"})])


def test_exponential_decay_is_a_third_per_step_over_resnet():
    factors = layer_decay.exponential(resnet_like(), factor=1 / 3)
    assert [round(1 / factors[n]) for n in ("fc", "layer4", "layer3", "layer2", "layer1", "bn1", "conv1")] == [
        1, 3, 9, 27, 81, 243, 729,
    ]  # fmt: skip


def test_linear_decay_is_the_articles_over_vgg():
    factors = layer_decay.linear(vgg_like(), ratio=0.001)
    for i in (43, 20, 1, 0):
        assert factors[f"features.{i}"] * 1e-4 == pytest.approx(1e-4 + (1e-7 - 1e-4) / 44 * (44 - i), rel=1e-12)
    assert factors["features.0"] * 1e-4 == pytest.approx(1e-7)
    assert factors["classifier"] == factors["classifier.6"] == 1.0


def test_vit_decay_is_beits():
    blocks = [layer(f"blocks.{i}", i + 1) for i in range(12)]
    vit = LayerMap((layer("embed", 0), *blocks, layer("norm", 13), layer("head", 13, role="head")))
    factors = layer_decay.exponential(vit, factor=0.75)
    assert factors["head"] == factors["norm"] == 1
    assert factors["blocks.11"] == pytest.approx(0.75)
    assert factors["embed"] == pytest.approx(0.75**13)


def test_groups_and_table():
    assert layer_decay.groups(resnet_like())["layer4"] == 0.01
    assert layer_decay.groups(vgg_like())["classifier"] == 1.0
    table = layer_decay.table(resnet_like(), rates={"backbone": 0.1, "layer4": 0.5})
    assert (table["conv1"], table["layer4"], table["fc"]) == (0.1, 0.5, 1.0)
    with pytest.raises(UserError, match="no layer matches"):
        layer_decay.table(resnet_like(), rates={"stage4": 0.5})


def rates_of(scheduler, optimizer, steps):
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_curves_equal_torchs_schedulers():
    from torch.optim import lr_scheduler as torchs

    def sgd():
        return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)

    for make, curve in (
        (lambda o: torchs.CosineAnnealingLR(o, 50), lambda t: curves.cosine(t, 50)),
        (lambda o: torchs.StepLR(o, 7, 0.1), lambda t: curves.step(t, 50, every=range(7, 50, 7))),
        (lambda o: torchs.MultiStepLR(o, [20, 30]), lambda t: curves.multi_step(t, 50, at=[20, 30])),
        (lambda o: torchs.LinearLR(o, 1.0, 0.1, 50), lambda t: curves.linear(t, 50, final=0.1)),
        (lambda o: torchs.OneCycleLR(o, 1.0, total_steps=50), lambda t: curves.one_cycle(t, 50)),
    ):
        optimizer = sgd()
        expected = rates_of(make(optimizer), optimizer, 50)
        assert [curve(t) for t in range(50)] == pytest.approx(expected, abs=1e-9)
    assert curves.constant(3, 50) == 1.0


@pytest.mark.parametrize("steps", range(1, 60))
def test_a_cycle_of_any_length_has_a_top(steps):
    values = [curves.one_cycle(t, steps) for t in range(steps)]
    assert max(values) == 1.0 if steps <= 3 else max(values) > 0.8  # torch's top falls between two steps
    for rise in (0.0, 1.0):
        assert max(curves.one_cycle(t, steps, rise=rise) for t in range(steps)) == 1.0
    assert curves.cosine(0, steps) == curves.linear(0, steps) == 1.0


def test_short_cycles_by_hand():
    assert [curves.one_cycle(t, 1) for t in range(1)] == [1.0]
    assert [curves.one_cycle(t, 2) for t in range(2)] == pytest.approx([1.0, 4e-6])
    assert [curves.one_cycle(t, 3) for t in range(3)] == pytest.approx([1.0, (1 + 4e-6) / 2, 4e-6])


def test_a_layer_map_that_is_not_one_is_refused():
    with pytest.raises(TlxError, match="parameter in two places"):
        LayerMap((layer("a", 0), dataclasses.replace(layer("a", 1, role="head"), name="b")))
    with pytest.raises(TlxError, match="must not fall"):
        LayerMap((layer("a", 2), layer("b", 1, role="head")))
    with pytest.raises(TlxError, match="must be the head"):
        LayerMap((layer("a", 0),))
    with pytest.raises(TlxError, match=r"misses \['stray'\]"):
        resnet_like().verify([*(p.name for y in resnet_like() for p in y.parameters), "stray"])
