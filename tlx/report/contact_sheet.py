"""Pictures beside each other, a row for each pair, with what is said of it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tlx.base.terminal import escaped
from tlx.report.figures import clipped, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIDE = 200  # pixels of a picture at most
_ROW, _COLUMN = 1.9, 2.9  # inches
_NAME = 44  # characters


@dataclass(frozen=True)
class SheetRow:
    """Pictures of a row, encoded, with their names; None where one is not here.

    Attributes:
        text: what is said of them.
    """

    pictures: Sequence[tuple[str, bytes | None]]
    text: str


def contact_sheet(rows: Sequence[SheetRow], title: str) -> bytes:
    """A PNG."""
    columns = max(len(row.pictures) for row in rows)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(rows), columns, squeeze=False)
        for row, line in zip(rows, panels, strict=True):
            for panel in line:
                panel.set_axis_off()
            for (name, content), panel in zip(row.pictures, line, strict=False):
                _show(panel, content)
                panel.set_title(clipped(escaped(name)[-_NAME:], _NAME), fontsize=6)
            line[0].text(-0.05, 0.5, escaped(row.text), transform=line[0].transAxes, ha="right", va="center")
        figure.suptitle(title)

    return png(draw, width=_COLUMN * columns + 1, height=_ROW * len(rows) + 0.6)


def _show(panel: Axes, content: bytes | None) -> None:
    pixels = _pixels(content) if content is not None else None
    if pixels is None:
        panel.text(0.5, 0.5, "not here", transform=panel.transAxes, ha="center", va="center")
    else:
        panel.imshow(pixels)


def _pixels(content: bytes) -> np.ndarray | None:
    """uint8 [height, width, 3]; None of what is no picture."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as image:
            image.draft("RGB", (2 * _SIDE, 2 * _SIDE))
            image.thumbnail((_SIDE, _SIDE))
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception:  # whatever PIL finds in bytes of anybody: the row still tells their names
        return None
