"""Mixup (Zhang et al. 2018, arXiv:1710.09412) and cutmix (Yun et al. 2019, arXiv:1905.04899) across ranks.

Slots 2k and 2k+1 of the *global* batch mix with each other, and an odd last one stays as it is; each slot draws for
itself, from (seed, epoch, position in the epoch). So the mixed pictures are the same for every number of ranks and
micro-batches. torchvision's own MixUp and CutMix draw once for whatever batch they are given, and so cannot do this;
their arithmetic is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tlx.base.errors import UserError
from tlx.data.stream.order import Ids, derive

NO_TARGETS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class MixSpec:
    """What is mixed.

    Attributes:
        mixup, cutmix: alpha of the Beta(alpha, alpha) that draws how much; 0 switches that one off.
        prob: the share of samples that are mixed.
        switch_prob: where both are on, the share of mixed samples that get cutmix.

    Raises:
        UserError: values out of range, or nothing switched on.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5

    def __post_init__(self) -> None:
        if min(self.mixup, self.cutmix) < 0 or not (0 <= self.prob <= 1 and 0 <= self.switch_prob <= 1):
            raise UserError("mixup and cutmix are 0 or more, prob and switch_prob from 0 to 1", where="mix")
        if not (self.mixup or self.cutmix):
            raise UserError("neither mixup nor cutmix is on", where="mix", todo="set one above 0, or leave mix out")


@dataclass(frozen=True)
class Mix:
    """How the samples of a micro-batch are mixed; m own samples, images holding g guests after them.

    Attributes:
        partner: int64 [m], the position in images of the picture mixed in; a sample's own where it stays plain.
        partner_labels: int64 [m].
        lam: float32 [m], the share of the own picture (and label); for cutmix exact, by the area that is left.
        box: int64 [m, 4], rows y0 to y1 and columns x0 to x1 that cutmix replaces; zeros otherwise.
        cut: bool [m], whether it is cutmix.
        partner_targets: those of the samples that are mixed in, by name, as `Batch.targets`.
    """

    partner: Tensor
    partner_labels: Tensor
    lam: Tensor
    box: Tensor
    cut: Tensor
    partner_targets: Mapping[str, Tensor] = field(default_factory=dict)

    def apply(self, images: Tensor) -> Tensor:
        """Mixed pictures [m, c, h, w] from floating-point [m + g, c, h, w], on the images' own device."""
        own, other = images[: len(self.lam)], images[self.partner]
        height, width = images.shape[-2:]
        y = torch.arange(height, device=images.device)[:, None]
        x = torch.arange(width, device=images.device)
        y0, y1, x0, x1 = self.box[:, :, None, None].unbind(1)
        kept = ~((y >= y0) & (y < y1) & (x >= x0) & (x < x1))
        share = torch.where(self.cut[:, None, None], kept, self.lam[:, None, None])[:, None].to(images.dtype)
        return share * own + (1 - share) * other

    def map(self, move: Callable[[Tensor], Tensor]) -> Mix:
        """The same with every tensor moved."""
        labels = move(self.partner_labels)
        targets = moved_targets(self.partner_targets, self.partner_labels, labels, move)
        return Mix(move(self.partner), labels, move(self.lam), move(self.box), move(self.cut), targets)


