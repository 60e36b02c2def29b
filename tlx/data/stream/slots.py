"""Memory that processes share for batches, recycled: a fresh block for every batch costs more in page faults than the
copy of it.

The memory is anonymous (memfd), not in /dev/shm, which containers keep at 64 MB.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import reduction
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from tlx.base.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_PAGE = mmap.PAGESIZE


class Slots:
    """`count` slots of `size` bytes. A slot that is lent out as a tensor is free again when nobody holds the tensor, or
    a view of it, any more.

    Args:
        notes: processes that may leave a number for the others to see (`note`).

    Raises:
        UserError: there is not so much memory.
    """

    def __init__(self, count: int, size: int, *, notes: int = 1) -> None:
        self.count, self.size = count, -(-size // _PAGE) * _PAGE
        self._head = -(-8 * notes // _PAGE) * _PAGE
        length = self._head + self.count * self.size
        free = psutil.virtual_memory().available
        if length > free:
            raise UserError(
                f"batches under way take {length / 2**30:.2f} GiB of memory that processes share ({count} times "
                f"{self.size / 2**20:.1f} MiB), and {free / 2**30:.2f} GiB are free",
                todo="fewer data.workers, or a smaller loop.micro_batch or data.batch",
            )
        self._file = _anonymous(length)
        self._open(self._file)
        self._free = deque(range(count))

    def _open(self, file: int) -> None:
        length = self._head + self.count * self.size
        self._memory = mmap.mmap(file, length)
        self.notes = np.frombuffer(self._memory, np.int64, self._head // 8)
        self._cuda: Any = None  # torch.cuda, while the memory is pinned
        self._maker = os.getpid()

    def __reduce__(self) -> tuple[Callable[..., Slots], tuple[Any, ...]]:
        # for processes that are not forked; only multiprocessing can pickle a file that it hands over
        return _attach, (reduction.DupFd(self._file), self.count, self.size, self._head)

    def __del__(self) -> None:
        if getattr(self, "_maker", None) != os.getpid():
            return
        if self._cuda is not None:
            self._cuda.synchronize()  # copies may be under way
            self._cuda.cudart().cudaHostUnregister(self.notes.ctypes.data)
        os.close(self._file)

    @property
    def free(self) -> int:
        """How many slots nobody uses."""
        return len(self._free)

    def take(self) -> int:
        """A slot that is free, from now on in use.

        Raises:
            IndexError: there is none.
        """
        return self._free.popleft()

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

    def array(self, slot: int, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The beginning of a slot, to write to."""
        array: np.ndarray[Any, np.dtype[np.uint8]] = np.ndarray(
            shape, np.uint8, self._memory, self._head + slot * self.size
        )
        return array

    def lend(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        """The beginning of a slot in use, to read; when the tensor is forgotten, the slot is free."""
        import torch  # a build shares results and no tensors

        array = self.array(slot, shape)
        # from_numpy keeps this very array alive, in whatever views of the tensor there are
        # the finalizer holds these slots, so that their memory stays as it is until the last tensor is forgotten
        weakref.finalize(array, self.give_back, slot).atexit = False
        return torch.from_numpy(array)

    def pin(self) -> bool:
        """Locks the memory for fast copies to a GPU; whether that was possible.

        Memory that a copy still reads from must not be forgotten: `tlx.data.stream.transfer.on_device` sees to that.
        """
        import torch

        if self._cuda is None:
            length = self._head + self.count * self.size
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            if int(runtime.cudaHostRegister(self.notes.ctypes.data, length, 0)) == 0:
                self._cuda = torch.cuda
            else:  # the next kernel would find the error and call it its own
                with suppress(RuntimeError):
                    torch.ones(1, device="cuda")
        return self._cuda is not None


def _attach(file: Any, count: int, size: int, head: int) -> Slots:
    slots = Slots.__new__(Slots)
    slots.count, slots.size, slots._head = count, size, head
    slots._file = file.detach()
    slots._open(slots._file)
    slots._free = deque()  # whoever made them deals them out
    return slots


def _anonymous(length: int) -> int:
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("tlx-batches", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as made:
            file = os.dup(made.fileno())
    try:
        os.ftruncate(file, length)
    except OSError as error:
        os.close(file)
        raise UserError(
            f"{length / 2**20:.0f} MiB of memory for batches cannot be had: {error}",
            todo="fewer data.workers, or a smaller data.batch; or raise the limit on file sizes (ulimit -f)",
        ) from error
    return file
