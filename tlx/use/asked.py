"""Pictures of any number of sources that a network is asked about, batch by batch, in parts that ranks share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from tlx.base.errors import UserError
from tlx.base.terminal import say
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.file_list import FileList
from tlx.data.stream.reader import BadSample
from tlx.use.forward import Answers, Forward

Source = Manifest | FileList

_PART = 4096  # pictures whose rows are in memory, and are computed again after a kill
_SHARES = 8  # parts for each rank at least, so that none has much more to do than the others


@dataclass(frozen=True)
class Part:
    """Batches `first` to before `last` of a source, by its place."""

    source: int
    first: int
    last: int


@dataclass(frozen=True)
class Asked:
    """What is asked of a network.

    Attributes:
        batch: pictures at once.
        workers: processes that decode, on each rank; None: two where there is enough to do.
        skip_bad: a picture that cannot be read is told and passed over; else it ends the command.
    """

    forward: Forward
    sources: Sequence[Source]
    batch: int
    workers: int | None = None
    skip_bad: bool = False

    @property
    def pictures(self) -> int:
        return sum(map(len, self.sources))

    def parts(self, ranks: int) -> list[Part]:
        batches = [-(-len(source) // self.batch) for source in self.sources]
        size = max(1, min(_PART // self.batch, sum(batches) // (ranks * _SHARES)))
        return [
            Part(i, first, min(first + size, count))
            for i, count in enumerate(batches)
            for first in range(0, count, size)
        ]

    def batches(self, parts: Sequence[Part]) -> Iterator[tuple[Part, Source, Answers, bool]]:
        """Of each batch of these parts, in order: the part, the source, the answers, whether it is the part's last.

        Raises:
            UserError: a picture cannot be read.
        """
        for place, group in itertools.groupby(parts, key=lambda part: part.source):
            own = list(group)
            numbers = [number for part in own for number in range(part.first, part.last)]
            workers = self.workers
            if workers is None:
                workers = 2 if len(numbers) > 4 else 0
            source, batch = self.sources[place], self.batch
            with closing(self.forward.answers(source, batch=batch, workers=workers, batches=numbers)) as answers:
                for part in own:
                    for number in range(part.first, part.last):
                        found = next(answers)
                        self._tell(found.bad)
                        yield part, source, found, number + 1 == part.last

    def _tell(self, bad: Sequence[BadSample]) -> None:
        for one in bad:
            if not self.skip_bad:
                raise UserError(str(one), todo="mend it, or --skip-bad gives it a row with its error")
            say(f"skipped: {one}", error=True)


def name_of(source: Source, place: int) -> str:
    return source.paths[place] if isinstance(source, FileList) else source.describe(place)
