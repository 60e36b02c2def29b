"""A list of transforms as a framing and the rest: the framing can be left to the decoder."""

# torchvision has no types
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from tlx.data.pixels.crop_geometry import Cover, Draw, Exactly, Frame, Framing, RandomResized, ResizedCrop, ShortSide

_MANY = 1 << 26  # pixels of a resized picture of which only a window is shown
_BICUBIC = {InterpolationMode.BILINEAR: False, InterpolationMode.BICUBIC: True}


@dataclass(frozen=True)
class Framed:
    """A view of a picture that begins with a framing.

    Called with a picture, it draws from torch's global state; the loader draws by the sample's key, and lets the
    decoder do the framing where it can.

    Attributes:
        rest: what is done to the framed picture, uint8 [channels, height, width]; None is nothing.
    """

    framing: Framing
    rest: Callable[[Tensor], Tensor] | None = None

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 [channels, any height, any width] to uint8 [channels, size]."""
        draw = Draw(int(torch.randint(2**62, ())))
        framed = show(image, self.framing(image.shape[-1], image.shape[-2], draw), bicubic=self.framing.bicubic)
        return framed if self.rest is None else self.rest(framed)


def show(image: Tensor, frame: Frame, *, bicubic: bool) -> Tensor:
    """What a frame shows of an upright picture, uint8 [channels, height, width]."""
    left, top, width, height = frame.crop
    part = image[..., top : top + height, left : left + width]
    columns, rows = frame.resized
    if columns * rows > _MANY:
        return _window_alone(part, frame, bicubic=bicubic)
    if (columns, rows) != (width, height):
        mode = InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR
        part = v2.functional.resize(part, [rows, columns], interpolation=mode, antialias=True)
    left, top, width, height = frame.window
    part = part[..., top : top + height, left : left + width]
    return part.flip(-1) if frame.mirrored else part


def _window_alone(part: Tensor, frame: Frame, *, bicubic: bool) -> Tensor:
    """The same without making the whole resized crop first, which takes gigabytes for one of 20,000 x 1 pixels.

    By Pillow, which resizes to a part of the result, channel by channel.
    """
    left, top, width, height = frame.window
    x, y = part.shape[-1] / frame.resized[0], part.shape[-2] / frame.resized[1]
    box = (left * x, top * y, min((left + width) * x, part.shape[-1]), min((top + height) * y, part.shape[-2]))
    mode = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    planes = [np.asarray(Image.fromarray(plane.numpy()).resize((width, height), mode, box)) for plane in part]
    shown = torch.from_numpy(np.stack(planes))
    return shown.flip(-1) if frame.mirrored else shown


def framed(steps: Sequence[Any]) -> Framed | None:
    """The same view, if its first steps are a framing: torchvision's RandomResizedCrop, or Resize and a crop, then
    perhaps RandomHorizontalFlip. Others, and subclasses of these, are left as they are: None."""
    framing, used = _crop(steps)
    if framing is None:
        return None
    rest = list(steps[used:])
    if rest and type(rest[0]) is v2.RandomHorizontalFlip:
        framing = replace(framing, mirror=rest.pop(0).p)
    return Framed(framing, v2.Compose(rest) if rest else None)


def _crop(steps: Sequence[Any]) -> tuple[RandomResized | ResizedCrop | None, int]:
    first: Any = steps[0] if steps else None
    if type(first) not in (v2.RandomResizedCrop, v2.Resize, Covering):
        return None, 0
    if getattr(first, "antialias", True) is False:
        return None, 0
    bicubic = _BICUBIC.get(InterpolationMode(first.interpolation))
    if bicubic is None:
        return None, 0
    if type(first) is v2.RandomResizedCrop:
        return RandomResized(_pair(first.size), bicubic, tuple(first.scale), tuple(first.ratio)), 1
    if type(first) is v2.Resize and (first.max_size is not None or first.size is None):
        return None, 0  # a longest side is given: no crop is sure to fit
    resize, least = _resize(first)
    second: Any = steps[1] if len(steps) > 1 else None
    if type(second) in (v2.CenterCrop, v2.RandomCrop):
        size, padded = _pair(second.size), getattr(second, "padding", None)
        if size[0] <= least[0] and size[1] <= least[1] and not padded:
            return ResizedCrop(size, bicubic, resize, anywhere=type(second) is v2.RandomCrop), 2
    return (ResizedCrop(least, bicubic, resize), 1) if isinstance(resize, Exactly) else (None, 0)


def _resize(step: v2.Resize | Covering) -> tuple[ShortSide | Exactly | Cover, tuple[int, int]]:
    """The rule, and the least height and width that it makes."""
    if isinstance(step, Covering):
        return Cover(step.width, step.height), (step.height, step.width)
    if len(step.size) == 1:
        return ShortSide(step.size[0]), (step.size[0], step.size[0])
    return Exactly(step.size[1], step.size[0]), (step.size[0], step.size[1])


def _pair(size: Sequence[int]) -> tuple[int, int]:
    return (size[0], size[0]) if len(size) == 1 else (size[0], size[1])


@dataclass(frozen=True)
class Covering:
    """Resizes, keeping the proportions, to the smallest size that covers `height` x `width`."""

    height: int
    width: int
    interpolation: InterpolationMode

    def __call__(self, image: Tensor) -> Tensor:
        columns, rows = Cover(self.width, self.height)(image.shape[-1], image.shape[-2])
        return v2.functional.resize(image, [rows, columns], interpolation=self.interpolation, antialias=True)
