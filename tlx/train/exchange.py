"""What ranks tell each other at every step: one packed tensor."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tlx.ranks.collectives import World

FIELDS = ("loss", "correct", "seen", "bad", "stop", "unfinite")
"""Of one step, summed over ranks: weighted loss, right and all predictions, unreadable samples, ranks asked to stop,
ranks whose gradient was not finite."""


class Exchange:
    """What ranks tell each other at step boundaries, in one packed tensor.

    On a GPU a step's reading is taken one step late, from a copy in page-locked memory that an event says has arrived:
    the host does not wait for the step that is being computed.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._waiting: list[tuple[int, torch.Tensor, Any, float]] = []

    def post(self, values: torch.Tensor, *, step: int, total: float) -> None:
        """Sends a step's values.

        Args:
            values: float64 [len(FIELDS)], this rank's.
            total: what the step's global batch weighs, which every rank knows.
        """
        if self.world.distributed:
            dist.all_reduce(values)
        arrived = None
        if values.is_cuda:
            values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()  # type: ignore[no-untyped-call]
        self._waiting.append((step, values, arrived, total))

    def readings(self, *, settle: bool) -> list[dict[str, float]]:
        """Steps that have arrived, in order: all but the newest on a GPU, unless `settle`; the same on every rank."""
        late = 1 if self.world.cuda and not settle else 0
        ready = self._waiting[: len(self._waiting) - late]
        del self._waiting[: len(ready)]
        readings = []
        for step, values, arrived, total in ready:
            if arrived is not None:
                arrived.synchronize()
            readings.append({**dict(zip(FIELDS, values.tolist(), strict=True)), "total": total, "step": step})
        return readings
