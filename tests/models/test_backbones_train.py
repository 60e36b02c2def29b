"""Any backbone really trains: a step of feature extraction and one of fine-tuning, with what the loop itself uses.

One small network for every module of timm and every family of torchvision, with random weights, 7 classes and a batch
of two, at its own image size or, where that takes long, a smaller one.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from backbone_cases import CASES
from nets import layer
from timm.models import model_entrypoint
from torch import nn
from torchvision.models import get_model_builder, list_models
from trainings import CLASSES, Training, alone, config_of, moved, values

from tlx.base.layers import LayerMap
from tlx.models.layers.kinds import is_norm
from tlx.plan.plan import Phase
from tlx.plan.unfreeze import head_only, two_phase
from tlx.train.answers import Answers
from tlx.train.evaluation import Validation, evaluate

QUICK = (
    "torchvision/resnet18",
    "torchvision/googlenet",
    "timm/convnext_zepto_rms",
    "timm/deit_tiny_distilled_patch16_224",
    "timm/levit_128s",
    "timm/mobilenetv3_small_050",
    "timm/resnetv2_18",
    "trainings:forked",
)

KNOWN_FAILURES: dict[str, str] = {}
"""Networks that do not train, with the reason. README quotes them."""

REDUCED = tuple(CASES)[::9]
"""Those that also train in bf16."""


def runs() -> list[Any]:
    """Every network in fp32, some in bf16, the quick ones in the quick tier."""
    params = []
    for name, precision in [*((n, "fp32") for n in CASES), *((n, "bf16") for n in REDUCED)]:
        marks = [pytest.mark.slow] if name not in QUICK else []
        if name in KNOWN_FAILURES:
            marks.append(pytest.mark.xfail(reason=KNOWN_FAILURES[name], strict=True))
        params.append(pytest.param(name, precision, id=f"{name}-{precision}", marks=marks))
    return params


@pytest.mark.parametrize(("name", "precision"), runs())
def test_a_step_of_each_phase(name, precision):
    case = CASES[name]
    config = config_of(name, batch=2, args=case.get("args"))
    training = Training.of(config, alone(precision), size=case.get("size"))
    extraction, tuning = training.plan.phases
    norms = {path for path, module in training.backbone.module.named_modules() if is_norm(module)}
    assert norms == {path for y in training.plan.layers for path in y.norms}
    check(training, extraction)
    check(training, tuning)


def check(training: Training, phase: Phase) -> None:
    """One step: what trains gets a finite gradient and moves; nothing else does but statistics that are meant to."""
    net, layers = training.backbone.module, training.plan.layers
    parameters, before = dict(net.named_parameters()), values(net)
    phase_model = training.prepare_phase(phase)
    idle = {p.name for y in layers for p in y.parameters if p.idle and phase.trains[y.name] == "all"}
    for parameter in idle:
        parameters[parameter].requires_grad_()  # so that one that is not idle at all shows
    loss, _, samples, nonfinite, _ = training.step(phase_model, phase, phase.start).tolist()
    assert torch.isfinite(torch.tensor(loss))
    assert (samples, nonfinite) == (2, 0)

    trained = {p.name for y in layers for p in phase.trained(y)}
    reached = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    assert reached.keys() == trained, f"{len(trained - reached.keys())} without a gradient, {reached.keys() - trained}"
    assert all(torch.isfinite(g).all() for g in reached.values())

    changed, statistics = moved(net, before), statistics_that_move(training, phase)
    assert changed <= trained | statistics
    assert changed & statistics or not statistics
    # AdamW's first step is lr * g / (|g| + eps): less than that is lost in rounding
    assert {n for n, g in reached.items() if g.abs().max() > 1e-8} <= changed
    if phase.name == "feature_extraction":
        head = {p.name for p in layers.head.parameters}
        inside = {n for n, _ in net.named_buffers() if n.rpartition(".")[0] in layers.head.modules}
        assert changed <= head | inside
        assert head <= changed


def statistics_that_move(training: Training, phase: Phase) -> set[str]:
    """Buffers of the norms whose statistics move in a phase, as the layer map has them."""
    norms = {n for y in training.plan.layers if phase.norm_state(y).statistics == "moving" for n in y.moving}
    return {n for n, _ in training.backbone.module.named_buffers() if n.rpartition(".")[0] in norms}


class Caching(nn.Module):
    """Computes from its weights once, as attention biases of LeViT and others are until the network trains again."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.kept = nn.Parameter(torch.zeros(CLASSES)), None

    def train(self, mode: bool = True) -> Caching:
        super().train(mode)
        if mode:
            self.kept = None
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kept is None or self.training:
            self.kept = 2 * self.weight
        return x.mean((1, 2, 3))[:, None] * 0 + self.kept


def test_an_evaluation_sees_the_weights_of_now():
    training = Training.of(config_of("trainings:forked", batch=2), alone(), size=64)
    updater = training.updater
    validation = Validation(
        lambda: [training.batch(0)], None, 2, "here", updater.task, updater.normalise, updater.world
    )

    def loss(net):
        return evaluate(net, validation, {}, lambda: 0, print, Answers(updater.task, range(2)))["loss"]

    net = Caching().eval()  # as the moving average of the weights always is
    before = loss(net)
    with torch.no_grad():
        net.weight[training.batch(0).labels] += 5
    assert loss(net) < before - 1


def test_an_evaluations_batches_are_always_full():
    training = Training.of(config_of("trainings:forked", batch=2), alone(), size=64)
    updater, given, rows = training.updater, training.batch(0), []
    net = Caching()
    net.register_forward_pre_hook(lambda _, args: rows.append(args[0]))

    def loss(batch):
        validation = Validation(lambda: [given], None, batch, "here", updater.task, updater.normalise, updater.world)
        return evaluate(net, validation, {}, lambda: 0, print, Answers(updater.task, range(2)))["loss"]

    assert loss(2) == loss(5)  # what fills it up is not counted
    assert [len(images) for images in rows] == [2, 5]
    assert torch.equal(rows[1][:2], rows[0])
    assert not rows[1][2:].any()


def test_the_head_is_the_new_part_even_where_a_pretrained_layer_is_called_head():
    layers = LayerMap((layer("stem", 0), layer("head", 1, role="classifier"), layer("head.fc", 1, role="head")))
    for schedule in (head_only, two_phase):
        assert [n for n, mode in schedule(layers)[0].trains.items() if mode != "frozen"] == ["head.fc"]


def test_every_module_of_timm_and_every_family_of_torchvision_is_here():
    tried = {model_entrypoint(n.removeprefix("timm/")).__module__ for n in CASES if n.startswith("timm/")}
    assert tried == {model_entrypoint(n).__module__ for n in timm.list_models()}
    families = {family(n.removeprefix("torchvision/")) for n in CASES if n.startswith("torchvision/")}
    assert families == {family(n) for n in list_models(module=torchvision.models)}


def family(name: str) -> str:
    return get_model_builder(name).__module__


def test_lists_name_cases():
    assert {*QUICK, *KNOWN_FAILURES} <= set(CASES)
