"""Inside the network: maps of a few pictures, and a map of many."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tlx.report.parts import Parts
from tlx.report.samples import Gallery, maps_for, of_maps, some
from tlx.report.target_report import Figure
from tlx.report.told_figures import embedding
from tlx.runs.predictions import Part, Predictions

NOT_INSIDE = "attention maps and the map of pictures: they are drawn of a single classification"

EMBEDDED = 1000
"""Pictures of the map."""


class Network(Protocol):
    """A run's best network; see :class:`tlx.use.inside.Inside`."""

    def features(self, ids: NDArray[np.int64], until: float) -> tuple[NDArray[np.int64], NDArray[np.float32]]: ...

    def maps(self, wanted: Sequence[tuple[int, int]], until: float) -> list[tuple[int, NDArray[np.uint8]]]: ...


class Inner(NamedTuple):
    """Pictures with their maps; the map of many pictures. None of what could not be made."""

    maps: Gallery | None = None
    embedding: Figure | None = None


def is_single_class(best: Predictions) -> bool:
    return [part.kind for part in best.parts] == ["class"]


def look_inside(best: Predictions, inside: Network, parts: Parts) -> Inner:
    """Of a single classification; nothing of others."""
    part = best.parts[0]
    if not is_single_class(best):
        parts.left_out.append(NOT_INSIDE)
        return Inner()
    maps = parts.make("attention maps", lambda: _maps(part, best, inside, parts), needs_s=5.0)
    png = parts.make("map of pictures", lambda: _embedded(part, best, inside, parts), needs_s=5.0)
    caption = (
        "Validation pictures by what reaches the head (t-SNE of their features): what is near is alike to the "
        "network. A ring is a mistake; distances between groups mean little."
    )
    return Inner(maps, None if png is None else Figure(png, caption))


def _maps(part: Part, best: Predictions, inside: Network, parts: Parts) -> Gallery | None:
    wanted = maps_for(part, best.ids)
    until = time.monotonic() + (parts.until - time.monotonic()) / 2
    drawn = inside.maps([(place, output) for place, output, _, _ in wanted], until)
    said = {place: (lines, kind) for place, _, lines, kind in wanted}
    return of_maps(drawn, said) if drawn else None


def _embedded(part: Part, best: Predictions, inside: Network, parts: Parts) -> bytes | None:
    """t-SNE of at most 50 principal components (van der Maaten & Hinton 2008).

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    chosen = some(part, EMBEDDED)
    left = parts.until - time.monotonic()
    ids, features = inside.features(best.ids[chosen], time.monotonic() + 0.6 * left)
    if len(ids) < 10:
        return None
    rows = np.searchsorted(best.ids, ids)
    few = min(50, *features.shape)
    reduced = PCA(few, random_state=0).fit_transform(features.astype(np.float64))
    places = TSNE(2, perplexity=min(30.0, (len(ids) - 1) / 3), init="pca", random_state=0).fit_transform(reduced)
    return embedding(places, part, rows)
