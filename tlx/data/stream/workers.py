"""A function over many tasks in order, here or in worker processes.

Torch's DataLoader does nearly this; it draws from the global random state, allocates and maps new shared memory for
every batch, and when a worker dies it cannot say of what.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from tlx.base.errors import TlxError
from tlx.base.terminal import as_courtesy
from tlx.data.stream.slots import Slots

Task = TypeVar("Task")
Result = TypeVar("Result")

_REQUESTS = {
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP") if hasattr(signal, name)
}
"""Signals by which a training is asked to stop, which workers leave to it."""

_IDLE = -1
_ends: weakref.WeakSet[Connection[Any, Any]] = weakref.WeakSet()
_note: Callable[[int], None] = lambda number: None  # noqa: E731, replaced in workers
_asker: int | None = None  # in workers, the process that started them


class WorkerDied(TlxError):
    """A worker process ended in the middle of its work.

    Attributes:
        sample: what it was at, as it said by `at_work_on`.
    """

    def __init__(self, what: str, sample: int | None = None) -> None:
        self.what, self.sample = what, sample
        super().__init__(f"a data worker died: {what}\n  -> if it was out of memory, lower data.workers or the batch")


class InWorker(Exception):
    """Where in a worker an error arose; stands as the error's cause."""


def at_work_on(sample: int) -> None:
    """A function says what it is about to do, in case its process does not survive it."""
    _note(sample)


def is_worker() -> bool:
    """Whether this process is a worker."""
    return _asker is not None


def is_orphaned() -> bool:
    """Whether this process is a worker, and the one that asked for its work is gone.

    Never true of the process that asks, whoever started that: a shell that ends is no reason to end.
    """
    return _asker is not None and os.getppid() != _asker


@dataclass(frozen=True)
class Made(Generic[Result]):
    """A result, and the slot that the function wrote to, if there are slots; to be lent or given back."""

    result: Result
    slot: int


def in_order(
    function: Callable[[Task], Result], tasks: Iterable[Task], *, workers: int, prefetch: int = 2
) -> Iterator[Result]:
    """The results of `function` in the order of `tasks`; each of `workers` processes has `prefetch` tasks ahead.

    With 0 workers they are computed here, one when it is asked for.

    Raises:
        WorkerDied: a worker was killed, or crashed.
    """
    if not workers:
        yield from map(function, tasks)
        return
    for made in _in_processes(_Plain(function), tasks, Slots(0, 0, notes=workers), workers, prefetch):
        yield made.result


def in_slots(
    function: Callable[[Task, Slots, int], Result],
    tasks: Iterable[Task],
    slots: Slots,
    *,
    workers: int,
    prefetch: int = 2,
) -> Iterator[Made[Result]]:
    """The same for a function that also gets the slot it may write to; a slot must be free whenever one is asked for.

    Raises:
        WorkerDied: a worker was killed, or crashed.
    """
    if workers:
        yield from _in_processes(function, tasks, slots, workers, prefetch)
        return
    for task in tasks:
        slot = slots.take()
        yield Made(function(task, slots, slot), slot)


@dataclass(frozen=True)
class _Plain(Generic[Task, Result]):
    function: Callable[[Task], Result]

    def __call__(self, task: Task, slots: Slots, slot: int) -> Result:
        return self.function(task)


# In the process that asks


