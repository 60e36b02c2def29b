"""Views of a picture: the parts a configuration's ``transforms:`` list is made of, and the evaluation view.

A part is ``f(input, *, ...)`` and gives a torchvision v2 transform for uint8 [channels, height, width] tensors; what it
draws, it draws from the global states of torch, numpy or random, which the loader seeds for each sample and restores.
All work on grey pictures too; those that change colours do not on RGBA, and say so.
Arguments have torchvision's names and defaults, except: sizes default to the backbone's own, resizing to its
interpolation, and `fill` also takes ``mean``, the backbone's mean colour. The longer parts of the list are slow on a
CPU: measure with ``tlx bench data``.
"""

# torchvision has no types
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from tlx.base import plug
from tlx.base.errors import ConfigError, UserError, below
from tlx.base.inputs import InputSpec, Interpolation

if TYPE_CHECKING:
    from torch import Tensor
    from torchvision.transforms import InterpolationMode
else:
    Tensor = Any  # annotations are read when arguments are checked, which needs no torch

__all__ = [
    "affine",
    "augmix",
    "auto_augment",
    "center_crop",
    "color_jitter",
    "gaussian_blur",
    "grayscale",
    "horizontal_flip",
    "perspective",
    "rand_augment",
    "random_crop",
    "random_erasing",
    "random_resized_crop",
    "resize",
    "rotation",
    "shear",
    "trivial_augment",
    "vertical_flip",
]

Pixels = Annotated[int, Field(ge=1, le=8192)]
Size = Pixels | tuple[Pixels, Pixels] | None
Border = Annotated[int, Field(ge=0, le=8192)]
Level = Annotated[int, Field(ge=0, le=255)]
Fill = Level | tuple[Level, ...] | Literal["mean"]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
"""A probability, too."""
Count = Annotated[int, Field(ge=1)]
Bins = Annotated[int, Field(ge=2)]
Strength = NotNegative | tuple[NotNegative, NotNegative] | None
Hue = Annotated[float, Field(ge=-0.5, le=0.5)]
Shift = Annotated[float, Field(ge=0, le=0.5)]


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("the first of a pair is the smaller one")
    return pair


Areas = Annotated[tuple[Share, Annotated[float, Field(gt=0, le=1)]], AfterValidator(_ascending)]
Range = Annotated[tuple[Positive, Positive], AfterValidator(_ascending)]
View = Callable[[Tensor], Tensor]
"""uint8 [channels, any height, any width] to uint8 [channels, size]."""


def random_resized_crop(
    input: InputSpec,
    *,
    size: Size = None,
    scale: Areas = (0.08, 1.0),
    ratio: Range = (3 / 4, 4 / 3),
    interpolation: Interpolation | None = None,
) -> View:
    """A random part of the picture (`scale` of its area, `ratio` width to height), resized."""
    return _v2().RandomResizedCrop(
        _size(size, input), scale=scale, ratio=ratio, interpolation=_mode(interpolation, input), antialias=True
    )


def resize(input: InputSpec, *, size: Size = None, interpolation: Interpolation | None = None) -> View:
    """An integer is the new short side, a pair the new height and width; by default the input's size."""
    new = size if isinstance(size, int) else list(_size(size, input))
    return _v2().Resize(new, interpolation=_mode(interpolation, input), antialias=True)


def center_crop(input: InputSpec, *, size: Size = None) -> View:
    """The middle; smaller pictures get a black border."""
    return _v2().CenterCrop(_size(size, input))


def random_crop(input: InputSpec, *, size: Size = None, padding: Border = 0, fill: Fill = 0) -> View:
    """A random part at the picture's own scale, after `padding` pixels of border; smaller pictures are padded."""
    return _v2().RandomCrop(_size(size, input), padding=padding or None, pad_if_needed=True, fill=_fill(fill, input))


def horizontal_flip(input: InputSpec, *, p: Share = 0.5) -> View:
    """Left to right, with probability `p`."""
    return _v2().RandomHorizontalFlip(p)


def vertical_flip(input: InputSpec, *, p: Share = 0.5) -> View:
    """Top to bottom, with probability `p`."""
    return _v2().RandomVerticalFlip(p)


def color_jitter(
    input: InputSpec,
    *,
    brightness: Strength = None,
    contrast: Strength = None,
    saturation: Strength = None,
    hue: Shift | tuple[Hue, Hue] | None = None,
    p: Share = 1.0,
) -> View:
    """Each strength x draws a factor from 1-x to 1+x (hue: a shift from -x to x, at most 0.5)."""
    _grey_or_rgb(input, "color_jitter")
    return _with_probability(_v2().ColorJitter(brightness, contrast, saturation, hue), p)


