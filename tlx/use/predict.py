"""`tlx predict`: pictures in, rows out, of any number, on any number of ranks, and on after a kill
(:mod:`tlx.use.parted_file`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from tlx.base.errors import UserError
from tlx.base.files import sha256_of
from tlx.base.terminal import hand_over
from tlx.ranks.sharing import join_sharing
from tlx.ranks.together import by_main, together
from tlx.use.asked import Asked, Part, Source, name_of
from tlx.use.forward import Answers
from tlx.use.inputs import listed, opened
from tlx.use.load import Which, find_file, load, task_of
from tlx.use.model import Model
from tlx.use.parted_file import PartedFile, is_begun
from tlx.use.row_text import Format, RowText, format_of, refuse_output


@dataclass(frozen=True)
class Options:
    """What is asked for besides model and pictures.

    Attributes:
        out: the file to write; None shows rows on standard output, as `shown`.
        workers: processes that decode, on each rank; None: two where there is enough to do.
        skip_bad: a picture that cannot be read gets a row with its error; else it ends the command.
        top: how many classes a row tells; None: as many as training did.
        none_below: a row tells no label whose probability is below it.
    """

    out: Path | None = None
    shown: Format = "csv"
    batch: int | None = None
    workers: int | None = None
    skip_bad: bool = False
    top: int | None = None
    none_below: float | None = None


def predict(
    run: Path,
    words: Sequence[str],
    options: Options,
    *,
    which: Which = "best",
    device: str | None = None,
    trusted: bool = False,
) -> None:
    """Predicts pictures and writes or shows their rows, in their order.

    Raises:
        UserError: no model, no pictures, one that cannot be read, an output that is there already or of something else.
    """
    world = join_sharing()
    try:
        if options.out is None and world.size > 1:
            raise UserError("several ranks have one standard output", todo="--out FILE.csv, .jsonl or .parquet")
        out = options.out
        by_main(world, lambda: refuse_output(out, goes_on=out is not None and is_begun(out)))
        listing = by_main(world, lambda: listed(words))
        sources = together(world, lambda: opened(listing))
        model = together(world, lambda: load(run, which=which, device=device or str(world.device), trusted=trusted))
        work = Prediction(_of_options(model, options), sources, options, find_file(run, which)[0])
        if options.out is None:
            work.show()
        else:
            PartedFile(work, options.out).write(world)
    finally:
        world.close()


def _of_options(model: Model, options: Options) -> Model:
    """
    Raises:
        UserError: what the task has not.
    """
    example = example_of(model)
    if options.top is not None:
        if not any(name.endswith("top") for name in example):
            raise UserError(f"a {model.description.task['name']} tells no ranking of classes", where="--top")
        description = replace(model.description, top_k=options.top)
        model = replace(model, task=task_of(description), description=description)
    if options.none_below is not None and not _likely(example):
        raise UserError(f"a {model.description.task['name']} tells no single label", where="--none-below")
    return model


def example_of(model: Model) -> dict[str, Any]:
    """What the task says of some picture: every key, with a value of its kind."""
    outputs = torch.zeros(1, len(model.description.outputs) + len(model.task.constants))
    return model.task.rows(outputs, model.description.kept)[0]


def _likely(row: Mapping[str, Any]) -> dict[str, str]:
    """Labels of a row with the names of their probabilities."""
    found = {}
    for name in row:
        stem = name.removesuffix("probability")
        label = f"{stem}label" if f"{stem}label" in row else stem.removesuffix("_")
        if name != stem and label in row:
            found[label] = name
    return found


@dataclass(frozen=True)
class Prediction:
    """What is computed, and how its rows look.

    Attributes:
        weights: the model's file.
    """

    model: Model
    sources: Sequence[Source]
    options: Options
    weights: Path

    @property
    def text(self) -> RowText:
        wanted = self.options.shown if self.options.out is None else format_of(self.options.out)
        return RowText(wanted, {"file": "", **example_of(self.model), "error": ""})

    @property
    def asked(self) -> Asked:
        wanted = self.options
        batch = wanted.batch or self.model.description.batch
        return Asked(self.model.forward, self.sources, batch, wanted.workers, skip_bad=wanted.skip_bad)

    def show(self) -> None:
        """On standard output."""
        text, every = self.text, self.asked.parts(1)
        hand_over(text.header, end="")
        for _, rows, _ in self.batches(every):
            hand_over(text.text(rows), end="")

    def content(self) -> dict[str, Any]:
        with self.weights.open("rb") as file:
            weighed = sha256_of(file)
        said = {"top": self.options.top, "none-below": self.options.none_below, "columns": self.text.columns}
        return {"weights": weighed, **said}

    def batches(self, parts: Sequence[Part]) -> Iterator[tuple[Part, list[dict[str, Any]], bool]]:
        for part, source, answers, is_last in self.asked.batches(parts):
            yield part, self._rows(source, answers), is_last

    def written(self, found: Sequence[dict[str, Any]]) -> bytes:
        return self.text.text(found).encode("utf-8", "surrogateescape")

    def join(self, parts: Sequence[Path], out: IO[bytes]) -> None:
        self.text.join(parts, out)

    def _rows(self, source: Source, answers: Answers) -> list[dict[str, Any]]:
        """By the pictures' places."""
        found: dict[int, dict[str, Any]] = {bad.id: {"error": bad.reason} for bad in answers.bad}
        kept = self.model.description.kept
        told = self.model.task.rows(answers.outputs, kept) if len(answers.ids) else []
        found |= dict(zip(answers.ids.tolist(), map(self._sure, told), strict=True))
        return [{"file": name_of(source, place), **found[place]} for place in sorted(found)]

    def _sure(self, row: dict[str, Any]) -> dict[str, Any]:
        least = self.options.none_below
        if least is None:
            return row
        return row | {label: None for label, share in _likely(row).items() if not row[share] >= least}
