"""Geometry before there are pixels: the same as torchvision's, and the same whichever decoder obeys it."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from tlx.base.inputs import InputSpec
from tlx.data.pixels import jpeg_region as regions
from tlx.data.pixels.crop_geometry import Draw, Exactly, Frame, RandomResized, ResizedCrop, ShortSide, stored
from tlx.data.pixels.decode import decode
from tlx.data.pixels.fused_crop import Covering, Framed, framed, show
from tlx.data.pixels.jpeg_region import Regions
from tlx.data.pixels.transforms import eval_transform, train_transform

MODE = v2.InterpolationMode.BILINEAR


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth with some texture, as photographs are."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (max(height // 16, 2), max(width // 16, 2), 3), dtype=np.uint8))
    noise = rng.normal(0, 4, (height, width, 3))
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, orientation: int = 1, **options) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image.save(buffer, "JPEG", quality=92, exif=exif, **options)
    return buffer.getvalue()


def psnr(a, b) -> float:
    mse = float(((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean())
    return 99.0 if mse == 0 else 10 * np.log10(255**2 / mse)


@given(st.integers(0, 2**64 - 1), st.integers(1, 3000), st.integers(1, 3000))
def test_a_random_part_lies_inside_and_has_the_shape_asked_for(key, width, height):
    framing = RandomResized((224, 224), False, (0.08, 1.0), (3 / 4, 4 / 3), mirror=0.5)
    frame = framing(width, height, Draw(key))
    left, top, w, h = frame.crop
    assert left >= 0
    assert top >= 0
    assert w > 0
    assert h > 0
    assert left + w <= width
    assert top + h <= height
    assert frame == framing(width, height, Draw(key))
    assert frame.window == (0, 0, 224, 224)


def test_random_parts_are_distributed_as_torchvisions():
    framing = RandomResized((224, 224), False, (0.08, 1.0), (3 / 4, 4 / 3), mirror=0.5)
    ours = np.array([(*(f := framing(500, 375, Draw(k))).crop, f.mirrored) for k in range(0, 4000 * 7919, 7919)])
    torch.manual_seed(0)
    picture = torch.empty(3, 375, 500)
    drawn = [v2.RandomResizedCrop(224).make_params([picture]) for _ in range(4000)]
    theirs = np.array([(p["left"], p["top"], p["width"], p["height"]) for p in drawn])
    for column in range(4):
        a, b = np.sort(ours[:, column]), np.sort(theirs[:, column])
        grid = np.union1d(a, b)
        distance = np.abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max() / 4000
        assert distance < 0.04  # two-sample Kolmogorov-Smirnov, p = 0.003
    assert abs(ours[:, 4].mean() - 0.5) < 0.03


def test_numbers_drawn_stay_the_same():
    """SplitMix64's published first outputs for seed 1234567."""
    draw = Draw(1234567)
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [draw.uniform() for _ in words] == [(w >> 11) * 2.0**-53 for w in words]


@pytest.mark.parametrize(
    "steps",
    [
        [v2.Resize(40), v2.CenterCrop(32)],
        [v2.Resize((40, 50)), v2.CenterCrop((32, 48))],
        [v2.Resize((32, 32))],
        [Covering(40, 60, MODE), v2.CenterCrop((32, 48))],
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(90, 50), (50, 90), (64, 64), (41, 40), (33, 3000)])
def test_without_chance_the_pixels_are_torchvisions(steps, shape):
    image = torch.from_numpy(np.asarray(photo(*shape)).copy()).permute(2, 0, 1)
    view = framed(steps)
    assert isinstance(view, Framed)
    assert view.rest is None
    assert torch.equal(view(image), v2.Compose(steps)(image))


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_a_given_crop_is_torchvisions(p):
    image = torch.from_numpy(np.asarray(photo(300, 200)).copy()).permute(2, 0, 1)
    frame = Frame((30, 20, 200, 150), (64, 48), (0, 0, 64, 48), bool(p))
    wanted = v2.functional.resized_crop(image, 20, 30, 150, 200, [48, 64], antialias=True)
    assert torch.equal(show(image, frame, bicubic=False), wanted.flip(-1) if p else wanted)


