"""Small backbones from outside tlx, for tests: `backbone: {name: "toys:small"}` with tests/ on the path."""

from __future__ import annotations

from typing import Literal

from torch import nn


def small(
    classes: int,
    *,
    width: int = 8,
    norm: Literal["batch", "group"] = "batch",
    dropout: float = 0.0,
) -> nn.Module:
    """Three units of conv, norm, ReLU and dropout, a pooling, a classifier; for images of 16 pixels or more."""

    def unit(inside: int, outside: int) -> nn.Sequential:
        layer = nn.BatchNorm2d(outside) if norm == "batch" else nn.GroupNorm(2, outside)
        return nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride=2, padding=1, bias=False), layer, nn.ReLU(), nn.Dropout(dropout)
        )

    features = nn.Sequential(unit(3, width), unit(width, 2 * width), unit(2 * width, 4 * width))
    return Small(features, nn.Linear(4 * width, classes))


def sequential(classes: int) -> nn.Module:
    """A network whose root is a Sequential, which runs every child that it is given."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )


class Small(nn.Module):
    def __init__(self, features: nn.Sequential, fc: nn.Linear) -> None:
        super().__init__()
        self.features, self.fc = features, fc

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))
