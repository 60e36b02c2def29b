"""What other files of the same pictures would save: smaller ones, or JPEGs coded anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tlx.bench.clock import in_turn
from tlx.bench.floor import prepare
from tlx.bench.look import Look
from tlx.data.build.content import stored
from tlx.data.pixels import jpeg_region as regions
from tlx.data.pixels.decode import DecodeError

_SOME = 24
_LARGE = 1.5  # short sides beyond what an evaluation resizes to, from which smaller files are worth a look


@dataclass(frozen=True)
class Saving:
    """Attributes:
    option: of `tlx shards build`.
    before, after: seconds of processors per image for decoding and resizing.
    bytes_before, bytes_after: of an image on average.
    """

    option: str
    before: float
    after: float
    bytes_before: float
    bytes_after: float

    @property
    def share(self) -> float:
        return 1 - self.after / self.before


def savings(
    look: Look, pictures: Sequence[tuple[bytes, int]], sizes: Sequence[tuple[int, int]], *, crop_pct: float,
    seconds: float,
) -> list[Saving]:  # fmt: skip
    """For the options of `tlx shards build` that could help: some pictures are made anew, and shown."""
    jpegs = [
        (data, key, min(size)) for (data, key), size in zip(pictures, sizes, strict=True) if data[:2] == b"\xff\xd8"
    ]
    some = jpegs[:: max(len(jpegs) // _SOME, 1)][:_SOME]
    if not some or look.framed is None:
        return []
    side = math.floor(min(look.size) / crop_pct + 1e-6)
    large = sorted(short for _, _, short in some)[len(some) // 2] > _LARGE * side
    options: dict[str, tuple[int | None, bool]] = {f"--resize {side}": (side, False)} if large else {}
    if regions._jpeg is not None:
        options["--rewrite"] = (None, True)
    sets = {"": [(data, key) for data, key, _ in some]}
    for option, (resize, rewrite) in options.items():
        try:
            sets[option] = [
                (stored(data, "jpg", resize=resize, quality=95, rewrite=rewrite, measured=False).data, key)
                for data, key in sets[""]
            ]
        except DecodeError:
            continue
    floors = {
        name: prepare(look.framing, made, look.channels, upright=look.upright, scaled=look.scaled)
        for name, made in sets.items()
    }
    found = in_turn({name: floor.resize for name, floor in floors.items()}, seconds=seconds)

    def length(name: str) -> float:
        return sum(len(data) for data, _ in sets[name]) / len(some)

    return [
        Saving(name, found[""].cpu / len(some), found[name].cpu / len(some), length(""), length(name))
        for name in sets
        if name
    ]
