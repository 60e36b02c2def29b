"""Damaged JPEGs against the C extension built with AddressSanitizer: it must give a picture or ValueError, never more.

Started by test_jpeg.py, with libasan preloaded, and PYTHONMALLOC=malloc so that it knows each bytes object:

    python tests/support/fuzz_jpeg.py EXTENSION.so FOLDER_OF_JPEGS COUNT SEED

Half-way and at the end the memory in use is compared: a decoder that leaks on its error path grows.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import random
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

CROSSOVER = 24
"""A decoder lives for so many pictures, so that what one leaves behind meets the next."""


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_jpeg", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scan_start(data: bytes) -> int:
    at = data.find(b"\xff\xda")
    return at if at > 0 else len(data) // 2


def flipped(rng: random.Random, data: bytes) -> bytes:
    """Some bytes changed, the header's as often as the scan's."""
    out = bytearray(data)
    end = scan_start(data) if rng.random() < 0.5 else len(out)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(max(1, end))
        out[at] = rng.choice((out[at] ^ (1 << rng.randrange(8)), rng.randrange(256), 0, 0xFF))
    return bytes(out)


def cut(rng: random.Random, data: bytes) -> bytes:
    """The end is missing; sometimes an end marker is put there, so that it looks whole."""
    kept = data[: rng.randrange(len(data))]
    return kept + b"\xff\xd9" if rng.random() < 0.7 else kept


def spliced(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """One picture's header with another's scan, or a piece moved from one to the other."""
    if rng.random() < 0.5:
        return data[: scan_start(data)] + other[scan_start(other) :]
    start, length = rng.randrange(len(other)), rng.randrange(1, 200)
    at = rng.randrange(len(data))
    return data[:at] + other[start : start + length] + data[at + rng.choice((0, length)) :]


def resized(rng: random.Random, data: bytes) -> bytes:
    """Another width, height, number of components or sampling in the frame header."""
    out = bytearray(data)
    for marker in (b"\xff\xc0", b"\xff\xc1", b"\xff\xc2"):
        at = data.find(marker)
        if 0 < at < len(data) - 19:
            break
    else:
        return flipped(rng, data)
    for _ in range(rng.choice((1, 1, 2))):
        what = rng.randrange(6)
        if what < 3:
            side = at + rng.choice((5, 7))
            out[side : side + 2] = rng.choice((rng.randrange(1, 400), rng.randrange(65536), 0, 1, 65535)).to_bytes(
                2, "big"
            )
        elif what == 3:
            out[at + 1] = rng.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCA))
        elif what == 4:
            out[at + 9] = rng.choice((0, 1, 2, 3, 4, 5))
        else:
            out[at + 11 + 3 * rng.randrange(3)] = rng.choice((0x11, 0x12, 0x21, 0x22, 0x41, 0x14, 0x42, 0x44, 0x31, 0))
    return bytes(out)


def mutated(rng: random.Random, bases: list[bytes]) -> bytes:
    data = rng.choice(bases)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        what = rng.randrange(8)
        if not data:
            break
        if what < 3:
            data = flipped(rng, data)
        elif what < 5:
            data = cut(rng, data)
        elif what == 5:
            data = spliced(rng, data, rng.choice(bases))
        elif what == 6:
            data = resized(rng, data)
    return data


def inside(rng: random.Random, length: int) -> tuple[int, int]:
    """Start and size of a piece of `length`, often all of it, often at an edge."""
    size = length if rng.random() < 0.2 else rng.randint(1, length)
    return rng.choice((0, length - size, rng.randint(0, length - size))), size


def view(rng: random.Random, decoder: Any, width: int, height: int) -> None:
    (left, wide), (top, high) = inside(rng, width), inside(rng, height)
    resized_width = wide if rng.random() < 0.15 else rng.choice((1, 2, 7, rng.randint(1, 96), rng.randint(1, 300)))
    resized_height = high if rng.random() < 0.15 else rng.choice((1, 2, 7, rng.randint(1, 96), rng.randint(1, 300)))
    (window_left, window_width), (window_top, window_height) = inside(rng, resized_width), inside(rng, resized_height)
    out = bytearray(window_width * window_height * rng.choice((1, 3, 3)))
    crop = (left, top, wide, high)
    if rng.random() < 0.03:  # impossible ones
        crop = tuple(rng.choice((v, -1, 0, v + width, 2**31 - 1, -(2**31))) for v in crop)  # type: ignore[assignment]
    flags = {name: rng.random() < 0.5 for name in ("bicubic", "mirror", "flip")}
    least = rng.choice((0.0, 0.0, 1.0, 2.0, 0.01, rng.random() * 4))
    window = (window_left, window_top, window_width, window_height)
    denominator = decoder.view(out, crop, (resized_width, resized_height), window, least=least, **flags)
    assert denominator in (1, 2, 4, 8)


def run(jpeg: ModuleType, bases: list[bytes], count: int, seed: int) -> Counter[str]:
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    decoder = jpeg.Decoder()
    for i in range(count):
        if i % CROSSOVER == 0:
            decoder = jpeg.Decoder()
        data = mutated(rng, bases)
        try:
            width, height, components = decoder.open(data)
            assert components in (1, 3, 4)
            view(rng, decoder, width, height)
            seen["pictures"] += 1
        except ValueError as error:
            seen["early" if "early" in str(error) else "errors"] += 1
        if i % 4 == 0:
            try:
                rewritten = jpeg.rewrite(data, restarts=rng.random() < 0.5)
                decoder.open(rewritten)
                seen["rewritten"] += 1
            except ValueError:
                seen["not rewritten"] += 1
    return seen


def main() -> None:
    path, folder, count, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    jpeg = load(path)
    bases = [file.read_bytes() for file in sorted(folder.glob("*.jpg"))]
    assert len(bases) >= 10, f"only {len(bases)} JPEGs in {folder}"
    in_use = getattr(ctypes.CDLL(None), "__sanitizer_get_current_allocated_bytes", None)
    if in_use is None:
        raise SystemExit("AddressSanitizer is not loaded")
    in_use.restype = ctypes.c_size_t
    seen: Counter[str] = Counter()
    sizes = []
    for part in range(2):
        seen += run(jpeg, bases, count // 2, seed + part)
        gc.collect()
        sizes.append(in_use())
    print(f"{jpeg.about()}: {dict(seen)}; memory in use {sizes[0]}, then {sizes[1]} bytes")
    # measured: about 100 bytes; with one lost libjpeg object for every 24 pictures 150,000
    if sizes[1] - sizes[0] > 20_000:
        raise SystemExit(f"memory in use grew by {sizes[1] - sizes[0]} bytes")


if __name__ == "__main__":
    main()
