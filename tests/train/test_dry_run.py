"""One forward pass in each mode before training, the same in the plan: what does not run is a user's mistake."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from composed import composer
from images import make_shards
from torch import nn
from trainings import CLASSES, bits, config_of, values

from tlx import models
from tlx.base.errors import UserError
from tlx.base.inputs import InputSpec
from tlx.plan.config import parse
from tlx.plan.plan import Plan
from tlx.train import build
from tlx.train import components as parts
from tlx.train.dry_run import DryRun, largest, wrong_output


def dry_run(name: str, *, size: int, classes: int = CLASSES, empty: bool = True, **said: Any) -> DryRun:
    config = config_of(name, batch=4, **said)
    backbone = parts.backbone_of(config, CLASSES, empty=empty)
    plan = Plan.make(config, backbone.layers, samples=8)
    return DryRun(backbone, plan, dataclasses.replace(backbone.input, size=(size, size)), classes)


@pytest.mark.slow
def test_an_auxiliary_head_that_does_not_take_the_size_is_known_beforehand():
    fails = r"images of 224 x 224 in training mode \(phase fine_tuning\).*\n.*input.size: 299.*aux_logits: false"
    run = dry_run("torchvision/inception_v3", size=224)
    with pytest.raises(UserError, match=fails):
        run.on_shapes()
    assert dry_run("torchvision/inception_v3", size=299).on_shapes() is None
    alone = {"unfreeze": "head_only", "phases": {"each": {"lr": 1e-3, "duration": 1}}}
    assert dry_run("torchvision/inception_v3", size=224, **alone).on_shapes() is None  # where it does not run


def test_a_transformer_of_another_size_is_refused_with_both_remedies():
    with pytest.raises(UserError, match=r"288 x 288: .*\n.*input.size: 224, .*backbone.args: \{img_size: 288\}"):
        dry_run("timm/vit_tiny_patch16_224", size=288).on_shapes()
    assert dry_run("timm/vit_tiny_patch16_224", size=288, args={"img_size": 288}).on_shapes() is None
    assert dry_run("timm/resnet10t", size=288).on_shapes() is None


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("dry"), classes=3, per_class={"train": 4, "val": 2}, size=16)


def test_the_plan_refuses_what_training_refuses(shards, tmp_path, monkeypatch):
    size = {"input": {"size": 24}, "backbone": {"name": "toys:assisted", "weights": "none"}}
    said = "does not take images of 24 x 24 in training mode"
    raw = {
        "run": str(tmp_path / "run"),
        "data": {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 4},
        "phases": {"each": {"lr": 0.02, "duration": "2ep"}},
    }
    for memory in (False, True):
        with pytest.raises(UserError, match=said):
            build.plan(parse(raw | size), memory=memory)
    with pytest.raises(UserError, match=said):
        composer(shards, tmp_path / "run", monkeypatch)(**size)
    fits = size | {"input": {"size": 16}, "loop": {"gradient_checkpointing": True}}
    assert composer(shards, tmp_path / "other", monkeypatch)(**fits).plan.steps == 8


class Partial:
    """An objective from elsewhere that does with auxiliary logits what `does` says."""

    class_weights = None

    def __init__(self, does: str) -> None:
        self.does = does

    def loss(self, output: Any, labels: torch.Tensor, mix: Any) -> torch.Tensor:
        if self.does == "unpacks":
            output, _ = output if isinstance(output, tuple) else (output, None)
        elif self.does != "takes logits":
            output, *beside = output if isinstance(output, tuple) else (output,)
            if self.does == "adds":
                return self.evaluation_loss(output, labels) + sum(
                    0.4 * self.evaluation_loss(o, labels) for o in beside if o is not None
                )
            if self.does == "adds blindly" and beside:
                return self.evaluation_loss(output, labels) + self.evaluation_loss(beside[0], labels)
        return self.evaluation_loss(output, labels)

    def evaluation_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits, labels, reduction="sum")


def partial(counts: list[int], *, does: str) -> Partial:
    return Partial(does)


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("adds", None),
        ("takes logits", r"loss of \(logits, None\), as the network returns it in training mode, fails: TypeError"),
        ("ignores", r"loss of \(logits, auxiliary logits\).* has no gradient for output 1.*\n.*aux_weight"),
        ("unpacks", r"has no gradient for output 1"),
        ("adds blindly", r"loss of \(logits, None\).* fails: "),
    ],
)
def test_an_objective_takes_what_the_network_returns_in_training_mode(shards, tmp_path, monkeypatch, does, said):
    over = {
        "backbone": {"name": "toys:assisted", "weights": "none"},
        "objective": {"name": "test_dry_run:partial", "does": does},
    }
    raw = {
        "run": str(tmp_path / "run"),
        "data": {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 4},
        "input": {"size": 16},
        "phases": {"each": {"lr": 0.02, "duration": "2ep"}},
    }
    if said is None:
        assert build.plan(parse(raw | over))[0].steps == 12
        assert composer(shards, tmp_path / "run", monkeypatch)(**over).plan.steps == 8
        return
    with pytest.raises(UserError, match=said) as caught:
        build.plan(parse(raw | over))
    assert str(caught.value).startswith("objective test_dry_run:partial")
    with pytest.raises(UserError, match=said):
        composer(shards, tmp_path / "run", monkeypatch)(**over)


# What comes back


class Returns(nn.Module):
    """A network that returns what a test wants of it."""

    def __init__(self, what: Callable[[torch.Tensor, bool], Any]) -> None:
        super().__init__()
        self.fc, self.what, self.input = nn.Linear(3, CLASSES), what, InputSpec(size=(8, 8))

    def forward(self, x: torch.Tensor) -> Any:
        return self.what(self.fc(x.mean((2, 3))), self.training)


RETURNED: dict[str, tuple[Callable[[torch.Tensor, bool], Any], str | None]] = {
    "logits": (lambda x, _: x, None),
    "auxiliary": (lambda x, training: (x, 2 * x, None) if training else x, None),
    "a pair in both modes": (lambda x, _: (x, x), None),
    "a list": (lambda x, training: [x, x] if training else x, r"returns a list in training mode \(phase"),
    "a dict": (lambda x, training: {"logits": x} if training else x, "returns a dict in training mode"),
    "features beside": (lambda x, training: (x, x[:, :2]) if training else x, r"\(2, 2\) of float32 as auxiliary"),
    "fewer": (lambda x, training: x[:, :4] if training else x, r"\(2, 4\) of float32, needed is \(2, 7\)"),
    "answers": (lambda x, training: x.argmax(1) if training else x, r"\(2,\) of int64"),
}


@pytest.mark.parametrize("case", RETURNED)
def test_what_a_network_returns_is_looked_at_in_both_modes(case):
    what, said = RETURNED[case]
    backbone = models.adopt(Returns(what), ("fc",), name="mine", input=InputSpec(size=(8, 8)))
    plan = Plan.make(config_of("toys:small", batch=4), backbone.layers, samples=8)
    run = DryRun(backbone, plan, backbone.input, CLASSES)
    for tried in (run.on_shapes, lambda: run.on_device(torch.device("cpu"))):
        if said is None:
            assert tried() is None
        else:
            with pytest.raises(UserError, match=said) as caught:
                tried()
            assert "backbone mine" in str(caught.value)


def test_words_for_what_is_wrong():
    assert wrong_output(torch.zeros(2, 3), (2, 3), training=True) is None
    assert wrong_output((None, torch.zeros(2, 3)), (2, 3), training=True) == "None"
    assert wrong_output((), (2, 3), training=True) == "a tuple"
    assert wrong_output((torch.zeros(2, 3), "x"), (2, 3), training=False) is None  # only the logits are used


# Where shapes do not tell


class Curious(nn.Module):
    """Decides by values in training mode; `right` is what its training needs."""

    def __init__(self, classes: int, right: bool) -> None:
        super().__init__()
        self.fc, self.right, self.input = nn.Linear(3, classes), right, InputSpec(size=(8, 8))
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x.mean((2, 3)))
        if self.training and float(x.detach().sum()) > -1 and not self.right:
            x = x[:, :2]
        return self.fc(x)


def curious(classes: int, *, right: bool = True) -> nn.Module:
    return Curious(classes, right)


def test_what_needs_values_is_not_refused_by_the_plan_and_tried_by_training():
    cpu = torch.device("cpu")
    for right in (True, False):
        run = dry_run("test_dry_run:curious", size=8, args={"right": right}, empty=False)
        assert "in training mode" in (run.on_shapes() or "")
        before = values(run.backbone.module)
        if right:
            parts.try_network(run, cpu)
        else:
            with pytest.raises(UserError, match=r"does not take images of 8 x 8 in training mode"):
                parts.try_network(run, cpu)
        now = values(run.backbone.module)
        assert all(torch.equal(bits(now[n]), bits(t)) for n, t in before.items())  # BatchNorm's statistics too


def test_a_refusal_on_shapes_is_made_sure_of_with_values(monkeypatch):
    run = dry_run("toys:small", size=16, empty=False)
    monkeypatch.setattr(DryRun, "on_shapes", lambda self: (_ for _ in ()).throw(UserError("no")))
    parts.try_network(run, torch.device("cpu"))


def broken(error: type[BaseException]) -> DryRun:
    """A network that raises in training mode."""

    def what(x: torch.Tensor, training: bool) -> torch.Tensor:
        if training:
            raise error("stage9")
        return x

    backbone = models.adopt(Returns(lambda x, _: x), ("fc",), name="mine", input=InputSpec(size=(8, 8)))
    backbone.module.what = what
    plan = Plan.make(config_of("toys:small", batch=4), backbone.layers, samples=8)
    return DryRun(backbone, plan, backbone.input, CLASSES)


@pytest.mark.parametrize(
    ("error", "said"), [(KeyError, "KeyError: 'stage9'"), (AttributeError, "AttributeError: stage9")]
)
def test_whatever_a_network_raises_is_told_with_its_name_in_the_plan_and_in_training(error, said):
    run = broken(error)
    for tried in (run.on_shapes, lambda: parts.try_network(run, torch.device("cpu"))):
        with pytest.raises(UserError, match=r"in training mode \(phase") as caught:
            tried()
        assert caught.value.where == "backbone mine"  # its own size: input.size is not at fault
        assert said in str(caught.value)
    other = dataclasses.replace(run, spec=dataclasses.replace(run.spec, size=(9, 9)))
    with pytest.raises(UserError) as caught:
        other.on_device(torch.device("cpu"))
    assert caught.value.where == "input.size"


def test_a_key_that_stops_the_command_and_full_memory_are_no_fault_of_the_network():
    for error in (KeyboardInterrupt, torch.OutOfMemoryError):
        with pytest.raises(error):
            broken(error).on_device(torch.device("cpu"))


def test_nothing_is_left_behind():
    run = dry_run("timm/levit_128s", size=224, empty=False)  # which keeps what it has computed from its weights
    net = run.backbone.module
    before, modes = values(net), [m.training for m in net.modules()]
    drawn = torch.get_rng_state()
    assert run.on_shapes() is None
    now = values(net)
    assert all(t.device.type == "cpu" and torch.equal(bits(t), bits(before[n])) for n, t in now.items())
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), drawn)
    assert net.eval()(torch.zeros(1, 3, 224, 224)).device.type == "cpu"


def test_only_phases_that_run_most_are_tried():
    gradual = {"unfreeze": {"name": "gradual", "every": 1}, "phases": {"each": {"lr": 0.1}}}
    assert [p.name for p in largest(dry_run("timm/resnet10t", size=64, **gradual).plan)] == ["from_stem"]
    phases = [{"name": "a", "layers": {"head": "all"}}, {"name": "b", "layers": {"stem": "all"}}]
    apart = {"unfreeze": {"name": "explicit", "phases": phases}}
    assert [p.name for p in largest(dry_run("timm/resnet10t", size=64, **apart).plan)] == ["a", "b"]
    both = ["feature_extraction", "fine_tuning"]  # None stands for auxiliary logits in the one and not in the other
    assert [p.name for p in largest(dry_run("toys:assisted", size=16).plan)] == both
