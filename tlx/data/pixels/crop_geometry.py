"""Which part of a picture is shown, and how large: geometry, before there are pixels.

Nearly every list of transforms begins with a crop, a resize and a mirror image. Said as numbers, a decoder can obey
them while it decodes, and touch no more of the picture than is shown; done after decoding they give the same picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from tlx.data.pixels.orientation import steps

Rectangle = tuple[int, int, int, int]
"""Left, top, width, height in pixels."""


class Frame(NamedTuple):
    """What is shown of one picture, in this order: `crop` it, resize the crop to `resized`, cut `window` out of that,
    and `mirrored`, reverse its columns.

    Attributes:
        crop: of the upright picture.
        resized: width and height.
        window: of the resized crop.
    """

    crop: Rectangle
    resized: tuple[int, int]
    window: Rectangle
    mirrored: bool = False


class Draw:
    """Uniform numbers that `key` alone decides, the same on every machine: SplitMix64 (Steele, Lea and Flood 2014,
    "Fast splittable pseudorandom number generators"), with which a picture's four numbers cost as much as one call of
    torch's generator.
    """

    __slots__ = ("_state",)

    def __init__(self, key: int) -> None:
        self._state = key

    def uniform(self) -> float:
        """From 0 to below 1, in steps of 2**-53."""
        self._state = z = (self._state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        return ((z ^ (z >> 31)) >> 11) * 2.0**-53

    def below(self, count: int) -> int:
        """A whole number from 0 to below `count`."""
        return int(self.uniform() * count)


class Framing(Protocol):
    """How the pictures of a data set are framed.

    Attributes:
        size: height and width of what is shown.
        bicubic: how it is resampled; otherwise bilinear. Antialiased in either case.
    """

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def bicubic(self) -> bool: ...

    def __call__(self, width: int, height: int, draw: Draw) -> Frame:
        """The frame of an upright picture of this size."""
        ...


@dataclass(frozen=True)
class RandomResized:
    """A random part of the picture, resized: torchvision's RandomResizedCrop (Szegedy et al. 2015, arXiv:1409.4842).

    Attributes:
        scale: of the part's area, as a share of the picture's.
        ratio: of its width to its height.
        mirror: the probability of a mirror image.
    """

    size: tuple[int, int]
    bicubic: bool
    scale: tuple[float, float]
    ratio: tuple[float, float]
    mirror: float = 0.0

    def __call__(self, width: int, height: int, draw: Draw) -> Frame:
        crop = self._crop(width, height, draw)
        rows, columns = self.size
        mirrored = self.mirror > 0 and draw.uniform() < self.mirror
        return Frame(crop, (columns, rows), (0, 0, columns, rows), mirrored)

    def _crop(self, width: int, height: int, draw: Draw) -> Rectangle:
        least, most = self.scale
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = width * height * (least + (most - least) * draw.uniform())
            ratio = math.exp(low + (high - low) * draw.uniform())
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return draw.below(width - w + 1), draw.below(height - h + 1), w, h
        w, h = width, height
        if width / height < self.ratio[0]:
            h = max(round(width / self.ratio[0]), 1)
        elif width / height > self.ratio[1]:
            w = max(round(height * self.ratio[1]), 1)
        return (width - w) // 2, (height - h) // 2, w, h


@dataclass(frozen=True)
class ResizedCrop:
    """The whole picture resized, and a part of fixed size cut out of it, from the middle or at random.

    Attributes:
        resize: from the picture's (width, height) to the new one, which is nowhere smaller than `size`.
        anywhere: the part lies at a random place.
        mirror: the probability of a mirror image.
    """

    size: tuple[int, int]
    bicubic: bool
    resize: Callable[[int, int], tuple[int, int]]
    anywhere: bool = False
    mirror: float = 0.0

    def __call__(self, width: int, height: int, draw: Draw) -> Frame:
        resized = self.resize(width, height)
        rows, columns = self.size
        free = resized[0] - columns, resized[1] - rows
        if self.anywhere:
            top, left = draw.below(free[1] + 1), draw.below(free[0] + 1)
        else:
            left, top = round(free[0] / 2), round(free[1] / 2)
        mirrored = self.mirror > 0 and draw.uniform() < self.mirror
        return Frame((0, 0, width, height), resized, (left, top, columns, rows), mirrored)


@dataclass(frozen=True)
class ShortSide:
    """A resize that gives the short side `length` pixels and keeps the proportions, rounding the long one down."""

    length: int

    def __call__(self, width: int, height: int) -> tuple[int, int]:
        if width <= height:
            return self.length, int(self.length * height / width)
        return int(self.length * width / height), self.length


@dataclass(frozen=True)
class Exactly:
    """A resize to a fixed width and height."""

    width: int
    height: int

    def __call__(self, width: int, height: int) -> tuple[int, int]:
        return self.width, self.height


@dataclass(frozen=True)
class Cover:
    """A resize that keeps the proportions, to the smallest picture that covers `width` x `height`."""

    width: int
    height: int

    def __call__(self, width: int, height: int) -> tuple[int, int]:
        factor = max(self.height / height, self.width / width)
        return max(round(width * factor), self.width), max(round(height * factor), self.height)


class Stored(NamedTuple):
    """A frame of a picture as it is stored, which a camera may have turned.

    Attributes:
        frame: in stored pixels; what comes of it is still to be turned:
        mirror, flip: its columns, its rows are to be reversed (the frame's own mirror image is among them);
        transposed: then rows and columns are to be exchanged.
    """

    frame: Frame
    mirror: bool
    flip: bool
    transposed: bool


def stored(frame: Frame, width: int, height: int, orientation: int) -> Stored:
    """The frame of an upright picture, for the picture as it is stored.

    Args:
        width, height: as stored.
        orientation: EXIF's number, 1 (upright) to 8.
    """
    if orientation == 1:
        return Stored(frame, frame.mirrored, False, False)
    mirror, flip, transposed = steps(orientation)
    crop, resized, window = frame.crop, frame.resized, frame.window
    if transposed:
        crop, window, resized = _exchanged(crop), _exchanged(window), (resized[1], resized[0])
    crop = _reversed(crop, width if mirror else None, height if flip else None)
    window = _reversed(window, resized[0] if mirror else None, resized[1] if flip else None)
    if frame.mirrored:
        mirror, flip = (mirror, not flip) if transposed else (not mirror, flip)
    return Stored(Frame(crop, resized, window), mirror, flip, transposed)


def _exchanged(rectangle: Rectangle) -> Rectangle:
    left, top, width, height = rectangle
    return top, left, height, width


def _reversed(rectangle: Rectangle, columns: int | None, rows: int | None) -> Rectangle:
    left, top, width, height = rectangle
    left = left if columns is None else columns - left - width
    return left, top if rows is None else rows - top - height, width, height
