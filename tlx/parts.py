"""The parts of a training that compute: network, head, objective, optimizer, made from a configuration."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tlx import plug
from tlx.config import Config, Part
from tlx.errors import UserError
from tlx.feed import mixing_of
from tlx.layers import LayerMap
from tlx.plan import Plan

if TYPE_CHECKING:
    import torch

    from tlx.averaging import MovingAverage
    from tlx.inputs import InputSpec
    from tlx.models import Backbone
    from tlx.objectives import Objective
    from tlx.step import Normalise
    from tlx.trial import Trial
    from tlx.world import World


@dataclass(frozen=True)
class Parts:
    """What a training is composed of, but for what depends on how many samples a rank takes at once."""

    backbone: Backbone
    classes: int
    spec: InputSpec
    net: torch.nn.Module
    ema: MovingAverage | None
    objective: Objective
    optimizer: Any
    normalise: Normalise


def parts_of(config: Config, world: World, counts: Sequence[int]) -> Parts:
    """The network on its device, and what works on it.

    Args:
        counts: training samples of each class.

    Raises:
        UserError: the network does not take the input, or does not fit the memory.
    """
    import torch

    from tlx.recompute import recompute_blocks
    from tlx.step import Normalise
    from tlx.sync_norms import synchronise
    from tlx.trial import ran_out

    backbone = backbone_of(config, len(counts))
    spec = config.input.over(backbone.input)
    try:
        net = backbone.module.to(world.device)
        if config.loop.sync_batchnorm:
            synchronise(net, world)
        try_input(net, spec.size, len(counts), spec.channels)
        ema = average_of(net, config)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        what = f"the network alone does not fit the memory of {world.device}"
        raise UserError(what, where=config.backbone.name, todo="is the device free? Or a smaller backbone") from error
    if config.loop.gradient_checkpointing:
        recompute_blocks(net, backbone.blocks)
    if config.loop.channels_last:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Parts(
        backbone=backbone,
        classes=len(counts),
        spec=spec,
        net=net,
        ema=ema,
        objective=make("objective", config.objective, list(counts)),
        optimizer=optimizer_of(config, net, backbone.layers),
        normalise=Normalise(spec, world.device, channels_last=config.loop.channels_last),
    )


def backbone_of(config: Config, classes: int, *, empty: bool = False) -> Backbone:
    from tlx import models

    asked = config.backbone
    return models.load(
        asked.name,
        classes=classes,
        weights=asked.weights,
        args=asked.args,
        head=config.head.name,
        head_args=config.head.args,
        granularity=asked.layers,
        channels=config.input.channels,
        empty=empty,
    )


def make(group: str, part: Part, *given: Any) -> Any:
    """A pluggable part, called with what tlx gives and the user's checked arguments."""
    function = plug.find(group, part.name)
    return function(*given, **plug.arguments(function, part.args, label=f"{group} {part.name}"))


def try_input(net: torch.nn.Module, size: tuple[int, int], classes: int, channels: int = 3) -> None:
    """One image through the network, so that a size that it does not take is known before training.

    Raises:
        UserError: with what the network said.
    """
    import torch

    from tlx.trial import ran_out

    device = next(net.parameters()).device
    net.eval()
    try:
        with torch.no_grad():
            output = net(torch.zeros(1, channels, *size, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        if ran_out(error):
            raise
        raise UserError(
            f"the backbone does not take images of {size[0]} x {size[1]}: {str(error).splitlines()[0]}",
            where="input.size",
            todo="set input.size, or the backbone's own argument (img_size for most vision transformers)",
        ) from error
    logits = output[0] if isinstance(output, tuple) else output
    if logits.shape != (1, classes):
        raise UserError(
            f"the network gives {tuple(logits.shape)} where (1, {classes}) is needed", where="backbone, head"
        )


def average_of(net: torch.nn.Module, config: Config) -> MovingAverage | None:
    """The moving average of the weights, or None."""
    from tlx.averaging import MovingAverage

    return MovingAverage(net, config.loop.ema) if config.loop.ema is not None else None


def optimizer_of(config: Config, net: torch.nn.Module, layers: LayerMap) -> Any:
    from tlx.optim import parameter_groups

    return make("optimizer", config.optimizer, parameter_groups(net, layers, no_decay=config.no_decay))


def trial_of(config: Config, world: World, parts: Parts, made: Plan, *, ranks: int) -> Trial:
    """What tries the memory of a training's phases."""
    from tlx.memory import optimizer_bytes
    from tlx.step import Updater
    from tlx.trial import Trial, optimizer_states

    per_weight = optimizer_bytes(functools.partial(make, "optimizer", config.optimizer))
    return Trial(
        updater=Updater(parts.optimizer, parts.objective, parts.normalise, world, config.seed),
        net=parts.net,
        plan=made,
        shape=(parts.spec.channels, *parts.spec.size),
        classes=parts.classes,
        state=optimizer_states(made, per_weight),
        ranks=ranks,
        mixed=mixing_of(config.mix) is not None,
    )


def seed_all(config: Config) -> None:
    """Seeds, and determinism where it is asked for."""
    import numpy
    import torch

    random.seed(config.seed)
    numpy.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = not config.loop.deterministic
    if config.loop.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
