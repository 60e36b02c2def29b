"""Work over many files: in processes, with a bar on a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, TypeVar

from tlx.base.terminal import BestEffort, is_quiet
from tlx.data.stream.workers import in_order

Task = TypeVar("Task")
Result = TypeVar("Result")


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    function: Callable[[Task], Result], tasks: Sequence[Task], *, jobs: int | None, title: str | None
) -> Iterator[Result]:
    """The results of `function` in the order of `tasks`, in `jobs` processes (None: one per core).

    Args:
        title: what a progress bar on stderr says; None, --quiet, or an stderr that is no terminal, shows none.
    """
    workers = min(cores() if jobs is None else jobs, len(tasks))
    results = in_order(function, tasks, workers=workers if workers > 1 else 0, prefetch=1)
    if title is None or is_quiet() or not sys.stderr.isatty():
        yield from results
        return
    from rich.console import Console
    from rich.progress import track

    shown: Any = BestEffort.over(sys.stderr, "standard error")  # a terminal that is closed does not end the work
    first = list(islice(results, 1))  # so that the processes are there before the bar's thread is
    yield from track(chain(first, results), description=title, total=len(tasks), console=Console(file=shown))
