"""Networks of people who never read our rules: `backbone: {name: "odd:dropping"}` with tests/support/ on the path."""

from __future__ import annotations

import random
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + functional.relu(self.norm(self.conv(x)))


def _ending(*last: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *last)


class Holder(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def weight_normed(classes: int) -> nn.Module:
    """A parametrized classifier, two modules deep."""
    return Holder(_ending(parametrizations.weight_norm(nn.Linear(8, classes))))


class Dropping(nn.Module):
    """Leaves out whole layers at random in training."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, classes)
        self.rows = nn.ModuleList(Block() for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.rows:
            if not (self.training and random.random() < 0.5):
                x = block(x)
        return self.fc(x.mean((2, 3)))


def dropping(classes: int) -> nn.Module:
    return Dropping(classes)


class Fixed(nn.Module):
    """A position embedding that is not to be learned."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv, self.block, self.fc = nn.Conv2d(3, 8, 3), Block(), nn.Linear(8, classes)
        self.pos = nn.Parameter(torch.ones(1, 8, 1, 1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.block(self.conv(x) + self.pos).mean((2, 3)))


def fixed(classes: int) -> nn.Module:
    return Fixed(classes)


class Directions(nn.Module):
    """A classifier whose weight is used without calling it."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv, self.block, self.fc = nn.Conv2d(3, 8, 3), Block(), nn.Linear(8, classes, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.block(self.conv(x)).mean((2, 3))
        return functional.linear(functional.normalize(features), functional.normalize(self.fc.weight))


def directions(classes: int) -> nn.Module:
    return Directions(classes)


class Transposed(nn.Module):
    """A classifier with its weight as [features, classes]."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(features, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w


def transposed(classes: int) -> nn.Module:
    return _ending(Transposed(8, classes))


def misnamed(classes: int) -> nn.Module:
    """A first convolution called head, a block called stem."""
    parts = {"head": nn.Conv2d(3, 8, 3), "stem": Block(), "body": Block()}
    return nn.Sequential(
        OrderedDict(**parts, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), out=nn.Linear(8, classes))
    )


def normed_logits(classes: int) -> nn.Module:
    return _ending(nn.Linear(8, classes), nn.BatchNorm1d(classes))


class Wordy(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.net = _ending(nn.Linear(8, classes))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.net(x)}


def wordy(classes: int) -> nn.Module:
    return Wordy(classes)
