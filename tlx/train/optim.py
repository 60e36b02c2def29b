"""Optimizers over the layers. A part ``optimizer(groups, *, ...)`` gives a torch optimizer.

`groups` are parameter groups from :func:`parameter_groups`; a group that must not decay carries ``weight_decay: 0.0``.
Learning rates are written at every step by the loop, from the plan.

A step whose gradient is not finite must move nothing. The optimizers here read that from a tensor on the device,
``optimizer.found_inf``, as torch's fused ones do for its gradient scaler (``_step_supports_amp_scaling``): whoever asks
the host instead lets a GPU wait in every step.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from tlx.base.durations import Ratio
from tlx.base.layers import Kind, LayerMap

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
else:
    Optimizer = Any  # annotations are read when arguments are checked, which needs no torch

__all__ = ["adam", "adamw", "rmsprop", "sgd"]

Decay = Annotated[Ratio, Field(ge=0)]
Beta = Annotated[Ratio, Field(ge=0, lt=1)]
"""The share of the past in a moving average; a momentum."""
Epsilon = Annotated[Ratio, Field(gt=0, le=1)]
"""Added to a denominator; 0 would divide by zero where no gradient was yet."""


def parameter_groups(net: nn.Module, layers: LayerMap, *, no_decay: Collection[Kind]) -> list[dict[str, Any]]:
    """One group per (layer, kind of parameter), for every layer and from the start, trained now or later.

    Frozen parameters get no gradient and so no state, no decay and no update: a group costs nothing until it thaws.
    """
    tensors = dict(net.named_parameters())
    groups = []
    for layer in layers:
        for kind in dict.fromkeys(p.kind for p in layer.parameters):
            names = [p.name for p in layer.parameters if p.kind == kind]
            group = {"params": [tensors[n] for n in names], "names": names, "layer": layer.name, "lr": 0.0}
            groups.append(group | ({"weight_decay": 0.0} if kind in no_decay else {}))
    return groups


def forget(optimizer: Optimizer, names: Collection[str]) -> None:
    """Drops the state of these parameters: their next update is that of a new optimizer."""
    for group in optimizer.param_groups:
        for name, tensor in zip(group["names"], group["params"], strict=True):
            if name in names:
                optimizer.state.pop(tensor, None)


def adamw(
    groups: list[dict[str, Any]],
    *,
    weight_decay: Decay = 0.01,
    betas: tuple[Beta, Beta] = (0.9, 0.999),
    eps: Epsilon = 1e-8,
) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019)."""
    from torch.optim import AdamW

    return AdamW(groups, lr=0.0, weight_decay=weight_decay, betas=betas, eps=eps, fused=_fused(groups))


def adam(
    groups: list[dict[str, Any]],
    *,
    weight_decay: Decay = 0.0,
    betas: tuple[Beta, Beta] = (0.9, 0.999),
    eps: Epsilon = 1e-8,
) -> Optimizer:
    """Adam (Kingma and Ba 2015); its weight decay is an L2 term in the gradient."""
    from torch.optim import Adam

    return Adam(groups, lr=0.0, weight_decay=weight_decay, betas=betas, eps=eps, fused=_fused(groups))


def sgd(
    groups: list[dict[str, Any]], *, momentum: Beta = 0.9, nesterov: bool = False, weight_decay: Decay = 0.0
) -> Optimizer:
    """Stochastic gradient descent with momentum."""
    from torch.optim import SGD

    fused = _fused(groups)
    made = SGD(groups, lr=0.0, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, fused=fused)
    if fused and momentum:
        made.register_step_pre_hook(momentum_from_zero)
    return made


def rmsprop(
    groups: list[dict[str, Any]],
    *,
    alpha: Beta = 0.9,
    momentum: Beta = 0.9,
    eps: Epsilon = 1e-8,
    weight_decay: Decay = 0.0,
) -> Optimizer:
    """RMSprop (Tieleman and Hinton 2012)."""
    from tlx.train.rmsprop import FlaggedRMSprop

    return FlaggedRMSprop(groups, lr=0.0, alpha=alpha, momentum=momentum, eps=eps, weight_decay=weight_decay)


def momentum_from_zero(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    """Gives every parameter that has a gradient its momentum, zero before the first step.

    Left to itself the fused kernel writes a new buffer in the first step only, so that after one that is not finite it
    stays as it was allocated; nor does it take old and new buffers in one group, as after a thaw. From zero the first
    step gives ``momentum * 0 + gradient``, which is what torch's other kernels begin with.
    """
    import torch

    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _fused(groups: list[dict[str, Any]]) -> bool | None:
    """One kernel per step on a GPU; None leaves the choice to torch."""
    return True if groups[0]["params"][0].is_cuda else None
