"""How fast ranks add up: the latency of a small all_reduce, the bandwidth of a large one."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_LARGE = {"nccl": 256 << 20, "gloo": 16 << 20}
_SMALL_TIMES, _LARGE_TIMES = 20, 8
_BUDGET_S = 2.0


@dataclass(frozen=True)
class Traffic:
    """
    Attributes:
        latency_s: of an all_reduce of one number, the median; of the slowest rank, as all times here.
        bytes, seconds: of a large one, the mean.
    """

    backend: str
    ranks: int
    latency_s: float
    bytes: int
    seconds: float

    @property
    def bus(self) -> float:
        """Bytes per second by nccl-tests' convention, "bus bandwidth": bytes / seconds x 2 (n - 1) / n, which can be
        held against the speed of the hardware, whatever the number of ranks."""
        return self.bytes / self.seconds * 2 * (self.ranks - 1) / self.ranks

    def takes(self, size: int) -> float:
        """About how many seconds `size` bytes take."""
        return self.latency_s + size / self.bytes * self.seconds

    def __str__(self) -> str:
        rate = f"{self.bus / 1e9:.2f} GB/s bus bandwidth"
        how = "bytes / time x 2(n-1)/n, as nccl-tests"
        if self.ranks == 1:
            return f"{self.backend}, 1 rank, {_duration(self.latency_s)} for one number"
        return (
            f"{self.backend}, {self.ranks} ranks: {_duration(self.latency_s)} for one number, {rate} ({how}; "
            f"{self.bytes >> 20} MiB in {_duration(self.seconds)})"
        )

    def plain(self) -> dict[str, Any]:
        return asdict(self)


class WrongSum(Exception):
    """An all_reduce has not given the sum."""


def measure(device: torch.device) -> Traffic:
    """Every rank at once, in a process group.

    Raises:
        WrongSum: what was added up is not the sum.
    """
    import torch
    import torch.distributed as dist

    backend, ranks = dist.get_backend(), dist.get_world_size()
    device = device if backend == "nccl" else torch.device("cpu")
    own = torch.full((1,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(own)
    if own.item() != ranks * (ranks + 1) / 2:
        raise WrongSum(f"1 + ... + {ranks} is not {own.item():g}")
    number = torch.ones(1, device=device)
    latency = statistics.median(_timed(number) for _ in range(_SMALL_TIMES))
    large = torch.ones(_LARGE.get(backend, _LARGE["gloo"]) // 4, device=device)
    _timed(large)  # connections and buffers are made
    first = _slowest(_timed(large), device)
    times = max(1, min(_LARGE_TIMES, int(_BUDGET_S / max(first, 1e-6))))
    mean = statistics.fmean(_timed(large) for _ in range(times))
    return Traffic(backend, ranks, _slowest(latency, device), large.nbytes, _slowest(mean, device))


def _timed(tensor: torch.Tensor) -> float:
    import torch
    import torch.distributed as dist

    tensor.fill_(1.0)
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    start = time.perf_counter()
    dist.all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter() - start


def _slowest(seconds: float, device: torch.device) -> float:
    """Of all ranks."""
    import torch
    import torch.distributed as dist

    box = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return float(box.item())


def _duration(seconds: float) -> str:
    return (
        f"{seconds * 1e6:.0f} us"
        if seconds < 1e-3
        else f"{seconds * 1e3:.3g} ms"
        if seconds < 1
        else f"{seconds:.2f} s"
    )
