"""What a backbone wants to see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Interpolation = Literal["nearest", "bilinear", "bicubic"]


@dataclass(frozen=True)
class InputSpec:
    """The evaluation view of a pretrained backbone.

    Attributes:
        size: height and width in pixels that enter the network.
        mean, std: per channel, for pixels scaled to [0, 1].
        interpolation: of the evaluation resize.
        crop_pct: the share of the resized short side that the centre crop keeps (0.875: resize 256, crop 224).
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: Interpolation = "bilinear"
    crop_pct: float = 0.875
