"""Mixup and cutmix: who mixes with whom, how much, and the arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tlx.base.errors import UserError
from tlx.data.stream.mix import MixSpec, draw, guests, mix_of, plain


def drawn(spec, count, first=0, size=(32, 48), epoch=0):
    return draw(spec, seed=4, epoch=epoch, first=first, count=count, size=size)


def test_draws_belong_to_positions_of_the_epoch():
    spec = MixSpec(mixup=0.3, cutmix=1.0, prob=0.8)
    whole = drawn(spec, 64)
    part = drawn(spec, 24, first=40)
    for name in ("mixed", "cut", "lam", "box"):
        assert np.array_equal(getattr(whole, name)[40:], getattr(part, name))
    assert not np.array_equal(whole.lam, drawn(spec, 64, epoch=1).lam)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 1.0, 3.0])
def test_lam_is_beta_distributed(alpha):
    lam = drawn(MixSpec(mixup=alpha), 40_000).lam
    assert 0 <= lam.min() <= lam.max() <= 1
    assert lam.mean() == pytest.approx(0.5, abs=0.01)
    assert lam.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)
    expected, at = np.random.default_rng(0).beta(alpha, alpha, 40_000), np.linspace(0.001, 0.999, 99)
    below = [np.searchsorted(np.sort(values), at) / 40_000 for values in (lam, expected)]
    assert np.abs(below[0] - below[1]).max() < 0.015  # Kolmogorov and Smirnov: 0.0136 at 0.1 %


def test_shares_of_what_is_mixed():
    draws = drawn(MixSpec(mixup=1.0, cutmix=1.0, prob=0.6, switch_prob=0.25), 40_000)
    assert draws.mixed.mean() == pytest.approx(0.6, abs=0.01)
    assert draws.cut.sum() / draws.mixed.sum() == pytest.approx(0.25, abs=0.01)
    assert (draws.lam[~draws.mixed] == 1).all()
    assert not drawn(MixSpec(mixup=1.0), 100).cut.any()
    assert drawn(MixSpec(cutmix=1.0), 100).cut.all()


def test_neighbours_mix_and_an_odd_last_one_stays_plain():
    draws = drawn(MixSpec(mixup=1.0), 7)
    assert [draws.partner(s) for s in range(7)] == [1, 0, 3, 2, 5, 4, 6]
    assert draws.lam[6] == 1
    assert guests(draws, range(1, 3)) == [0, 3]
    assert guests(draws, range(2, 6)) == []


def test_cutmix_counts_the_area_that_is_left():
    draws = drawn(MixSpec(cutmix=1.0), 500)
    y0, y1, x0, x1 = draws.box.T
    assert min(y0.min(), x0.min()) >= 0
    assert (y1.max(), x1.max()) <= (32, 48)
    assert np.allclose(draws.lam, 1 - (y1 - y0) * (x1 - x0) / (32 * 48))
    labels = np.arange(500)
    mix = mix_of(draws, range(500), labels)
    pixels = torch.arange(500.0)[:, None, None, None].expand(500, 3, 32, 48)
    mixed = mix.apply(pixels)
    own = (mixed == torch.arange(500.0)[:, None, None, None]).float().mean((1, 2, 3))
    assert torch.allclose(own, mix.lam)
    assert mix.partner_labels.tolist() == [i ^ 1 for i in range(500)]


def test_mixup_arithmetic_with_guests():
    draws = drawn(MixSpec(mixup=1.0), 8)
    mix = mix_of(draws, range(3, 6), np.array([30, 40, 50, 20]))
    assert mix.partner.tolist() == [3, 2, 1]  # slot 3 with the guest 2, 4 and 5 with each other
    assert mix.partner_labels.tolist() == [20, 50, 40]
    images = torch.rand(4, 3, 5, 5, dtype=torch.float64)  # slots 3, 4, 5 and the guest
    lam = torch.from_numpy(draws.lam[3:6]).float().double()[:, None, None, None]
    assert torch.allclose(mix.apply(images), lam * images[:3] + (1 - lam) * images[[3, 2, 1]])


def test_plain_changes_nothing():
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(plain(np.array([2, 0, 1])).apply(images), images)


@pytest.mark.parametrize(
    "bad", [{}, {"mixup": -1.0}, {"mixup": 1.0, "prob": 1.5}, {"cutmix": 1.0, "switch_prob": -0.1}]
)
def test_specs_that_make_no_sense(bad):
    with pytest.raises(UserError, match="mix"):
        MixSpec(**bad)
