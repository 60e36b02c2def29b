"""What a backbone wants to see."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from tlx.base.errors import UserError

Interpolation = Literal["nearest", "bilinear", "bicubic"]

EVALUATION_BATCH = 64
"""Pictures that go through a network at once outside of training, where nobody says otherwise."""

TRAINING_VIEW = ("random_resized_crop", "horizontal_flip")
"""Transforms of training pictures, where a configuration names none."""


@dataclass(frozen=True)
class InputSpec:
    """The evaluation view of a pretrained backbone.

    Attributes:
        size: height and width in pixels that enter the network.
        mean, std: per channel, for pixels scaled to [0, 1]; as many as the images have channels.
        interpolation: of the evaluation resize.
        crop_pct: the share of the resized short side that the centre crop keeps (0.875: resize 256, crop 224).

    Raises:
        UserError: more means than standard deviations, or fewer; numbers that no picture can be read by.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: Interpolation = "bilinear"
    crop_pct: float = 0.875

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise UserError(f"{len(self.mean)} means and {len(self.std)} standard deviations of an input's channels")
        odd = [*(m for m in self.mean if not math.isfinite(m)), *(s for s in self.std if not 0 < s < math.inf)]
        odd += [n for n in (*self.size, self.crop_pct) if not 0 < n < math.inf]
        if odd:
            raise UserError(f"an input of {self}: {odd[0]} is out of range")

    @property
    def channels(self) -> int:
        return len(self.mean)

    def for_channels(self, channels: int) -> InputSpec:
        """The same for images of another number of channels.

        Fewer channels each get the average over the present ones (grey); channels beyond these (alpha) get 0.5 and 0.5.
        """
        return replace(self, mean=_for(self.mean, channels), std=_for(self.std, channels))


def _for(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if channels < len(values):
        return (sum(values) / len(values),) * channels
    return (*values, *(0.5,) * (channels - len(values)))