def rotation(
    input: InputSpec,
    *,
    degrees: float | tuple[float, float],
    interpolation: Interpolation = "nearest",
    expand: bool = False,
    fill: Fill = 0,
) -> View:
    """A rotation by up to `degrees` either way."""
    return _v2().RandomRotation(
        degrees, interpolation=_mode(interpolation, input), expand=expand, fill=_fill(fill, input)
    )


def shear(
    input: InputSpec,
    *,
    degrees: float | tuple[float, float] | tuple[float, float, float, float],
    interpolation: Interpolation = "nearest",
    fill: Fill = 0,
) -> View:
    """A shear along x by up to `degrees` either way; a pair is a range for x, four numbers are ranges for x and y."""
    return _v2().RandomAffine(0, shear=degrees, interpolation=_mode(interpolation, input), fill=_fill(fill, input))


def affine(
    input: InputSpec,
    *,
    degrees: float | tuple[float, float] = 0,
    translate: tuple[Share, Share] | None = None,
    scale: Range | None = None,
    shear: float | tuple[float, float] | tuple[float, float, float, float] | None = None,
    interpolation: Interpolation = "nearest",
    fill: Fill = 0,
) -> View:
    """Rotation, shift (as a share of the size), scale and shear in one resampling."""
    return _v2().RandomAffine(
        degrees,
        translate=translate,
        scale=scale,
        shear=shear,
        interpolation=_mode(interpolation, input),
        fill=_fill(fill, input),
    )


def perspective(
    input: InputSpec,
    *,
    distortion_scale: Share = 0.5,
    p: Share = 0.5,
    interpolation: Interpolation = "bilinear",
    fill: Fill = 0,
) -> View:
    """A random change of perspective, with probability `p`."""
    return _v2().RandomPerspective(
        distortion_scale, p, interpolation=_mode(interpolation, input), fill=_fill(fill, input)
    )


def rand_augment(
    input: InputSpec,
    *,
    num_ops: Count = 2,
    magnitude: Annotated[int, Field(ge=0)] = 9,
    num_magnitude_bins: Bins = 31,
    interpolation: Interpolation = "nearest",
    fill: Fill = 0,
) -> View:
    """RandAugment (Cubuk et al. 2020, arXiv:1909.13719)."""
    _grey_or_rgb(input, "rand_augment")
    if magnitude >= num_magnitude_bins:
        raise UserError(f"rand_augment: magnitude={magnitude}, of num_magnitude_bins={num_magnitude_bins} from 0 on")
    return _v2().RandAugment(
        num_ops, magnitude, num_magnitude_bins, interpolation=_mode(interpolation, input), fill=_fill(fill, input)
    )


def trivial_augment(
    input: InputSpec, *, num_magnitude_bins: Bins = 31, interpolation: Interpolation = "nearest", fill: Fill = 0
) -> View:
    """TrivialAugment, wide (Müller and Hutter 2021, arXiv:2103.10158)."""
    _grey_or_rgb(input, "trivial_augment")
    return _v2().TrivialAugmentWide(
        num_magnitude_bins, interpolation=_mode(interpolation, input), fill=_fill(fill, input)
    )


def auto_augment(
    input: InputSpec,
    *,
    policy: Literal["imagenet", "cifar10", "svhn"] = "imagenet",
    interpolation: Interpolation = "nearest",
    fill: Fill = 0,
) -> View:
    """AutoAugment's learned policies (Cubuk et al. 2019, arXiv:1805.09501)."""
    _grey_or_rgb(input, "auto_augment")
    return _v2().AutoAugment(
        _v2().AutoAugmentPolicy(policy), interpolation=_mode(interpolation, input), fill=_fill(fill, input)
    )


def augmix(
    input: InputSpec,
    *,
    severity: Annotated[int, Field(ge=1, le=10)] = 3,
    mixture_width: Count = 3,
    chain_depth: Annotated[int, Field(ge=-1)] = -1,
    alpha: Positive = 1.0,
    all_ops: bool = True,
    interpolation: Interpolation = "bilinear",
    fill: Fill = 0,
) -> View:
    """AugMix (Hendrycks et al. 2020, arXiv:1912.02781), without its consistency loss."""
    _grey_or_rgb(input, "augmix")
    mode, colour = _mode(interpolation, input), _fill(fill, input)
    return _v2().AugMix(severity, mixture_width, chain_depth, alpha, all_ops, interpolation=mode, fill=colour)


def gaussian_blur(input: InputSpec, *, kernel_size: Count = 23, sigma: Range = (0.1, 2.0), p: Share = 0.5) -> View:
    """A blur of random strength, with probability `p`; `kernel_size` is odd, in pixels."""
    return _with_probability(_v2().GaussianBlur(kernel_size, sigma), p)


def grayscale(input: InputSpec, *, p: Share = 0.1) -> View:
    """All colour gone, with probability `p`; still three channels. A grey picture stays as it is."""
    _grey_or_rgb(input, "grayscale")
    return _v2().RandomGrayscale(p)


