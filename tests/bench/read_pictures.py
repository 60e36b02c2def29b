"""Every file of some folders as tlx reads it, beside Pillow: the same pixels, or refused by name.

``python tests/bench/read_pictures.py FOLDER ... [--json FILE]``. Made for the test images of libraries, such as
Pillow's ``Tests/images`` and imagecodecs' ``tests``, which hold every odd kind of file. Exit 1 where a file is read
otherwise than Pillow reads it, or although Pillow refuses it.

What Pillow shows is its picture of the first frame, turned by `ImageOps.exif_transpose`, in RGB; 16 and 12 bits are
shifted to 8. JPEGs pass through other versions of libjpeg-turbo, which may differ by `ROUNDED` levels. tlx's own
decoder is asked for the whole picture, too.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tlx.data.pixels.crop_geometry import Exactly, ResizedCrop
from tlx.data.pixels.decode import FORMATS, MAX_PIXELS, DecodeError, decode
from tlx.data.pixels.jpeg_region import Regions
from tlx.data.pixels.one_picture import at_picture
from tlx.data.shards.examine import examine

ROUNDED = 3
Verdict = Literal["same", "refused", "refused by tlx alone", "DIFFERENT", "READ BY TLX ALONE", "CHECKED OTHERWISE"]
FAULTS = ("DIFFERENT", "READ BY TLX ALONE", "CHECKED OTHERWISE")


@dataclass(frozen=True)
class Reading:
    """
    Attributes:
        said: the reason of a refusal, or what differs.
        pillow: what Pillow says against the file.
    """

    file: str
    verdict: Verdict
    said: str = ""
    pillow: str = ""


def by_pillow(data: bytes) -> NDArray[np.uint8]:
    """[height, width, 3]; raises whatever Pillow raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data), formats=[f for f in FORMATS if f in Image.OPEN])
        if image.width * image.height > MAX_PIXELS:
            raise ValueError("a decompression bomb")
        bits = 12 if getattr(image, "tag_v2", {}).get(258) in (12, (12,)) else 16
        image.load()
        try:
            image = ImageOps.exif_transpose(image)
        except Exception as error:  # a broken note: the picture as it is
            print(f"  (its EXIF cannot be read by Pillow: {error})", file=sys.stderr)
        if image.mode.startswith("I"):
            grey = np.clip(np.asarray(image).astype(np.int64) >> (bits - 8), 0, 255).astype(np.uint8)
            return np.stack([grey] * 3, 2)
        if image.mode == "La":
            image = image.convert("LA")
        return np.asarray(image.convert("RGB"))


def by_tlx(data: bytes) -> NDArray[np.uint8]:
    """
    Raises:
        DecodeError: it is refused.
    """
    return decode(data).permute(1, 2, 0).numpy()


def by_region(data: bytes, like: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """By tlx's own decoder; None where that leaves the file to others."""
    height, width = like.shape[:2]
    out = np.zeros_like(like)
    shown = Regions(ResizedCrop((height, width), False, Exactly(width, height))).show(data, 0, out)
    return out if shown else None


def look(file: Path, name: str) -> Reading:
    data, wanted, pillow = file.read_bytes(), None, ""
    try:
        wanted = by_pillow(data)
    except Exception as error:  # whatever Pillow raises
        pillow = f"{type(error).__name__}: {error}"
    with at_picture(lambda: name):
        try:
            found = by_tlx(data)
        except DecodeError as error:
            return Reading(name, "refused by tlx alone" if wanted is not None else "refused", str(error), pillow)
        if wanted is None:
            return Reading(name, "READ BY TLX ALONE", f"{found.shape[1]} x {found.shape[0]}", pillow)
        jpeg = data[:2] == b"\xff\xd8"
        for how, pixels in (("decoded", found), ("by tlx's own decoder", by_region(data, wanted) if jpeg else None)):
            if pixels is None:
                continue
            if pixels.shape != wanted.shape:
                return Reading(name, "DIFFERENT", f"{how}: {pixels.shape} and not {wanted.shape}")
            most = int(np.abs(pixels.astype(int) - wanted).max())
            if most > (ROUNDED if jpeg else 0):
                return Reading(name, "DIFFERENT", f"{how}: by up to {most} levels")
        try:
            seen = examine(data)
        except DecodeError as error:
            return Reading(name, "CHECKED OTHERWISE", str(error))
        if (seen.height, seen.width) != wanted.shape[:2]:
            return Reading(name, "CHECKED OTHERWISE", f"{seen.width} x {seen.height}")
    return Reading(name, "same")


def files(folders: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    for folder in folders:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                yield file, os.path.relpath(file, folder.parent)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a line for each file")
    said = parser.parse_args(words)
    Image.init()
    readings = [look(file, name) for file, name in files(said.folders)]
    for reading in readings:
        if reading.verdict != "same":
            print(
                f"{reading.verdict}: {reading.file}: {reading.said}"
                + (f" [Pillow: {reading.pillow}]" if reading.pillow else "")
            )
    print(
        f"{len(readings)} files: "
        + ", ".join(f"{n} {v}" for v, n in Counter(r.verdict for r in readings).most_common())
    )
    if said.json:
        said.json.write_text("".join(json.dumps(asdict(r)) + "\n" for r in readings), encoding="utf-8")
    return int(any(reading.verdict in FAULTS for reading in readings))


if __name__ == "__main__":
    sys.exit(main())
