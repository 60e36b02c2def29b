"""What a sample is shown as, where that is not one picture with a target of the index: a picture that was turned, parts
of it, several views; and the target that is drawn with them.

Everything is drawn from the sample's own key, which (seed, epoch, sample) decide, so that the process that makes the
pictures and the one that makes the targets draw the same without talking to each other, on any number of ranks and
workers. Several pictures of a sample are one below the other on their way to the device: for loaders they are one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tlx.base.errors import UserError
from tlx.base.inputs import InputSpec
from tlx.data.shards.targets import Target
from tlx.data.stream.order import derive
from tlx.data.stream.randomness import own_randomness, seed_states

View = Callable[[Tensor], Tensor]
"""uint8 [channels, any height, any width] to uint8 [channels, height, width]."""


class Views(Protocol):
    """How a sample is shown.

    Attributes:
        count: pictures of each sample, all of the input's size.
        joined: the head takes the features of all of them together; else it answers to each.
        targets: what is drawn, by name; of kind class.
        evaluated_plainly: an evaluation begins with its own view of a picture (a centre crop); else with training's.
    """

    @property
    def count(self) -> int: ...
    @property
    def joined(self) -> bool: ...
    @property
    def targets(self) -> Mapping[str, Target]: ...
    @property
    def evaluated_plainly(self) -> bool: ...

    def draw(self, rng: random.Random) -> Mapping[str, int]:
        """The targets of a sample."""
        ...

    def pictures(self, image: Tensor, shown: Shown, drawn: Mapping[str, int]) -> Iterator[Tensor]:
        """Each picture, uint8 [channels, height, width], of a decoded one [channels, any height, any width]. They are
        drawn from the global states of torch, numpy and random, which are the view's own while it is made.
        """
        ...


@dataclass(frozen=True)
class Shown:
    """The transform of a sample's pictures: uint8 [channels, count * height, width]. The states must be the sample's
    (:func:`tlx.data.stream.randomness.own_randomness`).

    Attributes:
        view: the configuration's transforms.
        size: height and width of each picture.
    """

    views: Views
    view: View
    size: tuple[int, int]

    def __call__(self, image: Tensor) -> Tensor:
        key = random.getrandbits(64)
        coming = self.views.pictures(image, self, self.views.draw(random.Random(key)))
        pictures = []
        for number in range(self.views.count):
            seed_states(derive(key, "view", number))
            pictures.append(next(coming))
        return torch.cat(pictures, 1)


def shown_as(views: Views, view: View, spec: InputSpec) -> Shown:
    """The transform, tried out.

    Raises:
        UserError: it does not give `count` pictures of the input's size.
    """
    shown = Shown(views, view, spec.size)
    wanted = (spec.channels, views.count * spec.size[0], spec.size[1])
    with own_randomness() as seed:
        for key in range(8):
            seed(key)
            made = tuple(shown(torch.zeros(spec.channels, 2 * spec.size[0], 3 * spec.size[1], dtype=torch.uint8)).shape)
            if made != wanted:
                raise UserError(
                    f"what the task makes of a picture has the shape {list(made)}, needed is {list(wanted)}",
                    where="input.size",
                    todo="a rotated picture keeps its shape where it is square",
                )
    return shown


def drawn_of(views: Views, keys: Sequence[int]) -> dict[str, NDArray[Any]]:
    """The targets of samples by name, int64 [m].

    Args:
        keys: those of the samples, by which :class:`Shown` has shown them.
    """
    rows = [views.draw(random.Random(random.Random(key).getrandbits(64))) for key in keys]
    return {name: np.array([row[name] for row in rows], dtype=np.int64) for name in views.targets}
