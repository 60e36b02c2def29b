"""Small backbones from outside tlx, for tests: `backbone: {name: "toys:small"}` with tests/support/ on the path."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from typing import Literal

import torch
from torch import nn

from tlx.base.inputs import InputSpec

PACE = float(os.environ.get("TOYS_PACE", 0))
"""Seconds that `small` takes for a step of training, so that something can happen to it meanwhile."""


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


def assisted(classes: int, *, functional: bool = False, size: int = 16) -> nn.Module:
    """The small one, with an auxiliary classifier in training mode that reads its second unit.

    Args:
        functional: its branch is no module of its own.
        size: of the only images that the branch takes.
    """
    plain = small(classes)
    net = Assisted(plain.features, plain.fc, classes, size // 4, functional)
    net.input = InputSpec(size=(size, size))  # type: ignore[assignment]
    return net


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
        if PACE and self.training:
            time.sleep(PACE)
        return self.fc(self.features(x).mean((2, 3)))


class Assisted(Small):
    def __init__(self, features, fc, classes, side, functional) -> None:
        super().__init__(features, fc)
        self.aux = nn.Sequential(nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * side**2, classes))
        self.functional = functional

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        read = self.features[1](self.features[0](x))
        return self.fc(self.features[2](read).mean((2, 3))), self.beside(read)

    def beside(self, read):
        if self.functional:
            return self.aux[3](self.aux[1](self.aux[0](read)).relu().flatten(1)) * 1.0
        return self.aux(read)


def limited(
    classes: int,
    *,
    samples: int,
    where: Literal["training", "evaluation"] = "training",
    rank: int | None = None,
    norm: Literal["batch", "group"] = "group",
    dropout: float = 0.0,
    calls: str | None = None,
) -> nn.Module:
    """The small one, out of memory above so many samples: in training, where its body trains, or in evaluation.

    Args:
        rank: the only one whose memory is small; None: all.
        calls: a file that gets a line for each time that memory ran out.
    """
    plain = small(classes, norm=norm, dropout=dropout)
    return Limited(plain.features, plain.fc, samples, where, rank, calls)


class Limited(Small):
    def __init__(self, features, fc, samples, where, rank, calls) -> None:
        super().__init__(features, fc)
        self.samples, self.where, self.calls = samples, where, calls
        self.here = rank is None or rank == int(os.environ.get("RANK", 0))

    def forward(self, x):
        learns = any(p.requires_grad for p in self.features.parameters())
        trains = self.training and torch.is_grad_enabled() and learns
        if self.here and len(x) > self.samples and (trains if self.where == "training" else not self.training):
            if self.calls is not None:
                with open(self.calls, "a") as file:
                    file.write(f"{len(x)}\n")
            raise torch.OutOfMemoryError("CUDA out of memory. (Not really: toys.limited)")
        return super().forward(x)


def faulty(
    classes: int, *, how: Literal["sleep", "lock", "raise", "die", "weights"], rank: int = 1, at: int = 5
) -> nn.Module:
    """The small one, which on one rank fails in its `at`-th training pass, or has other weights from the start."""
    plain = small(classes)
    if how == "weights" and rank == int(os.environ.get("RANK", 0)):
        nn.init.ones_(plain.features[0][0].weight)
    return Faulty(plain.features, plain.fc, how, rank, at)


class Faulty(Small):
    def __init__(self, features, fc, how, rank, at) -> None:
        super().__init__(features, fc)
        self.how, self.here, self.left = how, rank == int(os.environ.get("RANK", 0)), at

    def forward(self, x):
        if self.training and torch.is_grad_enabled() and self.here:
            self.left -= 1
            if self.left == 0:
                self.fail()
        return super().forward(x)

    def fail(self) -> None:
        if self.how == "sleep":
            time.sleep(3600)  # the line that a test looks for
        elif self.how == "lock":
            ctypes.PyDLL(None).sleep(3600)  # keeps the interpreter's lock
        elif self.how == "raise":
            raise ValueError("a fault of the backbone")
        elif self.how == "die":
            os.kill(os.getpid(), signal.SIGKILL)


def speaking(classes: int) -> nn.Module:
    """The small one, which prints a line at every training pass, as code of others may."""
    plain = small(classes)
    return Speaking(plain.features, plain.fc)


class Speaking(Small):
    def forward(self, x):
        if self.training:
            print("the network speaks")
        return super().forward(x)


def straight(classes: int) -> nn.Module:
    """A linear function of 4 x 4 means of the pixels."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, classes))
