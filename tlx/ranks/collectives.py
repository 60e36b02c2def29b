"""What ranks compute and exchange together. The only module that computes with accelerate.

accelerate gives device, autocast, gradient scaler and backward. It never sees the model, the loader or a scheduler:
those are ours, wrapped anew for each phase.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from tlx.base.errors import TlxError, UserError
from tlx.base.launcher import environment
from tlx.ranks.watch import Watch

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


@dataclass(frozen=True)
class World:
    """The ranks of one training.

    Attributes:
        rank, size: of all processes.
        device: of this rank.
        launched: a launcher (torchrun, accelerate launch) watches over this process.
        watch: names ranks that die or hang; outside of `tlx train` it does nothing.
        first: nobody had asked accelerate for a precision and a device in this process before.
    """

    rank: int
    size: int
    device: torch.device
    launched: bool
    accelerator: Any
    watch: Watch = field(default_factory=Watch)
    first: bool = False

    @classmethod
    def of(cls, precision: str, device: torch.device, size: int, watch: Watch) -> World:
        """The world of the process group that there is, or of this process alone.

        Raises:
            UserError: the device cannot compute in this precision.
            TlxError: accelerate sees other ranks than the launcher has set.
        """
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        # fp16 on a CPU has no scaler in accelerate and computes in fp32 without a word
        if device.type == "cpu" and precision == "fp16":
            raise UserError("fp16 needs a GPU", where="loop.precision", todo="set bf16 or fp32")
        first = not AcceleratorState._shared_state
        mixed = "no" if precision == "fp32" else precision
        accelerator = Accelerator(mixed_precision=mixed, cpu=device.type == "cpu")
        rank = dist.get_rank() if dist.is_initialized() else 0
        if accelerator.num_processes != size or accelerator.process_index != rank:
            raise TlxError(
                f"accelerate reports rank {accelerator.process_index} of {accelerator.num_processes}, "
                f"the launcher set rank {rank} of {size}"
            )
        return cls(rank, size, accelerator.device, environment().launched, accelerator, watch, first)

    @property
    def distributed(self) -> bool:
        """Whether there is a process group; a launcher makes one even for a single rank."""
        return dist.is_initialized()

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def local_main(self) -> bool:
        """The first rank of its machine."""
        return environment().local_rank == 0

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """fp16's gradient scaler, else None."""
        scaler: torch.amp.GradScaler | None = self.accelerator.scaler
        return scaler

    def autocast(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = self.accelerator.autocast()
        return context

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over all ranks, in place."""
        if self.distributed:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        """Rank 0's values on every rank, in place."""
        if self.distributed:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def from_main(self, value: Any) -> Any:
        """Rank 0's object on every rank."""
        if not self.distributed:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if dist.get_backend() == "nccl" else None)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's object, by rank."""
        if not self.distributed:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def joined(self, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The rows of all ranks, [n, ...], in the order of ranks, on every rank, with gradients; and where its own
        begin. Every rank calls it, one without rows too, and goes backward through it."""
        if not self.distributed:
            return rows, 0
        own = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.zeros_like(own) for _ in range(self.size)]
        dist.all_gather(counts, own)
        lengths = [int(count) for count in counts]
        found: torch.Tensor = _Joined.apply(rows, lengths, self.rank)  # type: ignore[no-untyped-call]
        return found, sum(lengths[: self.rank])

    def barrier(self) -> None:
        if self.distributed:
            dist.barrier()

    def ask_to_stop(self) -> None:
        """Of all ranks, because of a mistake here that :func:`tlx.ranks.together.together` then tells; in a training
        they hear of it there."""

    def stops(self) -> bool:
        """Whether a rank has asked for it."""
        return False

    def leave(self) -> None:
        """A lone training is over: the next one in this process, as in a notebook, may have another precision or
        device, which accelerate would refuse as long as it remembers these."""
        from accelerate.state import AcceleratorState

        if self.first and not self.distributed:
            AcceleratorState._reset_state(reset_partial_state=True)  # there is no public way

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


class _Joined(torch.autograd.Function):
    """All-gather of parts of different lengths. Each rank's loss may depend on every row, so that a row's gradient is
    the sum of what all ranks have computed for it."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, lengths: list[int], rank: int) -> torch.Tensor:
        padded = rows.new_zeros((max(lengths), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        ctx.start, ctx.count = sum(lengths[:rank]), len(rows)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.count], None, None


def gather_by_store(store: Store, rank: int, size: int, value: Any, *, topic: str, timeout: timedelta) -> list[Any]:
    """Every rank's value, which JSON can say, by rank; before there is a process group.

    Raises:
        torch.distributed.DistError: a rank did not join in time.
    """
    own = dist.PrefixStore(topic, store)  # type: ignore[attr-defined]
    own.set(str(rank), json.dumps(value))
    keys = [str(r) for r in range(size)]
    own.wait(keys, timeout)
    return [json.loads(text) for text in own.multi_get(keys)]
