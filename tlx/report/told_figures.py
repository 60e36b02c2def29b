"""Pictures of predictions as PNG: confusions of many classes, reliability, numbers, an embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tlx.report.classes import Matrix, Reliability, similar_order
from tlx.report.figures import AFTER, BEFORE, LOWEST, SWITCH, clipped, png
from tlx.runs.predictions import Part

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED = 110
"""Of more classes than these no names would fit at the image's sides."""

NUMBERED = 30
"""Of more classes than these no numbers stand in a matrix."""

COLOURED = 20
"""Classes that the map of pictures colours by themselves; of more, the most frequent."""


def confusion_image(
    matrix: Matrix, names: Sequence[str], *, ordered: bool = False, of: NDArray[np.int64] | None = None
) -> bytes:
    """Shares of each class (rows) told as each (columns), in an order in which confused classes stand together; with
    counts where there is room.

    Args:
        ordered: the order of names stays.
        of: pictures of each class, where the matrix has not all that they were told as.
    """
    order = list(range(len(names))) if ordered else similar_order(matrix)
    rows = matrix[np.ix_(order, order)].astype(np.float64)
    shares = rows / np.maximum(matrix.sum(1) if of is None else of, 1)[order, None]
    count = len(names)
    inches = float(np.clip(2.2 + 0.13 * count, 6.0, 11.0))

    def draw(figure: Figure) -> None:
        panel = figure.subplots()
        image = panel.imshow(
            np.ma.masked_equal(shares, 0), cmap="viridis_r", vmin=0, vmax=1, interpolation="none", aspect="equal"
        )
        panel.set_facecolor("#f4f4f4")
        panel.grid(False)
        size = max(3.2, min(8.0, 560 / count))
        said = [clipped(names[i], 24) for i in order]
        panel.set_xticks(range(count), said, rotation=90, fontsize=size)
        panel.set_yticks(range(count), said, fontsize=size)
        panel.tick_params(length=1.5, pad=1)
        if count <= NUMBERED:
            for i, j in zip(*rows.nonzero(), strict=True):
                panel.text(
                    j, i, f"{rows[i, j]:.0f}", ha="center", va="center", fontsize=min(size, 9),
                    color="white" if shares[i, j] > 0.5 else "black",
                )  # fmt: skip
        panel.set_xlabel("told as")
        panel.set_ylabel("is")
        figure.colorbar(image, ax=panel, shrink=0.6, pad=0.01, label="share of the pictures of the class")

    return png(draw, width=inches + 0.8, height=inches)


def reliability_diagram(found: Reliability, *, of_labels: bool) -> bytes:
    """Accuracy by confidence, and below it how many decisions there were."""
    from matplotlib.ticker import PercentFormatter

    edges = np.linspace(0, 1, len(found.count) + 1)
    width, middles = edges[1], (edges[:-1] + edges[1:]) / 2

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        above.bar(
            middles, np.nan_to_num(found.accuracy), width=0.94 * width, color=AFTER, label="was right (no bar: never)"
        )
        there = found.count > 0
        above.plot(
            found.confidence[there], found.confidence[there], color=SWITCH, marker="o", markersize=4, linestyle="none",
            label="was told with this probability",
        )  # fmt: skip
        above.plot([0, 1], [0, 1], color=LOWEST, linewidth=1, linestyle="--", label="if probabilities were right")
        above.set_ylabel("label applies" if of_labels else "accuracy")
        above.set_ylim(0, 1)
        below.bar(middles, found.count / found.count.sum(), width=0.94 * width, color=BEFORE)
        below.set_ylabel("decisions")
        below.set_xlabel("probability of the label" if of_labels else "probability of what was told")
        for panel in (above, below):
            panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        below.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        below.set_xlim(0, 1)
        above.legend(loc="upper left", frameon=False, fontsize=8.5)

    return png(draw, width=5.6, height=5.2)


def numbers(part: Part) -> bytes:
    """Told against true, a panel for each column, of at most nine."""
    columns = min(len(part.names), 9)
    across = min(columns, 3)

    def draw(figure: Figure) -> None:
        panels = np.ravel(figure.subplots(math.ceil(columns / across), across, squeeze=False))
        for i, panel in enumerate(panels):
            panel.set_visible(i < columns)
            if i >= columns:
                continue
            known = ~np.isnan(part.truth[:, i]) & np.isfinite(part.told[:, i])
            truth, told = part.truth[known, i], part.told[known, i]
            panel.scatter(truth, told, s=12, color=AFTER, alpha=0.5, linewidths=0)
            if len(truth):
                ends = [float(min(truth.min(), told.min())), float(max(truth.max(), told.max()))]
                panel.plot(ends, ends, color=LOWEST, linewidth=1, linestyle="--")
            panel.set_title(clipped(part.names[i], 40), fontsize=10)
            panel.set_xlabel("is")
            panel.set_ylabel("told")

    return png(draw, width=1 + 3.2 * across, height=0.6 + 3 * math.ceil(columns / across))


def embedding(places: NDArray[Any], part: Part, rows: NDArray[np.int64]) -> bytes:
    """Pictures in the plane, coloured by their class; mistakes are ringed.

    Args:
        places: [n, 2]. rows: [n], which pictures of the part they are.
    """
    import matplotlib

    truth, wrong = part.truth[rows], ~part.right[rows]
    counts = np.bincount(truth, minlength=len(part.names))
    coloured = [int(i) for i in np.argsort(-counts, kind="stable")[:COLOURED] if counts[i]]
    tones = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    middles = {c: np.median(places[truth == c], axis=0) for c in range(len(part.names)) if counts[c]}

    def draw(figure: Figure) -> None:
        panel = figure.subplots()
        rest = ~np.isin(truth, coloured)
        if rest.any():
            panel.scatter(places[rest, 0], places[rest, 1], s=14, color="#c4c4c4", linewidths=0, label="other classes")
        for tone, c in enumerate(coloured):
            own = truth == c
            panel.scatter(
                places[own, 0], places[own, 1], s=18, color=tones[tone], linewidths=0, label=clipped(part.names[c], 24)
            )
        if wrong.any():
            panel.scatter(
                places[wrong, 0],
                places[wrong, 1],
                s=40 if len(rows) < 400 else 26,
                facecolors="none",
                edgecolors="black",
                linewidths=0.7,
                label="mistake",
            )
        if len(middles) <= COLOURED:  # names of more would cover each other
            for c, at in middles.items():
                panel.annotate(clipped(part.names[c], 20), at, fontsize=8, ha="center")
        panel.set_xticks([])
        panel.set_yticks([])
        panel.grid(False)
        figure.legend(loc="outside right upper", fontsize=7.5, frameon=False)

    return png(draw, width=9.5, height=6.6)
