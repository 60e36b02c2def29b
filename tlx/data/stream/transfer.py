"""Batches on the device before they are wanted."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from tlx.data.stream.stream import Batch

_UNDER_WAY = 3  # batches whose memory is kept until the device has copied it


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on a device; to a GPU each is copied while the one before is computed."""
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    kept: deque[tuple[Batch, Any]] = deque()
    coming: deque[tuple[Batch, Any]] = deque()
    try:
        for batch in batches:
            coming.append(_copy(batch, copies, device))
            # what the copy reads from is memory that the loader recycles as soon as it is forgotten
            kept.append((batch, coming[-1][1]))
            del batch
            while kept and (len(kept) > _UNDER_WAY or kept[0][1].query()):
                kept.popleft()[1].synchronize()
            if len(coming) > 1:
                yield _arrived(*coming.popleft(), device)
        while coming:
            yield _arrived(*coming.popleft(), device)
    finally:
        for _, done in kept:
            done.synchronize()


def _copy(batch: Batch, copies: Any, device: torch.device) -> tuple[Batch, Any]:
    with torch.cuda.stream(copies):
        moved = batch.map(lambda t: t.to(device, non_blocking=True))
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(copies)
    return moved, done


def _arrived(batch: Batch, done: Any, device: torch.device) -> Batch:
    """The copy, from now on a matter of the stream that computes."""
    computing = torch.cuda.current_stream(device)
    computing.wait_event(done)

    def handed_over(tensor: torch.Tensor) -> torch.Tensor:
        tensor.record_stream(computing)
        return tensor

    return batch.map(handed_over)