@contextlib.contextmanager
def _unasked() -> Iterator[None]:
    """A worker that is started in here gets no request to stop before it ignores them: it inherits what is blocked."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _REQUESTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, number: int, function: Callable[..., Any], slots: Slots) -> None:
        context = multiprocessing.get_context(_start_method())
        self.number, self.slots = number, slots
        self.pipe, end = context.Pipe()
        slots.notes[number] = _IDLE
        self.process = context.Process(  # type: ignore[attr-defined]
            target=_work, args=(end, number, function, slots), name=f"tlx-data-{number}", daemon=True
        )
        _ends.add(self.pipe)
        with _unasked():
            self.process.start()
        end.close()  # else its death could not be seen

    def send(self, task: Any, slot: int) -> None:
        try:
            self.pipe.send((task, slot))
        except (BrokenPipeError, ConnectionResetError):
            raise self._died() from None

    def receive(self) -> Any:
        """The next result; an error of the function is raised here."""
        try:
            result, error, where = self.pipe.recv()
        except (EOFError, OSError):  # also in the middle of an answer
            raise self._died() from None
        if error is not None:
            raise error from InWorker(f"\n{where}")
        return result

    def _died(self) -> WorkerDied:
        self.process.join(5)
        code = self.process.exitcode
        how = f"exit code {code}"
        if code is not None and code < 0:
            names = {int(s): s.name for s in signal.Signals}
            how = f"killed by signal {-code} ({names.get(-code, 'unknown')})"
        sample = int(self.slots.notes[self.number])
        return WorkerDied(how, None if sample == _IDLE else sample)

    def end(self) -> None:
        self.pipe.close()  # which ends it, whatever it is doing, unless some other fork holds a copy of this end
        self.process.terminate()

    def wait(self, until: float) -> None:
        self.process.join(max(until - time.monotonic(), 0.1))
        if self.process.is_alive():
            self.process.kill()
            self.process.join(5)


def _in_processes(
    function: Callable[..., Result], tasks: Iterable[Task], slots: Slots, workers: int, prefetch: int
) -> Iterator[Made[Result]]:
    crew: list[_Worker] = []
    ahead: deque[tuple[_Worker, int]] = deque()
    remaining, given, maker = iter(tasks), 0, os.getpid()
    try:
        while True:
            while len(ahead) < workers * prefetch and (slots.free or not slots.count):
                task = next(remaining, _END)
                if task is _END:
                    break
                if given < workers:
                    crew.append(_Worker(given, function, slots))
                worker, slot = crew[given % workers], slots.take() if slots.count else 0
                worker.send(task, slot)
                ahead.append((worker, slot))
                given += 1
            if not ahead:
                if next(remaining, _END) is not _END:
                    raise IndexError("all slots are in use")
                return
            worker, slot = ahead.popleft()
            yield Made(worker.receive(), slot)
    finally:
        if os.getpid() == maker:  # not in a fork that collects this as garbage
            for worker in crew:
                worker.end()
            until = time.monotonic() + 5
            for worker in crew:
                worker.wait(until)


_END: Any = object()


def _start_method() -> str | None:
    """Forked, unless the program has chosen otherwise: Python 3.14's own choice imports torch anew in every worker."""
    chosen = multiprocessing.get_start_method(allow_none=True)
    return chosen or ("fork" if sys.platform == "linux" else None)


# In a worker


def _work(pipe: Connection[Any, Any], number: int, function: Callable[..., Any], slots: Slots) -> None:
    global _asker
    _asker = os.getppid()
    for end in list(_ends):  # the asking process's: a copy here would hide from the workers that it is gone
        end.close()
    _settle()
    as_courtesy()  # what a decoder or a transform of the user's prints
    _count_here(slots.notes, number)
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, tasks), daemon=True).start()
    while True:
        task, slot = tasks.get()
        slots.notes[number] = _IDLE
        answer = _answer(function, task, slots, slot)
        slots.notes[number] = _IDLE
        try:
            pipe.send(answer)
        except OSError:  # nobody wants it any more
            os._exit(0)


def _listen(pipe: Connection[Any, Any], tasks: queue.SimpleQueue[Any]) -> None:
    """Takes tasks as they come, so that the training process never waits to be rid of one."""
    while True:
        try:
            tasks.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(0)  # the training process is done with this worker, or gone


def _answer(function: Callable[..., Any], task: Any, slots: Slots, slot: int) -> tuple[Any, Exception | None, str]:
    try:
        return function(task, slots, slot), None, ""
    except Exception as error:  # it is raised again in the process that asks
        where = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # whatever an exception of the user's own transforms does when it is copied
            error = TlxError(f"{type(error).__name__}: {error}")
        return None, error, where


def _count_here(notes: Any, number: int) -> None:
    global _note
    _note = lambda sample: notes.__setitem__(number, sample)  # noqa: E731


def _settle() -> None:
    """A request to stop is the training process's business, which finishes its step with the workers' help.

    Schedulers and terminals signal the whole process group. Only the training process itself may end a worker by
    SIGTERM (multiprocessing does, when it leaves), so whom the signal comes from has to be looked at.
    """
    use_one_thread()
    for number in _REQUESTS - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})  # the others were blocked until here
        asking = multiprocessing.parent_process()  # not os.getppid(): a fork server may stand between
        if asking is not None:
            threading.Thread(target=_end_with_parent, args=(asking.pid,), daemon=True).start()


def use_one_thread() -> None:
    """Of torch, in a worker that has imported it: as many workers as cores is the usual case."""
    if is_worker() and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
