"""What a picture costs from a tar to a batch in one process, and the floor. `py-spy record --native` tells where."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

from tlx.base.errors import UserError
from tlx.bench.clock import Spent, in_turn
from tlx.bench.floor import prepare
from tlx.bench.measured_view import MeasuredView
from tlx.data.pixels.decode import DecodeError, decode
from tlx.data.stream.order import Ids
from tlx.data.stream.randomness import own_randomness
from tlx.data.stream.reader import ReadError, ShardReader

_MOST = 512  # pictures that are measured
_BATCH = 64


@dataclass(frozen=True)
class Parts:
    """Per image.

    Attributes:
        whole: batches of the loader without workers.
        floor: see `tlx.bench.floor`; `floor_is` says how it is done here.
        regions: whether the extension decodes these pictures.
        bytes: of an image on average.
        sizes: of those that were measured, width and height, upright.
    """

    whole: Spent
    floor: Spent
    floor_is: str
    regions: bool
    bytes: float
    sizes: Sequence[tuple[int, int]]


def measure(look: MeasuredView, *, seconds: float) -> Parts:
    """
    Raises:
        UserError: no picture can be read.
    """
    batch, count = _extent(look, seconds)
    samples, pictures = readable(look, look.first(batch=batch, count=count))
    floor = prepare(look.framing, pictures, look.channels, upright=look.upright, scaled=look.scaled)
    again = look.again(batch=batch, count=count)
    with own_randomness():  # transforms after the crop draw from the global states
        found = in_turn(
            {"floor": floor.resize, "whole": lambda: deque(islice(again, count), maxlen=0)}, seconds=seconds
        )
    mean = sum(len(data) for data, _ in pictures) / len(pictures)
    whole, least = found["whole"].per(batch * count), found["floor"].per(len(samples))
    return Parts(whole, least, floor.what, bool(floor.cuts), mean, floor.sizes)


def _extent(look: MeasuredView, seconds: float) -> tuple[int, int]:
    """How large a batch, and how many, so that a few rounds fit into the time."""
    samples = len(look.shown)
    wanted = int(min(seconds / 6 / (2 * look.seconds_each()), _MOST, samples))  # a round shows each about twice
    batch = min(max(wanted, min(8, samples)), _BATCH)
    return batch, max(wanted // batch, 1)


def readable(look: MeasuredView, ids: Ids) -> tuple[list[int], list[tuple[bytes, int]]]:
    """The samples whose pictures can be read, with bytes and keys; the others are for `tlx shards check`."""
    reader, samples, pictures = ShardReader(look.manifest), [], []
    for sample in ids.tolist():
        with suppress(ReadError, DecodeError):
            data = reader.read(sample)
            decode(data, look.channels)
            samples.append(sample)
            pictures.append((data, look.key(sample)))
    if not pictures:
        raise UserError(
            f"none of {len(ids)} pictures can be read",
            where=look.manifest.location,
            todo="tlx shards check names what is wrong with each",
        )
    return samples, pictures
