"""Device mistakes that show without a GPU: whole steps and evaluations on CUDA tensors without storage.

What was left on the CPU, or a value that the host would have to wait for, raises there. Gradients are made up, since a
backward pass needs a driver.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from updates import classifying

from tlx import models
from tlx.data.pixels.normalise import Normalise
from tlx.data.stream.mix import Mix
from tlx.data.stream.stream import Batch
from tlx.plan.config import parse
from tlx.plan.loop_config import EMA
from tlx.plan.plan import Plan
from tlx.ranks.collectives import World
from tlx.tasks import objectives
from tlx.train import optim
from tlx.train.averaging import MovingAverage
from tlx.train.evaluation import Span
from tlx.train.optim import parameter_groups
from tlx.train.step import Updater, prepare_phase, set_rates

CUDA = torch.device("cuda", 0)
CLASSES = 5
SAMPLES = 4
NETWORKS = [
    "timm/test_convnext",
    "torchvision/mobilenet_v2",
    "torchvision/resnet50",
    "torchvision/vgg11_bn",
    "torchvision/googlenet",
    "torchvision/swin_t",
    "torchvision/maxvit_t",
    "timm/efficientnet_b0",
    "timm/swin_tiny_patch4_window7_224",
    "timm/swinv2_tiny_window8_256",
    "timm/deit_tiny_distilled_patch16_224",
    "timm/mobilenetv3_large_100",
    "timm/eva02_tiny_patch14_224",
    "timm/mixer_s32_224",
    "timm/coatnet_nano_rw_224",
    "timm/regnety_002",
    "timm/hrnet_w18_small",
    "timm/densenet121",
]
HEADS = {
    "linear": {"dropout": 0.1},
    "mlp": {"hidden": [8], "norm": True, "dropout": 0.1},
    "concat_pool": {"hidden": [8]},
    "attention_pool": {},
    "cosine": {"dropout": 0.1},
}


class Driverless:
    """Enough of accelerate for one rank: autocast as on a GPU; gradients are as large as their parameters."""

    scaler = None

    def __init__(self, net: nn.Module, precision: str) -> None:
        self.net, self.dtype = net, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return torch.autocast("cuda", self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def backward(self, loss: torch.Tensor) -> None:
        assert loss.device == CUDA
        assert loss.shape == ()
        for parameter in self.net.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)


@pytest.fixture(autouse=True)
def _driven(monkeypatch):
    """As if there were a driver: autocast is on; the one fused kernel without a version for shapes is looked at."""

    def fused_sgd(*lists, found_inf, **_) -> None:
        assert all(tensor.device == CUDA for tensors in lists for tensor in tensors)
        assert found_inf.device == CUDA

    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch, "_fused_sgd_", fused_sgd)


def on_fake_gpu(
    name: str,
    *,
    head: str = "linear",
    optimizer: str = "adamw",
    precision: str = "bf16",
    change=lambda net: None,
    loss: str = "cross_entropy",
    **said,
) -> None:
    """Every phase's step, with a moving average, clipping and skipping, and an evaluation.

    Args:
        change: what is done to the network once it is loaded.
        said: arguments of the objective.
    """
    backbone = models.load(name, classes=CLASSES, weights="none", empty=True, head=head, head_args=HEADS.get(head, {}))
    if change is not None:
        change(backbone.module)
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = backbone.module.to_empty(device=CUDA)
        phases = {"each": {"lr": 0.1, "duration": 1, "norm": "statistics_move"}}
        raw = {"run": "x", "data": {"train": "x", "batch": SAMPLES}, "backbone": {"name": name}, "phases": phases}
        plan = Plan.make(parse({**raw, "unfreeze": "two_phase"}), backbone.layers, samples=SAMPLES)
        world = World(0, 1, CUDA, False, Driverless(net, precision))
        made = getattr(optim, optimizer)(parameter_groups(net, backbone.layers, no_decay=["norm"]))
        task = classifying(getattr(objectives, loss)([3] * CLASSES, **said), CLASSES, top_k=2)
        normalise = Normalise(backbone.input, CUDA, channels_last=True)
        ema = MovingAverage(net, EMA())
        updater = Updater(made, task, normalise, world, 0, clip=1.0, ema=ema, skips=True)
        pixels = (backbone.input.channels, *backbone.input.size)
        for phase in plan.phases:
            phase_model = prepare_phase(net, phase, plan, world=world, compiled=False)
            for mixed in (False, True):
                set_rates(made, phase, phase.start)
                tally, _, _ = updater.update(phase_model, phase.start, [pictures(pixels, mixed=mixed)])
                assert tally.device == CUDA
                assert tally.shape == (5,)
        evaluate(ema.module, updater, pictures(pixels), world, precision)


def pictures(shape: tuple[int, int, int], *, mixed: bool = False) -> Batch:
    images = torch.empty(SAMPLES + mixed, *shape, dtype=torch.uint8, device=CUDA)
    labels = torch.empty(SAMPLES, dtype=torch.int64, device=CUDA)
    box = torch.empty(SAMPLES, 4, dtype=torch.int64, device=CUDA)
    cut = torch.empty(SAMPLES, dtype=torch.bool, device=CUDA)
    mix = Mix(labels.clone(), labels, torch.empty(SAMPLES, device=CUDA), box, cut, {"label": labels}) if mixed else None
    return Batch(
        0, 0, 1, images, labels, torch.arange(SAMPLES), total=float(SAMPLES), mix=mix, targets={"label": labels}
    )


@torch.no_grad()
def evaluate(net: nn.Module, updater: Updater, batch: Batch, world: World, precision: str) -> None:
    net.train()
    net.eval()
    meter, span = updater.task.meter(world.device), Span()
    with world.autocast():
        logits = net(updater.normalise(batch.images))
    assert logits.shape == (SAMPLES, CLASSES)
    assert logits.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    torch.use_deterministic_algorithms(True)  # torchmetrics counts by comparing then, which shapes alone can do
    try:
        meter.update(logits, batch.targets, batch.ids)
    finally:
        torch.use_deterministic_algorithms(False)
    span.take(logits)


@pytest.mark.parametrize("head", HEADS)
def test_every_head(head):
    on_fake_gpu("timm/test_vit" if head == "attention_pool" else "timm/test_resnet", head=head)


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_every_head_on_another_network(head):
    on_fake_gpu("timm/test_convnext" if head in ("concat_pool", "attention_pool") else "timm/test_vit", head=head)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    on_fake_gpu(name)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "rmsprop"])  # adamw is everybody's
def test_every_optimizer(optimizer):
    on_fake_gpu("timm/test_resnet", optimizer=optimizer, precision="fp32")


@pytest.mark.parametrize(
    "said",
    [
        {"label_smoothing": 0.1},
        {"class_weights": "balanced"},
        {"class_weights": [0.0, 1.0, 2.0, 3.0, 4.0]},
        {"loss": "bce", "target_threshold": 0.2},
        {"loss": "focal", "class_weights": "balanced"},
        {"loss": "poly", "class_weights": "balanced"},
        {"loss": "logit_adjustment"},
    ],
    ids=str,
)
def test_every_objective(said):
    on_fake_gpu("toys:assisted", precision="fp16", **said)


class Forgetful(nn.Module):
    """Makes a tensor where nobody said on which device."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + torch.zeros(1)[0:1]


class Curious(Forgetful):
    """Looks at a value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x if x.sum() > 0 else -x)


@pytest.mark.parametrize(
    ("odd", "raised"),
    [(Forgetful, RuntimeError), (Curious, DataDependentOutputException)],
    ids=["forgetful", "curious"],
)
def test_what_would_fail_or_wait_on_a_gpu_is_found(odd, raised):
    def change(net: nn.Module) -> None:
        net.act1 = odd(net.act1)  # without parameters

    with pytest.raises(raised):
        on_fake_gpu("timm/test_resnet", change=change)
