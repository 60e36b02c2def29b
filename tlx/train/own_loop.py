"""The pieces of a training for a loop of one's own: plan, optimizer groups, steps with their pictures, evaluation.

Nothing here writes a file, catches a signal or talks to other processes; `tlx.fit` does all of that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tlx.base.inputs import EVALUATION_BATCH
from tlx.base.layers import Kind, LayerMap
from tlx.data.pixels.decode import Channels
from tlx.data.pixels.normalise import Normalise
from tlx.data.pixels.transforms import eval_transform, train_transform
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.stream import ShardStream, evaluation_batches
from tlx.data.stream.transfer import on_device
from tlx.models import Backbone
from tlx.plan.config import parse
from tlx.plan.plan import Phase, Plan
from tlx.tasks.classification import ClassificationMeter
from tlx.train.data import DEFAULT_TRANSFORMS
from tlx.train.freeze import train_mode
from tlx.train.freeze import unfreeze as apply_phase
from tlx.train.optim import forget
from tlx.train.optim import parameter_groups as groups_of
from tlx.train.step import set_rates

NO_DECAY: tuple[Kind, ...] = ("bias", "norm", "embedding", "scale")
"""Kinds of parameters without weight decay, as a configuration has them by default."""


@dataclass(frozen=True)
class Step:
    """A step of a plan, with its pictures.

    Attributes:
        number: from 0 over the whole plan.
        images: float32 [N, channels, H, W] on the network's device, normalised as its weights want them.
        labels: int64 [N], positions in the shards' `classes`.
    """

    number: int
    phase: Phase
    images: Tensor
    labels: Tensor


def make_plan(
    layers: LayerMap,
    *,
    samples: int,
    batch: int,
    phases: Mapping[str, Mapping[str, object]],
    unfreeze: str | Mapping[str, object] = "all",
) -> Plan:
    """Who trains when, at which rate, without a configuration of a whole run.

    ``plan.phase(step).rates(step)`` is the rate of every layer at a step, by name; ``plan.steps`` how many there are.

    Args:
        layers: of a backbone.
        samples: of an epoch.
        batch: samples of a step; the last step of an epoch may have fewer.
        phases: settings by phase as in a configuration (configs/README.md), `each` for all of them:
            ``{"each": {"lr": 1e-3, "duration": "4ep", "layer_decay": {"name": "exponential", "factor": 0.8}}}``.
        unfreeze: a schedule by name, with arguments as a mapping: ``{"name": "gradual", "every": "1ep"}``.

    Raises:
        ConfigError: wrong keys or values, all of them.
        UserError: a schedule or phase that does not suit the layers.
    """
    data = {"train": "unused", "batch": batch}
    raw = {"run": "unused", "data": data, "backbone": {"name": "unused"}, "phases": phases, "unfreeze": unfreeze}
    return Plan.make(parse(raw, libraries=False), layers, samples=samples)


def parameter_groups(backbone: Backbone, *, no_decay: Sequence[Kind] = NO_DECAY) -> list[dict[str, object]]:
    """Groups for any torch optimizer, one for each layer and kind of parameter: ``params``, ``names``, ``layer``, and
    ``lr``, which is 0 until :func:`steps` or :func:`set_rates` writes it.

    Args:
        no_decay: kinds of parameters whose group has ``weight_decay: 0.0``.
    """
    return [dict(group) for group in groups_of(backbone.module, backbone.layers, no_decay=no_decay)]


def begin_phase(plan: Plan, phase: Phase, net: nn.Module, optimizer: Optimizer) -> None:
    """Freezes and thaws what a phase says: ``requires_grad``, training mode, the mode of norms; old gradients are
    cleared, and optimizer state is dropped where `optimizer_state` asks for it. :func:`steps` calls it.

    A network in DistributedDataParallel must be wrapped anew after it: the wrapper reduces the gradients of those
    parameters that required one when it was made.
    """
    apply_phase(net, phase, plan)
    forget(optimizer, plan.forgotten(phase))


def steps(
    plan: Plan,
    shards: Manifest,
    backbone: Backbone,
    optimizer: Optimizer,
    *,
    seed: int = 0,
    workers: int = 0,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Step]:
    """Every step of a plan in order. At a phase's first step :func:`begin_phase` is called, before each step
    :func:`set_rates`; the network is put into training mode as the phase wants it, whatever an evaluation or a
    ``train()`` in between has left, and torch is seeded for dropout.

    Args:
        optimizer: over :func:`parameter_groups`.
        seed: of the order and the transforms.
        workers: processes that decode; 0 for none.
        transform: of a uint8 picture [channels, height, width] to one of the network's size; by default a random crop,
            resized, and a horizontal flip.

    Raises:
        UserError: a sample that cannot be read.
    """
    net = backbone.module
    device = next(net.parameters()).device
    normalise = Normalise(backbone.input, device, channels_last=False)
    view = transform or train_transform([(part.name, part.args) for part in DEFAULT_TRANSFORMS], backbone.input)
    stream = ShardStream(
        shards,
        batch=plan.batch,
        seed=seed,
        transform=view,
        channels=cast(Channels, backbone.input.channels),
        workers=workers,
        pin=device.type == "cuda",
    )
    for phase in plan.phases:
        begin_phase(plan, phase, net, optimizer)
        for batch in on_device(stream.batches(phase.start, phase.stop), device):
            train_mode(net, phase, plan)
            set_rates(optimizer, phase, batch.step)
            torch.manual_seed(seed + batch.step)
            yield Step(batch.step, phase, normalise(batch.images), batch.labels)


@torch.no_grad()
def evaluate(
    backbone: Backbone, shards: Manifest, *, batch: int = EVALUATION_BATCH, workers: int = 0, top_k: int = 5
) -> dict[str, float]:
    """Exact metrics over shards: every sample counts once, resized and cropped as the network's weights want pictures
    (`backbone.input`). The network is left in evaluation mode.

    Args:
        batch: samples at once, always as many; numbers do not depend on it but for rounding.
        workers: processes that decode; 0 for none.

    Returns:
        ``loss`` (mean cross-entropy), ``top1`` and ``top5`` (shares of the samples, 0 to 1; top-k where there are more
        classes than k), ``samples``, and ``nonfinite``, samples with logits that are not finite, where there are any.

    Raises:
        UserError: a sample that cannot be read.
    """
    net = backbone.module
    device = next(net.parameters()).device
    normalise = Normalise(backbone.input, device, channels_last=False)
    loss = functools.partial(nn.functional.cross_entropy, reduction="sum")
    meter = ClassificationMeter(len(shards.classes), top_k=top_k, device=device, loss=loss)
    net.train()  # some networks compute from their weights once per evaluation mode, and forget it in training mode
    net.eval()
    batches = evaluation_batches(
        shards,
        batch=batch,
        transform=eval_transform(backbone.input),
        channels=cast(Channels, backbone.input.channels),
        workers=workers,
        pin=device.type == "cuda",
    )
    for each in on_device(batches, device):
        output = net(normalise(each.images, batch))
        logits = (output[0] if isinstance(output, tuple) else output)[: len(each.labels)]
        meter.update(logits, each.targets, each.ids)
    return {name: value for name, value in meter.result().items() if name != "per_class"}
