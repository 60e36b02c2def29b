"""Averages of the weights of several networks that are built alike.

Running statistics of norms tell what their inputs are like in the network that they belong to; means of several
networks' statistics tell it of none. So statistics that differ between the networks are estimated anew with the
averaged weights, as Izmailov et al. 2018 do (arXiv:1803.05407, section 3.2). Those that are equal in all of them, such
as frozen ones, were constants of every network and stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tlx.use.model import Model

Weights = Mapping[str, Tensor]


@dataclass
class WeightAverage:
    """The mean of weights, which are taken in one by one and not kept: sums in float64, on the CPU.

    Attributes:
        count: of networks that are in it.
    """

    count: int = 0
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _others: dict[str, Tensor] = field(default_factory=dict)
    _differing: set[str] = field(default_factory=set)

    def take(self, weights: Weights) -> None:
        """Takes a network in. What is not floating, such as a count of batches, is and stays the first one's."""
        self._differing |= self._unlike(weights)
        self.count += 1
        if self.count == 1:
            self._others = {name: tensor for name, tensor in weights.items() if not tensor.is_floating_point()}
            self._sums = {name: tensor.double() for name, tensor in weights.items() if tensor.is_floating_point()}
            return
        for name, total in self._sums.items():
            total += weights[name]

    @torch.no_grad()
    def write_to(self, net: nn.Module, further: Weights | None = None) -> list[_NormBase]:
        """Gives a network the mean, of those taken and of a further one.

        Returns:
            Its norms whose running statistics differ between the networks: their mean is written, too.
        """
        count = self.count + (further is not None)
        for name, tensor in net.state_dict().items():
            total = self._sums.get(name)
            if total is None:
                tensor.copy_(self._others[name])
            else:
                tensor.copy_((total if further is None else total + further[name]) / count)
        differing = self._differing | (self._unlike(further) if further is not None else set())
        return [
            norm
            for prefix, norm in _norms_with_statistics(net)
            if {f"{prefix}.running_mean", f"{prefix}.running_var"} & differing
        ]

    def _unlike(self, weights: Weights) -> set[str]:
        """Running statistics that are not those of the networks so far. While these are all equal, the sum over their
        count is their very value."""
        names = (name for name in self._sums if name.endswith(("running_mean", "running_var")))
        return {name for name in names if not torch.equal(self._sums[name] / self.count, weights[name].double())}


def interpolated(first: Weights, second: Weights, alpha: float) -> WeightAverage:
    """(1 - alpha) times the first weights and alpha times the second, which counts as one network. What is equal in
    both stays as it is, and what is not floating is the first one's."""
    made = WeightAverage()
    made.take(first)
    if alpha == 0:
        return made
    ends = made._unlike(second) if alpha < 1 else set()
    mixed = {
        name: torch.where(total == second[name], total, torch.lerp(total, second[name].double(), alpha))
        for name, total in made._sums.items()
    }
    return WeightAverage(1, mixed, made._others, ends)


def _norms_with_statistics(net: nn.Module) -> Iterator[tuple[str, _NormBase]]:
    for prefix, module in net.named_modules():
        if isinstance(module, _NormBase) and module.running_mean is not None and module.num_batches_tracked is not None:
            yield prefix, module


def estimate_statistics(model: Model, norms: list[_NormBase], pixels: Tensor) -> int:
    """Replaces the running statistics of these norms by means over full batches; all else is in evaluation mode.

    Args:
        pixels: uint8 [n, channels, H, W], as training shows them; what does not fill a batch is left out.

    Returns:
        Of how many pictures.
    """
    batch = min(model.description.batch, len(pixels))
    pixels = pixels[: len(pixels) // batch * batch]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a mean over all batches, each counting the same
        norm.train()
    try:
        model.forward.outputs(pixels, batch=batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
    return len(pixels)
