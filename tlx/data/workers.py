"""A function over many tasks in order, here or in worker processes: torch's DataLoader, without its randomness."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from tlx.errors import TlxError

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Task], Result], tasks: Iterable[Task], *, workers: int, prefetch: int = 2, pin: bool = False
) -> Iterator[Result]:
    """The results of `function` in the order of `tasks`; each of `workers` processes computes `prefetch` tasks ahead.

    The global random states of this process are not touched. With 0 workers it is computed here. `pin` puts results
    into page-locked memory, by their own method `pin_memory`.

    Raises:
        TlxError: a worker was killed. (Torch notices by a signal: outside of this iterator it raises RuntimeError.)
    """
    loader: DataLoader[Result] = DataLoader(
        _Calls(function),  # type: ignore[arg-type]
        sampler=tasks,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        collate_fn=_as_it_is,
        worker_init_fn=_settle if workers else None,
        multiprocessing_context=_start_method() if workers else None,
        pin_memory=pin and workers > 0,
        # without one, torch draws the workers' seed from the global state
        generator=torch.Generator(),
    )
    iterator = iter(loader)
    try:
        yield from iterator
    except RuntimeError as error:
        text = str(error)
        if "killed by signal" not in text and "exited unexpectedly" not in text:
            raise
        raise TlxError(
            f"a data worker died: {text.splitlines()[0]}\n  -> if it was out of memory, lower data.workers or the batch"
        ) from error
    finally:
        # an error keeps its frames, and they the iterator, whose workers would then be waited for at some later time
        if workers:
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def _start_method() -> str | None:
    """Forked, unless the program has chosen otherwise: Python 3.14's own choice imports torch anew in every worker."""
    return "fork" if sys.platform == "linux" and multiprocessing.get_start_method(allow_none=True) is None else None


class _Calls:
    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, task: Any) -> Any:
        return self.function(task)


def _as_it_is(result: Result) -> Result:
    return result


def _settle(worker: int) -> None:
    """A request to stop is the training process's business, which finishes its step with the workers' help.

    Schedulers and terminals signal the whole process group. Only the training process itself may end a worker by
    SIGTERM (torch and multiprocessing do, when it leaves), so whom the signal comes from has to be looked at.
    """
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"):
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
