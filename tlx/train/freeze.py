"""A phase of the plan, applied to a network: what requires a gradient, which modules are in training mode; running
statistics of norms over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tlx.base.errors import UserError
from tlx.plan.plan import Phase, Plan
from tlx.ranks.collectives import World


def unfreeze(net: nn.Module, phase: Phase, plan: Plan) -> None:
    """Gradients exactly for what the phase trains; stale ones cleared, since they would move what is frozen again."""
    trained = {p.name for layer in plan.layers for p in phase.trained(layer)}
    for name, tensor in net.named_parameters():
        tensor.requires_grad_(name in trained)
        tensor.grad = None
    train_mode(net, phase, plan)


def train_mode(net: nn.Module, phase: Phase, plan: Plan) -> None:
    """Training mode as the phase means it.

    Frozen layers are in evaluation mode (dropout and drop-path off) unless ``stochastic: on``; norms follow the norm
    policy, whatever their layer does. A norm's own mode is set, not that of a dropout that timm puts inside one.
    """
    net.train()
    modules = dict(net.named_modules())
    for layer in plan.layers:
        if phase.trains[layer.name] == "frozen" and phase.settings.stochastic == "off_in_frozen":
            for name in layer.modules:
                modules[name].training = False
        moving = phase.norm_state(layer).statistics == "moving"
        for name in layer.norms:
            modules[name].training = moving


def moving_norms(net: nn.Module, phase: Phase, plan: Plan) -> list[nn.Module]:
    """The norms whose running statistics this phase moves."""
    modules = dict(net.named_modules())
    return [
        modules[name]
        for layer in plan.layers
        if phase.norm_state(layer).statistics == "moving"
        for name in layer.moving
    ]


@torch.no_grad()
def average_statistics(norms: Sequence[nn.Module], world: World, *, samples: int) -> None:
    """Running statistics become their average over ranks, weighted by samples, in one collective.

    Args:
        samples: of the global batch that this rank has seen.
    """
    if not world.distributed or not norms:
        return
    moving = statistics(norms)
    # batches are counted by rank 0, which the dealing never leaves without a sample
    counters = [b for norm in norms for b in norm.buffers(recurse=False) if not b.is_floating_point()]
    weights = [float(samples)] * len(moving) + [float(world.main)] * len(counters)
    buffers = [*moving, *counters]
    parts = [b.double().flatten() * w for b, w in zip(buffers, weights, strict=True)]
    flat = world.sum(torch.cat([*parts, torch.full_like(parts[0][:1], float(samples))]))
    for buffer, summed in zip(buffers, torch.split(flat[:-1], [b.numel() for b in buffers]), strict=True):
        buffer.copy_((summed / flat[-1] if buffer.is_floating_point() else summed).view_as(buffer))


@torch.no_grad()
def take_back(buffers: Sequence[torch.Tensor], before: Sequence[torch.Tensor], finite: torch.Tensor) -> None:
    """What a step has moved becomes again what it was where its gradient's norm is not `finite` (bool, on the device,
    which is not waited for)."""
    for buffer, former in zip(buffers, before, strict=True):
        buffer.copy_(torch.where(finite, buffer, former))


def moved(norms: Sequence[nn.Module]) -> list[torch.Tensor]:
    """What a step moves in these norms beside their weights: statistics and counters."""
    return [b for norm in norms for b in norm.buffers(recurse=False)]


def statistics(norms: Sequence[nn.Module]) -> list[torch.Tensor]:
    """Running means and variances; a norm inside another (``SplitBatchNorm2d``) is in `norms` itself."""
    return [b for norm in norms for b in norm.buffers(recurse=False) if b.is_floating_point()]


def synchronise(net: nn.Module, world: World) -> None:
    """Makes every BatchNorm of `net` a SyncBatchNorm, in place (``loop.sync_batchnorm``): its statistics are of the
    batches of all ranks; on one rank it computes what it did before.

    torch's SyncBatchNorm is of BatchNorm's class but for its forward, so the class is all that changes, as in torch's
    lazy modules: parameters, buffers, names, hooks and modules that stand in two places stay the very same. The
    conversions of torch and timm make new modules, which lose hooks; a head may hang on one.

    Raises:
        UserError: no GPU, without which torch's does not train; a class with a forward of its own, which would be lost.
    """
    from timm.layers import BatchNormAct2d
    from timm.layers.norm_act import SyncBatchNormAct

    where = "loop.sync_batchnorm"
    if not world.cuda:
        raise UserError("SyncBatchNorm needs GPUs: torch has none for CPUs", where=where, todo="set it to false")
    synchronised = {_BatchNorm.forward: nn.SyncBatchNorm, BatchNormAct2d.forward: SyncBatchNormAct}
    norms: list[Any] = [m for m in net.modules() if isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm)]
    own = sorted({type(norm).__name__ for norm in norms if type(norm).forward not in synchronised})
    if own:
        raise UserError(f"{', '.join(own)} cannot be synchronised: it computes in a way of its own", where=where)
    for norm in norms:
        norm.__class__ = synchronised[type(norm).forward]
        norm.process_group = None
