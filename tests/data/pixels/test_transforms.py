"""The list of transforms as a configuration writes it, and the evaluation view."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from tlx.base import plug
from tlx.base.errors import UserError
from tlx.base.inputs import InputSpec
from tlx.data.pixels import transforms
from tlx.data.pixels.crop_geometry import ShortSide
from tlx.data.pixels.transforms import eval_transform, train_transform
from tlx.data.stream.randomness import own_randomness

INPUT = InputSpec(size=(32, 32))
NEEDED = {"rotation": {"degrees": 10}, "shear": {"degrees": 10}, "color_jitter": {"brightness": 0.2}}


def noise(height, width):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", transforms.__all__)
def test_every_part_works_on_uint8(name):
    view = train_transform([(name, NEEDED.get(name, {})), ("random_resized_crop", {}), ("center_crop", {})], INPUT)
    out = view(noise(50, 41))
    assert (out.dtype, tuple(out.shape)) == (torch.uint8, (3, 32, 32))
    assert plug.find("transform", name) is getattr(transforms, name)


def test_an_ordered_list_is_applied_in_order():
    """Article D: crop to 256, rotate, flip, centre crop to 224; here at an eighth of the size."""
    parts = [
        ("random_resized_crop", {"size": 36, "scale": [0.8, 1]}),
        ("rotation", {"degrees": 15}),
        ("horizontal_flip", {}),
        ("center_crop", {}),
    ]
    ours = train_transform(parts, INPUT)
    theirs = v2.Compose(
        [v2.RandomResizedCrop(36, scale=(0.8, 1)), v2.RandomRotation(15), v2.RandomHorizontalFlip(), v2.CenterCrop(32)]
    )
    image = noise(60, 80)
    torch.manual_seed(0)
    left = torch.stack([ours(image) for _ in range(200)]).double()
    right = torch.stack([theirs(image) for _ in range(200)]).double()
    assert (left.mean() - right.mean()).abs() < 3
    assert ((left == 0).double().mean() - (right == 0).double().mean()).abs() < 0.01  # the corners of rotations
    torch.manual_seed(3)
    again = ours(image)
    torch.manual_seed(3)
    assert torch.equal(ours(image), again)
    with pytest.raises(UserError, match="make 3 x 36 x 36"):
        train_transform([*reversed(parts)], INPUT)


def test_lists_that_do_not_end_at_the_input_size():
    with pytest.raises(UserError, match=r"make 3 x 32 x 72.*picture of 64 x 144[\s\S]*center_crop") as caught:
        train_transform([("resize", {"size": 32})], InputSpec(size=(32, 48)))
    assert caught.value.where == "transforms"
    with pytest.raises(UserError, match=r"\(none\)"):
        train_transform([], INPUT)
    assert train_transform([("resize", {"size": 40}), ("random_crop", {})], INPUT)(noise(90, 50)).shape == (3, 32, 32)


def test_all_mistakes_of_a_list_at_once():
    with pytest.raises(UserError) as caught:
        train_transform(
            [
                ("random_resized_corp", {}),
                ("horizontal_flip", {"prob": 0.5}),
                ("rotation", {}),
                ("gaussian_blur", {"kernel_size": 4}),
                ("random_resized_crop", {"scale": "big"}),
            ],
            INPUT,
        )
    text = str(caught.value)
    for place, words in enumerate(
        ("did you mean", 'no argument "prob"', 'needs the argument "degrees"', "odd", "scale")
    ):
        assert f"transforms.{place}" in text
        assert words in text


def test_checking_a_list_leaves_the_random_states_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    train_transform([("random_resized_crop", {}), ("random_erasing", {})], INPUT)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_random_erasing_paints_the_mean_colour():
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    out = train_transform([("random_resized_crop", {}), ("random_erasing", {"p": 1.0})], INPUT)(image)
    painted = out[:, out[0] > 0]
    assert painted.shape[1] > 10
    assert painted[:, 0].tolist() == [round(255 * m) for m in INPUT.mean]
    grey = train_transform([("random_resized_crop", {}), ("random_erasing", {"p": 1.0, "fill": 7})], INPUT)(image)
    assert set(grey.unique().tolist()) == {0, 7}


def test_randomness_is_fenced():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with own_randomness() as seed:
        seed(2**64 - 1)
        first = torch.rand(2), np.random.rand(), random.random()
        seed(2**64 - 1)
        again = torch.rand(2), np.random.rand(), random.random()
        with pytest.raises(ZeroDivisionError), own_randomness():
            raise ZeroDivisionError
    assert torch.equal(first[0], again[0])
    assert first[1:] == again[1:]
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("size", "crop_pct", "short"), [(224, 0.875, 256), (224, 224 / 236, 236), (224, 0.9, 248), (299, 299 / 342, 342)]
)
def test_evaluation_resizes_as_the_libraries_do(size, crop_pct, short):
    """torchvision's own numbers, and timm's floor for 0.9."""
    view = eval_transform(InputSpec(size=(size, size), crop_pct=crop_pct))
    assert view.framing.resize == ShortSide(short)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_evaluation_equals_the_presets(interpolation):
    from torchvision.transforms import InterpolationMode

    view = eval_transform(InputSpec(size=(32, 32), crop_pct=0.8, interpolation=interpolation))
    mode = InterpolationMode(interpolation)
    theirs = v2.Compose([v2.Resize(40, interpolation=mode, antialias=True), v2.CenterCrop(32)])
    for shape in ((90, 61), (61, 90), (20, 33)):
        assert torch.equal(view(noise(*shape)), theirs(noise(*shape)))


def test_evaluation_of_an_oblong_input():
    view = eval_transform(InputSpec(size=(32, 64), crop_pct=0.8))
    for shape in ((90, 61), (61, 190), (20, 33), (7, 500)):
        assert view(noise(*shape)).shape == (3, 32, 64)
    # a square of 100 is resized to cover 40 x 80, and the middle 32 rows are kept
    ramp = torch.arange(100, dtype=torch.uint8)[None, :, None].expand(3, 100, 100)
    rows = view(ramp)[0, :, 0].float()
    assert rows[0] == pytest.approx(30, abs=1)
    assert rows[-1] == pytest.approx(69, abs=1)
