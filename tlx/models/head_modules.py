"""What heads are made of that neither torch nor timm has a module for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional


class ConcatPool(nn.Module):
    """Maps [N, C, H, W] to their averages and maxima [N, 2C]."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)


class TaskHeads(nn.Module):
    """Several heads on the same features, their outputs beside each other [N, outputs]; behind them learned constants,
    the same for every image, which begin at 0."""

    def __init__(self, heads: Mapping[str, nn.Module], constants: int) -> None:
        super().__init__()
        for name, head in heads.items():
            self.add_module(name, head)
        self.names = tuple(heads)
        self.constants = nn.Parameter(torch.zeros(constants)) if constants else None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        outputs = [self.get_submodule(name)(features) for name in self.names]
        if self.constants is not None:
            # in their own precision: bf16 would round a learned constant to three digits
            outputs.append(self.constants.expand(outputs[0].shape[0], -1))  # of torch.export len would be one number
        return torch.cat(outputs, 1)


class Cosine(nn.Module):
    """Features [N, C] to `scale` times the cosine of their angle to each row of `weight` [classes, C].

    A learned scale is a parameter, a fixed one a buffer; both are saved.
    """

    def __init__(self, features: int, classes: int, *, scale: float, learn_scale: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, features).uniform_(-(features**-0.5), features**-0.5))
        if learn_scale:
            self.scale = nn.Parameter(torch.tensor(float(scale)))
        else:
            self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        directions = functional.normalize(features, dim=1), functional.normalize(self.weight, dim=1)
        return self.scale * functional.linear(*directions)


class Features(nn.Module):
    """Features [N, C] times a learned number."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.scale * features


class Prototypes(nn.Module):
    """Features [N, C] to minus `scale` times the squared distance to each row of `weight` [classes, C]."""

    scale: torch.Tensor

    def __init__(self, features: int, classes: int, *, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, features).uniform_(-(features**-0.5), features**-0.5))
        self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        own = features.square().sum(1, keepdim=True) + self.weight.square().sum(1)
        return self.scale * (2 * functional.linear(features, self.weight) - own)
