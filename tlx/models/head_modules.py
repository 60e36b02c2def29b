"""What heads are made of that neither torch nor timm has a module for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
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


class Semantic(nn.Module):
    """Features [N, C] by `map` to [N, width], and `scale` times the similarity to each row of `vectors` [classes,
    width].

    What is not learned, vectors and scale, is a buffer; both are saved.
    """

    vectors: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        features: int,
        vectors: NDArray[Any],
        cosine: bool,
        scale: float,
        learn_scale: bool,
        learn_vectors: bool,
        bias: bool,
    ) -> None:
        super().__init__()
        self.cosine = cosine
        self.map = nn.Linear(features, vectors.shape[1], bias=bias)
        for name, value, learned in (
            ("vectors", torch.tensor(vectors), learn_vectors),
            ("scale", torch.tensor(float(scale)), learn_scale),
        ):
            if learned:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        mapped, vectors = self.map(features), self.vectors
        if self.cosine:
            mapped, vectors = functional.normalize(mapped, dim=1), functional.normalize(vectors, dim=1)
        return self.scale * functional.linear(mapped, vectors)


class JoinedViews(nn.Sequential):
    """A head on the features of several views beside each other: [N * views, C] to what it makes of [N, views * C].

    Whether the rows are views, or lone images that stand for each of theirs, whoever calls it says in `split`.
    """

    def __init__(self, head: nn.Module, views: int) -> None:
        super().__init__(*(head.children() if isinstance(head, nn.Sequential) else (head,)))
        self.views, self.split = views, False

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        rows = features if self.split else features.repeat_interleave(self.views, 0)
        joined = rows.reshape(len(rows) // self.views, self.views * rows.shape[1])
        found: torch.Tensor = super().forward(joined)  # type: ignore[no-untyped-call]
        return found
