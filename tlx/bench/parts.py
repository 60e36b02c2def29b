"""What each part of the way from a tar to a batch costs, in one process.

Some parts cannot be told apart from outside, such as decoding and resizing, which one call does. So the way is walked
up to each point, with the same pictures, and what a point costs more than the one before is its part. Decoding alone
writes the region at its own size, which nobody wants: that is measured too, and taken off.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from tlx.base.errors import UserError
from tlx.bench.clock import Spent, in_turn
from tlx.bench.floor import Floor, prepare
from tlx.bench.look import Look
from tlx.data.pixels.crop_geometry import Draw
from tlx.data.pixels.decode import DecodeError, decode
from tlx.data.pixels.fused_crop import show
from tlx.data.pixels.jpeg_region import Regions
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.order import Ids
from tlx.data.stream.randomness import own_randomness
from tlx.data.stream.reader import ReadError, ShardReader

_MOST = 512  # pictures that are measured
_BATCH = 64


@dataclass(frozen=True)
class Parts:
    """Per image.

    Attributes:
        parts: in the order in which they happen, by name: read, header, decode, resize, crop, one of each further
            transform, batch.
        transforms: names of the further transforms.
        whole: all of it, measured in one go: batches of the loader without workers.
        floor: see `tlx.bench.floor`; `floor_is` says how it is done here.
        cold_read: seconds by the clock, one read at a time, after the system was asked to forget what it had in memory;
            None where it cannot be asked.
        regions: whether the extension decodes these pictures.
        pictures: those that were measured: their bytes and the keys of their views.
        sizes: of those, width and height, upright.
    """

    parts: Mapping[str, Spent]
    transforms: Sequence[str]
    whole: Spent
    floor: Spent
    floor_is: str
    cold_read: float | None
    regions: bool
    pictures: Sequence[tuple[bytes, int]]
    sizes: Sequence[tuple[int, int]]


def measure(look: Look, *, seconds: float) -> Parts:
    """
    Raises:
        UserError: no picture can be read.
    """
    batch, count = _extent(look, seconds)
    ids = look.first(batch=batch, count=count)
    cold = cold_read(look.manifest, ids)
    samples, pictures = readable(look, ids)
    floor = prepare(look.framing, pictures, look.channels, upright=look.upright, scaled=look.scaled)
    again = look.again(batch=batch, count=count)
    chain = _chain(look, pictures, floor)
    steps = _steps(look, pictures)
    reader = ShardReader(look.manifest)
    tasks: dict[str, Callable[[], Any]] = {
        "read": lambda: [reader.read(sample) for sample in samples],
        **chain,
        **steps,
        "floor": floor.resize,
        "write": floor.write,
        "whole": lambda: deque(islice(again, count), maxlen=0),
    }
    with own_randomness():  # the further transforms draw from the global states
        found = in_turn(tasks, seconds=seconds)
    shown = {name: spent.per(batch * count if name == "whole" else len(samples)) for name, spent in found.items()}
    walked = {**shown, "decode": _minus(shown["decode"], shown["write"])}
    parts = {"read": shown["read"], **_differences(walked, list(chain)), **{name: shown[name] for name in steps}}
    parts["batch"] = _minus(shown["whole"], *parts.values())
    return Parts(
        parts, list(steps), shown["whole"], shown["floor"], floor.what, cold, bool(floor.cuts), pictures, floor.sizes
    )


def _extent(look: Look, seconds: float) -> tuple[int, int]:
    """How large a batch, and how many, so that a few rounds fit into the time."""
    few, samples = min(8, len(look.shown)), len(look.shown)
    again = look.again(batch=few, count=1)
    next(again)
    began = time.perf_counter()
    next(again)
    each = (time.perf_counter() - began) / few
    wanted = int(min(seconds / 6 / (6 * each), _MOST, samples))  # a round shows every picture about six times
    batch = min(max(wanted, few), _BATCH)
    return batch, max(wanted // batch, 1)


def readable(look: Look, ids: Ids) -> tuple[list[int], list[tuple[bytes, int]]]:
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


def cold_read(manifest: Manifest, ids: Ids, most: int = 128) -> float | None:
    """Seconds per read from where the tars lie."""
    if not hasattr(os, "posix_fadvise"):
        return None
    samples = ids[:most].tolist()
    for sample in samples:
        path, offset, size = manifest.locate(sample)
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_DONTNEED)
    reader = ShardReader(manifest)
    began = time.perf_counter()
    for sample in samples:
        with suppress(ReadError):
            reader.read(sample)
    return (time.perf_counter() - began) / len(samples)


def _chain(look: Look, pictures: Sequence[tuple[bytes, int]], floor: Floor) -> dict[str, Callable[[], Any]]:
    """From bytes to the framed picture, or to the decoded one; each does what the one before does, and more."""
    framed = look.framed
    if framed is None:
        return {"decode": lambda: [decode(data, look.channels, upright=look.upright).shape for data, _ in pictures]}
    framing = framed.framing
    regions = Regions(framing, upright=look.upright, scaled=look.scaled)
    out = np.empty((*framing.size, min(look.channels, 3)), np.uint8)

    def frame() -> None:
        for data, key in pictures:
            if look.channels == 4 or not regions.show(data, key, out):
                image = decode(data, look.channels, upright=look.upright)
                show(image, framing(image.shape[-1], image.shape[-2], Draw(key)), bicubic=framing.bicubic)

    return {**floor.stages(), "crop": frame}


def _steps(look: Look, pictures: Sequence[tuple[bytes, int]]) -> dict[str, Callable[[], Any]]:
    """Each further transform, of what the ones before have made."""
    images: list[Tensor] = []
    framed = look.framed
    for data, key in pictures if look.steps else ():
        image = decode(data, look.channels, upright=look.upright)
        if framed:
            frame = framed.framing(image.shape[-1], image.shape[-2], Draw(key))
            image = show(image, frame, bicubic=framed.framing.bicubic).contiguous()
        images.append(image)
    tasks: dict[str, Callable[[], Any]] = {}
    for name, step in look.steps:

        def apply(images: list[Tensor] = images, step: Callable[[Tensor], Tensor] = step) -> list[Tensor]:
            return [step(image) for image in images]

        images = apply()
        tasks[name if name not in tasks else f"{name} ({len(tasks) + 1})"] = apply
    return tasks


def _differences(found: Mapping[str, Spent], chain: Sequence[str]) -> dict[str, Spent]:
    before = [None, *chain[:-1]]
    return {name: _minus(found[name], *([found[b]] if b else [])) for name, b in zip(chain, before, strict=True)}


def _minus(whole: Spent, *parts: Spent) -> Spent:
    """What is left; noise may leave less than nothing."""
    return Spent(max(whole.wall - sum(p.wall for p in parts), 0.0), max(whole.cpu - sum(p.cpu for p in parts), 0.0))