def moved_targets(
    targets: Mapping[str, Tensor], labels: Tensor, moved: Tensor, move: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Targets, moved; one that is `labels` is `moved`, and not copied twice."""
    return {name: moved if tensor is labels else move(tensor) for name, tensor in targets.items()}


@dataclass(frozen=True)
class Draws:
    """What the slots of a global batch of n samples draw; arrays of length n."""

    mixed: NDArray[np.bool_]
    cut: NDArray[np.bool_]
    lam: NDArray[np.float64]
    box: NDArray[np.int64]

    def partner(self, slot: int) -> int:
        """The slot it mixes with, or itself."""
        return slot ^ 1 if self.mixed[slot] else slot


@lru_cache(maxsize=64)  # each micro-batch of a step asks, here and where it is assembled
def draw(spec: MixSpec, *, seed: int, epoch: int, first: int, count: int, size: tuple[int, int]) -> Draws:
    """The draws of `count` slots, the first of which is at position `first` of the epoch; pictures of `size`."""
    # Philox counts blocks of four words: two blocks for each position, whatever batch it falls into
    words = np.random.Philox(key=derive(seed, "mix", epoch), counter=2 * first).random_raw(8 * count)
    u = ((words.reshape(count, 8) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    mixed = (u[:, 0] < spec.prob) & ((np.arange(count) ^ 1) < count)
    both = bool(spec.mixup and spec.cutmix)
    cut = mixed & ((u[:, 1] < spec.switch_prob) if both else bool(spec.cutmix))
    lam = np.where(cut, _beta(spec.cutmix, u[:, 2], u[:, 3]), _beta(spec.mixup, u[:, 2], u[:, 3]))
    box = np.where(cut[:, None], _boxes(lam, u[:, 4], u[:, 5], size), 0)
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    exact = np.where(cut, 1 - area / (size[0] * size[1]), lam)
    return Draws(mixed, cut, np.where(mixed, exact, 1.0), box)


def guests(draws: Draws, slots: range) -> list[int]:
    """The slots outside of `slots` whose pictures are mixed into theirs: at most one at each end."""
    return sorted({draws.partner(s) for s in slots} - set(slots))


def mix_of(draws: Draws, slots: range, labels: Ids, targets: Mapping[str, NDArray[Any]] = NO_TARGETS) -> Mix:
    """The Mix of a micro-batch; `labels` and `targets` are those of the pictures that are shown, guests at the end."""
    place = {slot: i for i, slot in enumerate([*slots, *guests(draws, slots)])}
    partners = [place[draws.partner(s)] for s in slots]
    here = slice(slots.start, slots.stop)
    return Mix(
        torch.tensor(partners, dtype=torch.int64),
        torch.from_numpy(labels[partners]),
        torch.from_numpy(draws.lam[here].astype(np.float32)),
        torch.from_numpy(draws.box[here].copy()),
        torch.from_numpy(draws.cut[here].copy()),
        {name: torch.from_numpy(values[partners]) for name, values in targets.items()},
    )


def plain(labels: Ids, targets: Mapping[str, NDArray[Any]] = NO_TARGETS) -> Mix:
    """A Mix that leaves every picture as it is."""
    count = len(labels)
    return Mix(
        torch.arange(count),
        torch.from_numpy(labels.copy()),
        torch.ones(count),
        torch.zeros(count, 4, dtype=torch.int64),
        torch.zeros(count, dtype=torch.bool),
        {name: torch.from_numpy(values.copy()) for name, values in targets.items()},
    )


def weight_sums(weights: NDArray[np.float64], draws: Draws | None) -> NDArray[np.float64]:
    """What a global batch of n samples weighs for each part of the loss, [parts]: the sums of weights [n, parts], each
    sample's split between itself and its partner where they are mixed."""
    places = np.arange(len(weights))
    partners = np.where(draws.mixed, places ^ 1, places) if draws else places

    def total(own: NDArray[np.float64]) -> float:
        return float(np.sum(draws.lam * own + (1 - draws.lam) * own[partners] if draws else own))

    # column by column: numpy adds a column of its own in another order than one of an array, and less exactly
    return np.array([total(np.ascontiguousarray(column)) for column in weights.T])


def _beta(alpha: float, u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
    """Beta(alpha, alpha) from two uniforms each, exactly: Devroye, "Random variate generation in one line of code",
    WSC 1996, from Bailey's polar method for Student's t. Always two, so that a slot's draws have a place of their own.
    """
    if not alpha:
        return np.ones_like(u)
    with np.errstate(over="ignore", divide="ignore"):
        cosine = np.cos(2 * np.pi * v)
        square = (u ** (-1 / alpha) - 1) * cosine**2
        return np.asarray(0.5 + np.sign(cosine) / (2 * np.sqrt(1 + 1 / square)))


def _boxes(
    lam: NDArray[np.float64], y: NDArray[np.float64], x: NDArray[np.float64], size: tuple[int, int]
) -> NDArray[np.int64]:
    """Rows and columns of a box of area 1 - lam around (y, x), cut off at the picture's edge, as torchvision does."""
    height, width = size
    half = 0.5 * np.sqrt(1 - lam)
    middle = (y * height).astype(np.int64), (x * width).astype(np.int64)
    reach = (half * height).astype(np.int64), (half * width).astype(np.int64)
    rows = [np.clip(middle[0] + s * reach[0], 0, height) for s in (-1, 1)]
    columns = [np.clip(middle[1] + s * reach[1], 0, width) for s in (-1, 1)]
    return np.stack([*rows, *columns], axis=1)
