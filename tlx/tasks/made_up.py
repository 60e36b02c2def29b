"""Made-up targets, to try a task with before there is a picture."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tlx.data.shards.targets import Target


def made_up(targets: Mapping[str, Target], samples: int, device: torch.device | None = None) -> dict[str, Tensor]:
    """Values of every kind for so many samples, none missing, as :class:`tlx.tasks.Truth` has them."""
    return {name: _values(target, samples, device) for name, target in targets.items()}


def missing(values: Tensor) -> Tensor:
    """The same, of samples that have none."""
    return torch.full_like(values, torch.nan if values.is_floating_point() else -1)


def _values(target: Target, samples: int, device: torch.device | None) -> Tensor:
    rows = torch.arange(samples, device=device)
    if target.kind == "class":
        return rows % len(target.classes)
    if target.kind == "labels":
        columns = torch.arange(len(target.classes), device=device)
        return ((rows[:, None] + columns) % 2).to(torch.int8)
    columns = torch.arange(target.width, device=device)
    return ((rows[:, None] + columns) % 3).float()