def random_erasing(
    input: InputSpec,
    *,
    p: Share = 0.5,
    scale: Areas = (0.02, 0.33),
    ratio: Range = (0.3, 3.3),
    fill: Fill = "mean",
) -> View:
    """A random rectangle is painted over (Zhong et al. 2020, arXiv:1708.04896), by default in the mean colour.

    The mean colour is what torchvision's default, zero after normalisation, would give.
    """
    colour = _fill(fill, input)
    return _v2().RandomErasing(p, scale, ratio, value=colour if isinstance(colour, list) else [colour] * input.channels)


def train_transform(parts: Sequence[tuple[str, Mapping[str, Any]]], input: InputSpec) -> View:
    """The parts one after another, each a (name, arguments); tried out on pictures of several shapes.

    Raises:
        UserError: unknown parts or arguments, or parts that the input's channels do not allow, all in one message; or a
            list that does not end at the input's size.
    """
    from tlx.data.pixels.fused_crop import framed

    steps, problems = [], list[UserError]()
    for place, (name, given) in enumerate(parts):
        try:
            part = plug.find("transform", name)
            arguments = plug.arguments(part, given, label=name)
            view = plug.call(name, part, input, **arguments)  # torchvision checks too, an even kernel for one
            if not callable(view):
                raise UserError(f"{name} returned {type(view).__name__}, not a transform of pictures")
            steps.append(view)
        except UserError as error:
            problems += below(error, f"transforms.{place}")
    if problems:
        raise ConfigError(problems)
    _try_out(steps, [name for name, _ in parts], input)
    return framed(steps) or (_v2().Compose(steps) if steps else _v2().Identity())


def eval_transform(input: InputSpec) -> View:
    """Resize so that the centre crop keeps `crop_pct` of the short side, then the centre crop of the input's size.

    The resized side is floor(size / crop_pct), with room for rounding: timm's rule, which gives torchvision's numbers
    too (236 for 224 at 224/236). For an input that is not square the picture is resized to cover it.
    """
    from tlx.data.pixels.fused_crop import Covering, framed

    v2 = _v2()
    height, width = (math.floor(side / input.crop_pct + 1e-6) for side in input.size)
    mode = _mode(None, input)
    resize = v2.Resize(height, mode, antialias=True) if height == width else Covering(height, width, mode)
    steps = [resize, v2.CenterCrop(list(input.size))]
    return framed(steps) or v2.Compose(steps)


def _try_out(steps: Sequence[View], names: Sequence[str], input: InputSpec) -> None:
    import torch

    from tlx.data.stream.randomness import own_randomness

    height, width = input.size
    for shape in ((2 * height, 3 * width), (3 * height, 2 * width), (height - 1, width - 2)):
        out = torch.zeros(input.channels, *shape, dtype=torch.uint8)
        with own_randomness() as seed:
            seed(0)
            for name, step in zip(names, steps, strict=True):
                picture = f"a picture of {shape[0]} x {shape[1]} pixels in {input.channels} channels"
                try:
                    out = step(out)
                except Exception as error:  # whatever the user's transforms raise
                    raise UserError(f"{name} fails on {picture}: {error}", where="transforms") from error
                if not isinstance(out, torch.Tensor):
                    raise UserError(f"{name} makes {type(out).__name__} of {picture}, not a tensor", where="transforms")
        if tuple(out.shape) != (input.channels, height, width) or out.dtype != torch.uint8:
            raise UserError(
                f"the transforms ({', '.join(names) or 'none'}) make {' x '.join(map(str, out.shape))} {out.dtype} of "
                f"a picture of {shape[0]} x {shape[1]}; the backbone wants {input.channels} x {height} x {width} "
                "torch.uint8",
                where="transforms",
                todo="begin with random_resized_crop, or resize and then random_crop; or end with center_crop",
            )


def _size(size: Size, input: InputSpec) -> list[int]:
    return list(input.size) if size is None else [size, size] if isinstance(size, int) else list(size)


def _mode(interpolation: Interpolation | None, input: InputSpec) -> InterpolationMode:
    from torchvision.transforms import InterpolationMode

    return InterpolationMode(interpolation or input.interpolation)


def _fill(fill: Fill, input: InputSpec) -> int | list[int]:
    if fill == "mean":
        return [round(255 * m) for m in input.mean]
    if isinstance(fill, tuple) and len(fill) != input.channels:
        raise UserError(f"fill has {len(fill)} values for {input.channels} channels")
    return fill if isinstance(fill, int) else list(fill)


def _grey_or_rgb(input: InputSpec, name: str) -> None:
    if input.channels not in (1, 3):
        raise UserError(
            f"{name} changes the colours of grey and RGB pictures, not of pictures in {input.channels} channels"
        )


def _with_probability(view: View, p: float) -> View:
    return view if p == 1 else _v2().RandomApply([view], p=p)


def _v2() -> Any:
    from torchvision.transforms import v2

    return v2
