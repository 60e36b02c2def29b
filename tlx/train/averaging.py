"""The moving average of the weights and of the statistics that belong to them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tlx.plan.loop_config import EMA


class MovingAverage:
    """An exponential moving average (EMA) of a network.

    Parameters and norms' running statistics are averaged with one decay, as timm's ModelEmaV3 does: averaged weights
    are evaluated with averaged statistics. Other buffers are copied: an average of counters, of a table that holds
    infinity or of a power iteration's vectors (spectral norm) is none of them. What is equal in both, such as a frozen
    layer, stays as it is.

    torch's AveragedModel is not used: it fails on buffers that are views of fewer values, and knows no rising decay.

    Attributes:
        module: the averaged network.
        updates: n, how many updates the average holds. The first copies the network; the next one has the decay that
            :meth:`tlx.plan.config.EMA.at` gives for 1, and so on. Steps that were skipped are none.
    """

    def __init__(self, net: nn.Module, ema: EMA) -> None:
        self.module, self.ema = copy.deepcopy(net), ema
        self._updates: int | torch.Tensor = 0

    @property
    def updates(self) -> int:
        return int(self._updates)

    @updates.setter
    def updates(self, count: int) -> None:
        self._updates = count

    @torch.no_grad()
    def update(self, net: nn.Module, taken: torch.Tensor | None = None) -> None:
        """Takes in the weights after a step; nothing waits for the device.

        Args:
            taken: bool, a scalar on the network's device: whether the step was taken, where it may have been skipped;
                one that was not leaves the average as it is.
        """
        decay = self._decay(taken)
        averaged, current = [], []
        source, statistics = dict(_state(net)), {id(t) for t in _statistics(self.module)}
        # tied tensors once; views of fewer values cannot be written, and never change
        own = {id(t): (n, t) for n, t in _state(self.module) if not _expanded(t)}
        for name, ours in own.values():
            theirs = source[name].detach()
            if (isinstance(ours, nn.Parameter) or id(ours) in statistics) and ours.is_floating_point():
                averaged.append(ours.detach())
                current.append(theirs)
            else:
                ours.copy_(theirs if taken is None else torch.where(taken, theirs, ours))
        _approach(averaged, current, 1 - decay)
        self._updates = self._updates + (1 if taken is None else taken.long())

    def _decay(self, taken: torch.Tensor | None) -> Any:
        """Of the next update: a number, or where it depends on what the device knows, a float64 scalar there: 1 for
        nothing new."""
        if taken is None:
            return self.ema.at(self.updates) if self.updates else 0.0
        before = torch.zeros_like(taken, dtype=torch.float64) + self._updates
        rising = (1 + before) / (10 + before) if self.ema.ramp else before + 1  # EMA.at, on the device
        decay = torch.where(before > 0, rising.clamp(max=self.ema.decay), 0.0)
        return torch.where(taken, decay, 1.0)


def _approach(averaged: list[torch.Tensor], current: list[torch.Tensor], share: Any) -> None:
    """Moves by a share of what lies between, 0 to 1; with 1 to the very values, with 0 not at all."""
    if not isinstance(share, torch.Tensor):
        if share == 1:
            torch._foreach_copy_(averaged, current)
        else:
            torch._foreach_lerp_(averaged, current, share)
        return
    shares = {dtype: share.to(dtype) for dtype in {t.dtype for t in averaged}}
    for ours, theirs in zip(averaged, current, strict=True):  # there is no torch._foreach_lerp_ by one tensor
        ours.lerp_(theirs, shares[ours.dtype])


def _state(net: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What a checkpoint keeps: parameters and saved buffers, themselves, by name."""
    for prefix, module in net.named_modules():
        unsaved = module._non_persistent_buffers_set
        saved = {name: buffer for name, buffer in module._buffers.items() if name not in unsaved}
        for name, tensor in (module._parameters | saved).items():
            if tensor is not None:
                yield f"{prefix}.{name}", tensor


def _statistics(net: nn.Module) -> Iterator[torch.Tensor]:
    """Running means and variances of norms, by the names that all of torch's and timm's give them."""
    for module in net.modules():
        mean, variance = (module._buffers.get(name) for name in ("running_mean", "running_var"))
        if mean is not None and variance is not None:
            yield from (mean, variance)


def _expanded(tensor: torch.Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.size(), strict=True))
