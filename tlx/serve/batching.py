"""Pictures that are asked for one by one, answered together: one thread owns the network and takes what has come.

While the network computes, questions wait; those that wait go through it together, up to a batch. Only where further
pictures are being decoded is their coming waited for, for some milliseconds: nobody who is alone waits.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Told = TypeVar("Told")


@dataclass(frozen=True)
class _Question(Generic[Asked, Told]):
    asked: Asked
    future: Future[Told] = field(default_factory=Future)


class Batching(Generic[Asked, Told]):
    """One thread that answers batches.

    Args:
        answer: answers up to `most` questions, in their order.
        wait_s: how long a batch that is not full waits for questions that are coming.
        seen: is told of each batch: how many there were, and the seconds they took.

    Attributes:
        coming: questions that are being prepared; whoever asks counts them.
        is_well: the last batch was answered.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Asked]], Sequence[Told]],
        most: int,
        wait_s: float,
        seen: Callable[[int, float], None] = lambda count, seconds: None,
    ) -> None:
        self._answer, self._most, self._wait_s, self._seen = answer, most, wait_s, seen
        self._questions: queue.Queue[_Question[Asked, Told] | None] = queue.Queue()
        self.coming = 0
        self.is_well = True
        self._thread = threading.Thread(target=self._work, name="tlx-network", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return self._questions.qsize()

    def ask(self, asked: Asked) -> Future[Told]:
        """The answer to come; a future that is cancelled before its batch begins costs nothing."""
        question: _Question[Asked, Told] = _Question(asked)
        self._questions.put(question)
        return question.future

    def close(self) -> None:
        """Ends the thread after what was asked before."""
        self._questions.put(None)

    def _work(self) -> None:
        while (first := self._questions.get()) is not None:
            batch = [one for one in self._with_others(first) if one.future.set_running_or_notify_cancel()]
            if batch:
                self._tell(batch)

    def _with_others(self, first: _Question[Asked, Told]) -> list[_Question[Asked, Told]]:
        found, until = [first], time.monotonic() + self._wait_s
        while len(found) < self._most:
            left = until - time.monotonic() if self.coming else 0.0
            try:
                question = self._questions.get(timeout=left) if left > 0 else self._questions.get_nowait()
            except queue.Empty:
                break
            if question is None:
                self._questions.put(None)  # for the next look
                break
            found.append(question)
        return found

    def _tell(self, batch: Sequence[_Question[Asked, Told]]) -> None:
        began = time.monotonic()
        try:
            told = self._answer([one.asked for one in batch])
            for one, answer in zip(batch, told, strict=True):
                one.future.set_result(answer)
            self.is_well = True
        except BaseException as error:  # whoever has asked must not wait for ever
            self.is_well = False
            for one in batch:
                if not one.future.done():
                    one.future.set_exception(error)
        self._seen(len(batch), time.monotonic() - began)
