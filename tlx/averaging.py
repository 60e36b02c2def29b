"""The moving average of the weights and of the statistics that belong to them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn

from tlx.config import EMA


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
            :meth:`tlx.config.EMA.at` gives for 1, and so on. Steps that were skipped are none.
    """

    def __init__(self, net: nn.Module, ema: EMA) -> None:
        self.module, self.ema, self.updates = copy.deepcopy(net), ema, 0

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Takes in the weights after a step; nothing waits for the device."""
        decay = self.ema.at(self.updates) if self.updates else 0.0
        averaged, current = [], []
        source, statistics = dict(_state(net)), {id(t) for t in _statistics(self.module)}
        # tied tensors once; views of fewer values cannot be written, and never change
        own = {id(t): (n, t) for n, t in _state(self.module) if not _expanded(t)}
        for name, ours in own.values():
            if decay and (isinstance(ours, nn.Parameter) or id(ours) in statistics) and ours.is_floating_point():
                averaged.append(ours.detach())
                current.append(source[name].detach())
            else:
                ours.copy_(source[name])
        if averaged:
            torch._foreach_lerp_(averaged, current, 1 - decay)
        self.updates += 1


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