def test_what_is_recognised():
    flip, jitter = v2.RandomHorizontalFlip(0.3), v2.ColorJitter(0.1)
    crop = v2.RandomResizedCrop(32, interpolation=v2.InterpolationMode.BICUBIC)
    view = framed([crop, flip, jitter])
    assert view.framing == RandomResized((32, 32), True, (0.08, 1.0), (3 / 4, 4 / 3), 0.3)
    assert view.rest(torch.zeros(3, 32, 32, dtype=torch.uint8)).shape == (3, 32, 32)
    anywhere = framed([v2.Resize(40), v2.RandomCrop(32, pad_if_needed=True)]).framing
    assert anywhere == ResizedCrop((32, 32), False, ShortSide(40), anywhere=True)
    assert framed([v2.Resize((40, 30))]).framing == ResizedCrop((40, 30), False, Exactly(30, 40))
    for other in (
        [flip, crop],
        [v2.Resize(40)],
        [v2.Resize(20), v2.CenterCrop(32)],  # a border is added
        [v2.Resize(40), v2.RandomCrop(32, padding=4)],
        [v2.Resize(40, max_size=50), v2.CenterCrop(32)],
        [v2.Resize(40, interpolation=v2.InterpolationMode.NEAREST), v2.CenterCrop(32)],
        [type("Own", (v2.RandomResizedCrop,), {})(32)],
        [],
    ):
        assert framed(other) is None


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(0, 2**64 - 1),
    st.sampled_from([(97, 61), (61, 97), (240, 240), (17, 400), (1, 1)]),
    st.booleans(),
)
def test_a_turned_picture_is_framed_as_if_it_were_upright(orientation, key, size, mirrored):
    """On pixels without loss: crop, resize by whole numbers and turn commute exactly."""
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    upright = np.asarray(_turned(Image.fromarray(pixels), orientation))
    height, width = upright.shape[:2]
    draw = Draw(key)
    w, h = 1 + draw.below(width), 1 + draw.below(height)
    crop = (draw.below(width - w + 1), draw.below(height - h + 1), w, h)
    cut = (1 + draw.below(w), 1 + draw.below(h))
    window = (draw.below(w - cut[0] + 1), draw.below(h - cut[1] + 1), *cut)
    frame = Frame(crop, (w, h), window, mirrored)
    wanted = show(torch.from_numpy(upright.copy()).permute(2, 0, 1), frame, bicubic=False)
    (crop, _, window, _), mirror, flip, transposed = stored(frame, *size, orientation)
    part = pixels[crop[1] :, crop[0] :][window[1] : window[1] + window[3], window[0] : window[0] + window[2]]
    part = part[:, ::-1] if mirror else part
    part = part[::-1] if flip else part
    part = part.transpose(1, 0, 2) if transposed else part
    assert np.array_equal(part, wanted.permute(1, 2, 0).numpy())


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    from PIL import ImageOps

    image.getexif()[0x0112] = orientation
    return ImageOps.exif_transpose(image)


needs_extension = pytest.mark.skipif(
    regions._jpeg is None, reason="tlx.data._jpeg is not built: no compiler or no libjpeg header"
)


@needs_extension
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_both_decoders_show_the_same(orientation, interpolation):
    spec = InputSpec(size=(96, 96), interpolation=interpolation)
    data = jpeg(photo(330, 240), orientation)
    for upright in (True, False):
        image = decode(data, upright=upright)
        for view in (
            train_transform([("random_resized_crop", {}), ("horizontal_flip", {})], spec),
            eval_transform(spec),
        ):
            for key in (1, 2**63 + 5, 77777777777):
                fast = np.zeros((96, 96, 3), np.uint8)
                assert Regions(view.framing, upright=upright).show(data, key, fast)
                frame = view.framing(image.shape[-1], image.shape[-2], Draw(key))
                slow = show(image, frame, bicubic=view.framing.bicubic).permute(1, 2, 0).numpy()
                assert psnr(fast, slow) > 50, (orientation, interpolation, upright, key)


@needs_extension
def test_what_the_extension_leaves_to_others():
    view = eval_transform(InputSpec(size=(32, 32))).framing
    out = np.zeros((32, 32, 3), np.uint8)
    buffer = io.BytesIO()
    photo(60, 50).convert("CMYK").save(buffer, "JPEG")
    assert not Regions(view).show(buffer.getvalue(), 0, out)
    buffer = io.BytesIO()
    photo(60, 50).save(buffer, "PNG")
    assert not Regions(view).show(buffer.getvalue(), 0, out)
    whole = jpeg(photo(60, 50))
    assert not Regions(view).show(whole[: len(whole) // 2], 0, out)
    assert Regions(view).show(whole, 0, out)


@needs_extension
def test_scaled_decoding_keeps_twice_the_pixels():
    image = photo(2000, 1500)
    framing = RandomResized((112, 112), False, (0.9, 1.0), (1.0, 1.0))
    data = jpeg(image)
    full, scaled = np.zeros((112, 112, 3), np.uint8), np.zeros((112, 112, 3), np.uint8)
    assert Regions(framing).show(data, 5, full)
    assert Regions(framing, scaled=True).show(data, 5, scaled)
    assert not np.array_equal(full, scaled)
    assert psnr(full, scaled) > 45
