"""From uploads to rows: a bounded number of pictures is decoded in threads and answered in batches."""

from __future__ import annotations

import asyncio
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from torch import Tensor

from tlx.serve.batching import Batching
from tlx.serve.decoding import Decoder, Refused
from tlx.serve.metrics import Metrics
from tlx.serve.network import Network

_DECODERS = 8  # threads, at most
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Limits:
    """What one client may cost the others.

    Attributes:
        body_bytes: of a request.
        pixels: of a picture.
        pictures: that are decoded and answered at once; a further request is told to come again.
        seconds: from a request's head to its answer.
        files: of a request.
    """

    body_bytes: int = 20 << 20
    pixels: int = 50_000_000
    pictures: int = 64
    seconds: float = 30.0

    @property
    def files(self) -> int:
        return min(32, self.pictures)

    @property
    def uploads(self) -> int:
        """At once; of each a megabyte at most is in memory."""
        return 4 * self.pictures


@dataclass(frozen=True)
class Batches:
    """How pictures go through the network together.

    Attributes:
        most: at once.
        wait_s: see :class:`Batching`.
        is_fixed: always as many, missing ones filled up: a picture's numbers do not depend on who else asks.
    """

    most: int = 8
    wait_s: float = 0.005
    is_fixed: bool = False

    @property
    def sizes(self) -> list[int]:
        """A batch has the least of them that is enough: powers of two, so that there are few."""
        if self.is_fixed:
            return [self.most]
        return [*(2**i for i in range(self.most.bit_length()) if 2**i < self.most), self.most]

    def size_of(self, count: int) -> int:
        return next(size for size in self.sizes if size >= count)


@dataclass(frozen=True)
class Upload:
    """
    Attributes:
        name: as the client calls it: it is shown, and used for nothing else.
        file: its bytes, in memory or, of large ones, in a temporary file without a name.
    """

    name: str
    file: IO[bytes]


def spooled() -> IO[bytes]:
    return tempfile.SpooledTemporaryFile(max_size=1 << 20)  # type: ignore[return-value]


class Service:
    """
    Attributes:
        uploads: requests whose body comes.
        held: pictures that are decoded and answered.
        is_stopping: it takes nothing new.
    """

    def __init__(self, network: Network, batches: Batches, limits: Limits) -> None:
        self.network, self.batches, self.limits = network, batches, limits
        self.metrics = Metrics(batches.most)
        self.uploads, self.held, self.is_stopping = 0, 0, False
        self._decode = Decoder(network.description, limits.pixels)
        self._decoders = ThreadPoolExecutor(min(_DECODERS, os.cpu_count() or 1), thread_name_prefix="tlx-decode")
        self._batching = Batching(self._answers, batches.most, batches.wait_s, self.metrics.batch)
        self.metrics.gauge("tlx_pictures_held", "Pictures that are decoded and answered.", lambda: self.held)
        self.metrics.gauge("tlx_uploads", "Requests whose body comes.", lambda: self.uploads)
        self.metrics.gauge("tlx_pictures_waiting", "Pictures that wait for the network.", self.waiting)

    def waiting(self) -> int:
        return self._batching.waiting

    @property
    def is_ready(self) -> bool:
        return self._batching.is_well and not self.is_stopping

    def close(self) -> None:
        self._batching.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def upload(self) -> Iterator[None]:
        """While a request's body comes. Clients that are slow at it keep others of these waiting, and no picture.

        Raises:
            Refused: there is too much to do.
        """
        if self.held >= self.limits.pictures or self.uploads >= self.limits.uploads:
            raise _busy()
        self.uploads += 1
        try:
            yield
        finally:
            self.uploads -= 1

    @contextmanager
    def place(self, count: int) -> Iterator[None]:
        """While so many pictures are decoded and answered.

        Raises:
            Refused: there is no room for them.
        """
        if self.held + count > self.limits.pictures:
            raise _busy()
        self.held += count
        try:
            yield
        finally:
            self.held -= count

    async def rows(self, uploads: Sequence[Upload]) -> list[Row | Refused]:
        """What the network says of each, in their order; of one that cannot be read, why."""
        return await asyncio.gather(*map(self._row, uploads))

    async def _row(self, upload: Upload) -> Row | Refused:
        self._batching.coming += 1
        try:
            decoded = asyncio.get_running_loop().run_in_executor(self._decoders, self._shown, upload)
            answer = self._batching.ask(await decoded)
        except Refused as refused:
            self.metrics.pictures.labels("refused").inc()
            return refused
        finally:
            self._batching.coming -= 1
        row = await asyncio.wrap_future(answer)
        self.metrics.pictures.labels("answered").inc()
        return {"file": upload.name, **row}

    def _shown(self, upload: Upload) -> Tensor:
        """In a thread: bytes of large uploads are in memory only from here on."""
        upload.file.seek(0)
        data = upload.file.read()
        if not data:
            raise Refused(400, "the file is empty")
        return self._decode(upload.name, data)

    def _answers(self, pictures: Sequence[Tensor]) -> list[dict[str, Any]]:
        return self.network.answers(pictures, self.batches.size_of(len(pictures)))


def _busy() -> Refused:
    return Refused(503, "there is too much to do here; come again in a second")


def sayable(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, Mapping):
        return {name: sayable(of) for name, of in value.items()}
    if isinstance(value, list):
        return [sayable(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
