"""The training that a configuration describes, on random pictures instead of shards: for any backbone, on any world."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tlx.data.pixels.normalise import Normalise
from tlx.data.stream.stream import Batch
from tlx.models import Backbone
from tlx.plan.config import Config, parse
from tlx.plan.plan import Phase, Plan
from tlx.ranks.collectives import World
from tlx.tasks.summaries import expected_targets
from tlx.train import components as parts
from tlx.train.data import Samples
from tlx.train.dry_run import DryRun
from tlx.train.step import PhaseModel, Updater, prepare_phase, set_rates

CLASSES = 7
NAMES = tuple(map(str, range(CLASSES)))


def config_of(name: str, *, batch: int, steps: int = 1, args: Mapping[str, Any] | None = None, **said: Any) -> Config:
    """Feature extraction, then fine-tuning, `steps` each; random weights."""
    raw = {
        "run": "unused",
        "data": {"train": "unused", "batch": batch},
        "backbone": {"name": name, "weights": "none", "args": args or {}},
        "unfreeze": "two_phase",
        "phases": {"each": {"lr": 1e-3, "duration": steps}},
    }
    return parse(raw | said)


@dataclass(frozen=True)
class Training:
    """The parts that a run is composed of, as far as a step needs them."""

    backbone: Backbone
    plan: Plan
    updater: Updater
    size: tuple[int, int]

    @classmethod
    def of(cls, config: Config, world: World, *, size: int | None = None) -> Training:
        """Composed as tlx.train.build composes a run.

        Args:
            size: pixels, where it is not the backbone's own.
        """
        torch.manual_seed(config.seed)
        backbone = parts.backbone_of(config, CLASSES)
        pixels = (size, size) if size else backbone.input.size
        plan = Plan.make(config, backbone.layers, samples=config.data.batch, world=world.size)
        DryRun(backbone, plan, replace(backbone.input, size=pixels), CLASSES).on_shapes()
        with torch.no_grad():  # buffers that a network fills when it is first run (convit) are no movement of a phase
            backbone.module.eval()(torch.zeros(1, 3, *pixels))
        counts = [1] * CLASSES
        task = parts.task_of(config, Samples(CLASSES, CLASSES, counts, NAMES, expected_targets(counts, NAMES)))
        optimizer = parts.optimizer_of(config, backbone.module, backbone.layers)
        normalise = Normalise(backbone.input, world.device, channels_last=False)
        updater = Updater(optimizer, task, normalise, world, config.seed, clip=config.loop.clip)
        return cls(backbone, plan, updater, pixels)

    def prepare_phase(self, phase: Phase) -> PhaseModel:
        return prepare_phase(self.backbone.module, phase, self.plan, world=self.updater.world, compiled=False)

    def step(self, phase_model: PhaseModel, phase: Phase, step: int) -> torch.Tensor:
        """One step on pictures drawn for (step, rank); the tally of :meth:`tlx.train.step.Updater.update`."""
        set_rates(self.updater.optimizer, phase, step)
        return self.updater.update(phase_model, step, [self.batch(step)])[0]

    def batch(self, step: int) -> Batch:
        """This rank's share of a global batch."""
        world = self.updater.world
        share = self.plan.batch // world.size
        draw = torch.Generator().manual_seed(1000 * step + world.rank)
        images = torch.randint(0, 256, (share, 3, *self.size), dtype=torch.uint8, generator=draw)
        labels = torch.randint(0, CLASSES, (share,), generator=draw)
        total, targets = float(self.plan.batch), {"label": labels}
        return Batch(step, 0, 1, images, labels, torch.arange(share), total=total, targets=targets)


class Alone:
    """Enough of accelerate for one rank on a CPU."""

    scaler = None

    def __init__(self, precision: str = "fp32") -> None:
        self.precision = precision

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")

    @staticmethod
    def backward(loss: torch.Tensor) -> None:
        loss.backward()


def alone(precision: str = "fp32") -> World:
    """A world of one rank, which needs no launcher."""
    return World(0, 1, torch.device("cpu"), False, Alone(precision))


def values(net: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, those that are not saved too, copied."""
    return {name: t.detach().clone() for name, t in [*net.named_parameters(), *net.named_buffers()]}


def moved(net: nn.Module, before: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of parameters and buffers whose bits are not what they were."""
    now = [*net.named_parameters(), *net.named_buffers()]
    return {name for name, t in now if not torch.equal(bits(t.detach()), bits(before[name]))}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def forked(classes: int) -> nn.Module:
    """A network that defines a branch and does not run it."""
    return Forked(classes)


class Forked(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.unused = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU())
        self.fc = nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(self.stem(x)).mean((2, 3)))
