"""The pieces of a training for a loop of one's own: backbone, plan, optimizer groups, steps.

Nothing here writes a file, catches a signal or talks to other processes; `tlx.fit` does all of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tlx.base.layers import LayerMap
from tlx.data.pixels.transforms import train_transform
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.stream import ShardStream
from tlx.data.stream.transfer import on_device
from tlx.models import Backbone
from tlx.plan.config import parse
from tlx.plan.plan import Phase, Plan
from tlx.train.data import DEFAULT_TRANSFORMS
from tlx.train.freeze import unfreeze
from tlx.train.optim import forget
from tlx.train.optim import parameter_groups as groups_of
from tlx.train.step import Normalise, set_rates

NO_DECAY = ("bias", "norm", "embedding", "scale")
"""Kinds of parameters without weight decay, as a configuration has them by default."""


@dataclass(frozen=True)
class Step:
    """A step of a plan, with its pictures.

    Attributes:
        number: from 0 over the whole plan.
        images: float32 [N, channels, H, W] on the network's device, normalised as its weights want them.
        labels: int64 [N].
    """

    number: int
    phase: Phase
    images: Tensor
    labels: Tensor


def make_plan(
    layers: LayerMap, *, samples: int, batch: int, phases: Mapping[str, Any], unfreeze: str | Mapping[str, Any] = "all"
) -> Plan:
    """Who trains when, at which rate, without a configuration of a whole run.

    Args:
        layers: of a backbone.
        samples: of an epoch.
        batch: samples of a step, over all processes.
        phases: as in a configuration: ``{"each": {"lr": 1e-3, "duration": "4ep", "layer_decay": 0.8}}``.
        unfreeze: a schedule by name, with arguments as a mapping: ``{"name": "gradual", "every": "1ep"}``.

    Raises:
        ConfigError: wrong keys or values, all of them.
        UserError: a schedule or phase that does not suit the layers.
    """
    data = {"train": "unused", "batch": batch}
    raw = {"run": "unused", "data": data, "backbone": {"name": "unused"}, "phases": phases, "unfreeze": unfreeze}
    return Plan.make(parse(raw), layers, samples=samples)


def parameter_groups(backbone: Backbone, *, no_decay: Sequence[Any] = NO_DECAY) -> list[dict[str, Any]]:
    """Groups for any torch optimizer, one for each layer and kind of parameter, with a rate of 0 until :func:`steps`
    sets it from the plan.

    Args:
        no_decay: kinds of parameters whose group has ``weight_decay: 0.0``.
    """
    return groups_of(backbone.module, backbone.layers, no_decay=no_decay)


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
    """Every step of a plan in order. At each phase's first step the network is frozen and thawed as the plan says, and
    set to training mode with its norms as their policy wants; before each step the optimizer's rates are written.

    Args:
        optimizer: over :func:`parameter_groups`.
        seed: of the order and the transforms.
        workers: processes that decode; 0 for none.
        transform: of a uint8 picture [channels, H, W] to one of the network's size; by default a random crop, resized,
            and a horizontal flip.

    Raises:
        UserError: a sample that cannot be read.
    """
    device = next(backbone.module.parameters()).device
    normalise = Normalise(backbone.input, device, channels_last=False)
    view = transform or train_transform([(part.name, part.args) for part in DEFAULT_TRANSFORMS], backbone.input)
    stream = ShardStream(
        shards, batch=plan.batch, seed=seed, transform=view, channels=backbone.input.channels, workers=workers,
        pin=device.type == "cuda",
    )  # fmt: skip
    for phase in plan.phases:
        unfreeze(backbone.module, phase, plan)
        forget(optimizer, plan.forgotten(phase))
        for batch in on_device(stream.batches(phase.start, phase.stop), device):
            set_rates(optimizer, phase, batch.step)
            torch.manual_seed(seed + batch.step)
            yield Step(batch.step, phase, normalise(batch.images), batch.labels)
