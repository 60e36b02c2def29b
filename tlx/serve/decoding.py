"""A stranger's bytes to the pixels that the network is shown, or a sentence that says why not."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tlx.base.errors import TlxError
from tlx.data.pixels.decode import Channels, DecodeError, open_picture
from tlx.data.pixels.one_picture import at_picture
from tlx.data.pixels.transforms import View, eval_transform
from tlx.data.stream.file_list import InMemory
from tlx.data.stream.pictures import Pictures
from tlx.use.description import ModelDescription


class Refused(Exception):
    """A request, or one of its pictures, that gets no answer.

    Args:
        status: of HTTP.
        why: for whoever has asked.
    """

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


@dataclass(frozen=True)
class Decoder:
    """Shows pictures as evaluations did. Any number of threads may call it.

    Attributes:
        most_pixels: of a picture; how many it has is read from its header, before memory is taken for them.
    """

    description: ModelDescription
    most_pixels: int

    def __call__(self, name: str, data: bytes) -> Tensor:
        """uint8 [channels, H, W].

        Raises:
            Refused: no picture, a damaged one, one with too many pixels; no memory for it.
        """
        spec = self.description.input
        with at_picture(lambda: name):
            self._refuse_large(data)
            source = InMemory((data,), name)
            pictures = Pictures(source, self._view, cast(Channels, spec.channels), upright=self.description.upright)
            out = np.empty((*spec.size, spec.channels), np.uint8)
            try:
                bad = pictures.show(0, 0, _nothing, out)
            except TlxError as error:
                if isinstance(error.__cause__, MemoryError):
                    raise Refused(503, "there is not enough memory for this picture now") from error
                raise
        if bad is not None:
            raise Refused(422, bad.reason)
        return torch.from_numpy(out).permute(2, 0, 1)

    @cached_property
    def _view(self) -> View:
        return eval_transform(self.description.input)

    def _refuse_large(self, data: bytes) -> None:
        try:
            picture = open_picture(data)
        except DecodeError as error:
            is_bomb = isinstance(error.__cause__, Image.DecompressionBombError)
            raise Refused(413 if is_bomb else 422, str(error)) from error
        if picture.width * picture.height > self.most_pixels:
            size = f"{picture.width:,} x {picture.height:,} pixels"
            raise Refused(413, f"{size}: more than the {self.most_pixels / 1e6:g} million that are taken here")


def _nothing(key: int) -> None:
    """Evaluations draw nothing."""
