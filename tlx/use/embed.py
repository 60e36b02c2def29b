"""`tlx embed`: a vector for each picture, of any number, on any number of ranks, and on after a kill
(:mod:`tlx.use.parted_file`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from tlx.base.errors import UserError
from tlx.data.shards.manifest import Manifest
from tlx.data.shards.targets import LABEL
from tlx.ranks.sharing import join_sharing
from tlx.ranks.together import by_main, together
from tlx.use.asked import Asked, Part, Source, name_of
from tlx.use.embedder import Embedder, EmbedderOptions, embedder_of
from tlx.use.forward import Answers
from tlx.use.inputs import listed, opened
from tlx.use.parted_file import PartedFile, is_begun
from tlx.use.row_text import refuse_output
from tlx.use.vector_file import FORMATS, VectorFile, part_of, rows_file

DType = Literal["float32", "float16"]
Found = tuple[list[dict[str, str | None]], NDArray[Any]]
"""Of a batch."""


@dataclass(frozen=True)
class Options:
    """What is asked for besides network and pictures.

    Attributes:
        normalise: vectors get length 1.
        by_folder: the label of a file is the name of the folder that it lies in; shards know their own.
        batch, workers, skip_bad: see :class:`tlx.use.asked.Asked`.
    """

    out: Path
    dtype: DType = "float32"
    normalise: bool = False
    by_folder: bool = False
    batch: int | None = None
    workers: int | None = None
    skip_bad: bool = False


def embed(place: str, words: Sequence[str], options: Options, network: EmbedderOptions) -> None:
    """Writes the file `options.out`; see :mod:`tlx.use.vector_file`.

    Args:
        place: see :func:`tlx.use.embedder.embedder_of`.
        words: see :func:`tlx.use.inputs.listed`.

    Raises:
        UserError: no network, no pictures, one that cannot be read, an output that is there already or of something
            else.
    """
    world = join_sharing()
    try:
        by_main(world, lambda: _refuse_output(options.out))
        listing = by_main(world, lambda: listed(words))
        sources = together(world, lambda: opened(listing))
        device = network.device or str(world.device)
        own = EmbedderOptions(network.which, network.weights, network.layer, device, network.trusted)
        embedder = together(world, lambda: embedder_of(place, own))
        PartedFile(Embedding(embedder, sources, options), options.out).write(world)
    finally:
        world.close()


def _refuse_output(out: Path) -> None:
    goes_on = is_begun(out)
    refuse_output(out, goes_on=goes_on, among=FORMATS)
    rows = rows_file(out)
    if out.suffix.lower() == ".npy" and rows.exists() and not goes_on:
        raise UserError("it is there already", where=str(rows), todo="remove it, or another --out")


@dataclass(frozen=True)
class Embedding:
    """What is computed, and how it is written."""

    embedder: Embedder
    sources: Sequence[Source]
    options: Options

    @property
    def asked(self) -> Asked:
        forward, wanted = self.embedder.forward, self.options
        return Asked(forward, self.sources, wanted.batch or forward.batch, wanted.workers, skip_bad=wanted.skip_bad)

    @property
    def about(self) -> dict[str, Any]:
        """What the vectors are of: those of two files compare where it is the same."""
        made = self.embedder
        said = {"network": made.network, "weights": made.weights, "layer": made.layer}
        return {**said, "normalised": self.options.normalise}

    def content(self) -> dict[str, Any]:
        wanted = self.options
        form = wanted.out.suffix.lower()
        return {**self.about, "dtype": wanted.dtype, "format": form, "label-by-folder": wanted.by_folder}

    def batches(self, parts: Sequence[Part]) -> Iterator[tuple[Part, list[Found], bool]]:
        for part, source, answers, is_last in self.asked.batches(parts):
            yield part, [self._found(source, answers)], is_last

    def written(self, found: Sequence[Found]) -> bytes:
        return part_of([row for rows, _ in found for row in rows], np.concatenate([vectors for _, vectors in found]))

    def join(self, parts: Sequence[Path], out: IO[bytes]) -> None:
        dtype = np.dtype(self.options.dtype)
        VectorFile(self.options.out, self.embedder.width, dtype, self.about).join(parts, out)

    def _found(self, source: Source, answers: Answers) -> Found:
        """By the pictures' places.

        Raises:
            UserError: numbers that the dtype does not hold, or that are none.
        """
        vectors = answers.outputs
        if self.options.normalise:
            vectors = torch.nn.functional.normalize(vectors, dim=1)
        with np.errstate(over="ignore"):  # which is told
            numbers = vectors.numpy().astype(self.options.dtype)
        odd = np.flatnonzero(~np.isfinite(numbers).all(1))
        if len(odd):
            what = f"its vector is not finite in {self.options.dtype}"
            todo = "--dtype float32" if self.options.dtype != "float32" else None
            raise UserError(what, where=name_of(source, int(answers.ids[odd[0]])), todo=todo)
        errors = {bad.id: bad.reason for bad in answers.bad}
        places = sorted([*answers.ids.tolist(), *errors])
        whole = np.full((len(places), self.embedder.width), np.nan, numbers.dtype)
        whole[np.isin(places, answers.ids.numpy())] = numbers[np.argsort(answers.ids.numpy())]
        labels = self._labels(source, places)
        names = [name_of(source, place) for place in places]
        rows = zip(names, labels, places, strict=True)
        return [{"file": file, "label": label, "error": errors.get(at)} for file, label, at in rows], whole

    def _labels(self, source: Source, places: Sequence[int]) -> list[str | None]:
        if isinstance(source, Manifest):
            target = source.targets.get(LABEL)
            if target is None:
                return [None] * len(places)
            own = source.labels[places].tolist()
            return [target.classes[label] if label >= 0 else None for label in own]
        return [Path(source.paths[place]).parent.name if self.options.by_folder else None for place in places]
