"""What a network costs: pictures a second and memory of forward passes."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tlx.train.run import Run

BATCH = 32
_SECONDS = 1.0
_PASSES = 50


@dataclass(frozen=True)
class Costs:
    """Of forward passes of `BATCH` pictures, which lie in memory.

    Attributes:
        peak: bytes of weights and of tensors that are there at once, at most.
    """

    parameters: int
    pictures_per_s: float
    peak: int


@torch.no_grad()
def costs_of(run: Run) -> Costs:
    device, spec = run.world.device, run.description.input
    images = torch.rand(BATCH, spec.channels, *spec.size, device=device)
    run.net.eval()
    with run.world.autocast():
        peak = _peak(run, images)
        began, passes = time.perf_counter(), 0
        while passes < _PASSES and (passes < 2 or time.perf_counter() - began < _SECONDS):
            run.net(images)
            passes += 1
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        rate = passes * BATCH / (time.perf_counter() - began)
    return Costs(sum(p.numel() for p in run.net.parameters()), rate, peak)


def _peak(run: Run, images: torch.Tensor) -> int:
    device = run.world.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run.net(images)
        return int(torch.cuda.max_memory_allocated(device))
    there = [*run.net.parameters(), *run.net.buffers(), images]
    with _Counting() as counting:
        run.net(images)
    return int(counting.peak) + sum(tensor.untyped_storage().nbytes() for tensor in there)


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of what operations return, as long as it lives: a CPU's allocator does not tell."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak, self._now, self._known = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and _address(leaf) not in given | self._known:
                self._count(leaf.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        size, address = storage.nbytes(), storage.data_ptr()
        self._known.add(address)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._gone, address, size)

    def _gone(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._now -= size


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
