"""`tlx predict`: pictures in, rows out, of any number, on any number of ranks, and on after a kill.

With a file to write, the work is cut into parts of some thousand pictures. A part's rows are written whole, as
``OUT.parts/000012.part``, by whichever rank has computed them; when all are there, rank 0 joins them into ``OUT``, by
rename, and removes the folder. Whoever starts the same command again computes the parts that are missing, on as many
ranks as there are then. ``OUT.parts/begun.json`` says what the parts are of.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tlx.base.errors import UserError
from tlx.base.files import json_text, scratch, sha256_of, write_whole
from tlx.base.locks import locked_folder
from tlx.base.parsing import from_json
from tlx.base.terminal import hand_over, say
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.file_list import FileList
from tlx.ranks.sharing import Sharing, join_sharing
from tlx.ranks.together import by_main, together
from tlx.use.inputs import digest, listed, opened
from tlx.use.load import Which, find_file, load, task_of
from tlx.use.model import Answers, Model
from tlx.use.row_text import Format, RowText, format_of, refuse_output, written

_PART = 4096  # pictures whose rows are in memory, and are computed again after a kill
_SHARES = 8  # parts for each rank at least, so that none has much more to do than the others
_SAY_S = 10.0
_BEGUN = "begun.json"


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


@dataclass(frozen=True)
class Part:
    """Batches `first` to before `last` of a source, by its place."""

    source: int
    first: int
    last: int


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
        by_main(world, lambda: refuse_output(out, goes_on=out is not None and (_folder(out) / _BEGUN).exists()))
        listing = by_main(world, lambda: listed(words))
        sources = together(world, lambda: opened(listing))
        model = together(world, lambda: load(run, which=which, device=device or str(world.device), trusted=trusted))
        work = Prediction(_of_options(model, options), sources, options)
        if options.out is None:
            work.show()
        else:
            _write(work, options.out, find_file(run, which)[0], world)
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
    """What is computed, and how its rows look."""

    model: Model
    sources: Sequence[Manifest | FileList]
    options: Options

    @property
    def text(self) -> RowText:
        wanted = self.options.shown if self.options.out is None else format_of(self.options.out)
        return RowText(wanted, {"file": "", **example_of(self.model), "error": ""})

    @property
    def batch(self) -> int:
        return self.options.batch or self.model.description.batch

    @property
    def pictures(self) -> int:
        return sum(map(len, self.sources))

    def show(self) -> None:
        """On standard output."""
        text, every = self.text, self.parts(1)
        hand_over(text.header, end="")
        for _, rows, _ in self.batches(every):
            hand_over(text.text(rows), end="")

    def parts(self, ranks: int) -> list[Part]:
        batches = [-(-len(source) // self.batch) for source in self.sources]
        size = max(1, min(_PART // self.batch, sum(batches) // (ranks * _SHARES)))
        return [
            Part(i, first, min(first + size, count))
            for i, count in enumerate(batches)
            for first in range(0, count, size)
        ]

    def batches(self, parts: Sequence[Part]) -> Iterator[tuple[Part, list[dict[str, Any]], bool]]:
        """Of each batch of these parts, in order: the part, the rows, whether it is the part's last."""
        for place, group in itertools.groupby(parts, key=lambda part: part.source):
            own = list(group)
            numbers = [number for part in own for number in range(part.first, part.last)]
            workers = self.options.workers
            if workers is None:
                workers = 2 if len(numbers) > 4 else 0
            source, batch = self.sources[place], self.batch
            with closing(self.model.answers(source, batch=batch, workers=workers, batches=numbers)) as answers:
                for part in own:
                    for number in range(part.first, part.last):
                        yield part, self._rows(source, next(answers)), number + 1 == part.last

    def _rows(self, source: Manifest | FileList, answers: Answers) -> list[dict[str, Any]]:
        """By the pictures' places.

        Raises:
            UserError: a picture cannot be read.
        """
        found: dict[int, dict[str, Any]] = {}
        for bad in answers.bad:
            if not self.options.skip_bad:
                raise UserError(str(bad), todo="mend it, or --skip-bad gives it a row with its error")
            say(f"skipped: {bad}", error=True)
            found[bad.id] = {"error": bad.reason}
        kept = self.model.description.kept
        told = self.model.task.rows(answers.outputs, kept) if len(answers.ids) else []
        found |= dict(zip(answers.ids.tolist(), map(self._sure, told), strict=True))
        return [{"file": name_of(source, place), **found[place]} for place in sorted(found)]

    def _sure(self, row: dict[str, Any]) -> dict[str, Any]:
        least = self.options.none_below
        if least is None:
            return row
        return row | {label: None for label, share in _likely(row).items() if not row[share] >= least}


def name_of(source: Manifest | FileList, place: int) -> str:
    return source.paths[place] if isinstance(source, FileList) else source.describe(place)


# A file of all rows


def _folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.parts")


def _write(work: Prediction, out: Path, weights: Path, world: Sharing) -> None:
    """Computes what is missing, on all ranks, and joins it."""
    began = time.monotonic()
    with ExitStack() as stack:
        parts = by_main(world, lambda: _begin(work, out, weights, world.size, stack))
        missing = by_main(world, lambda: [n for n in range(len(parts)) if not _file(out, n).exists()])
        if world.main and len(missing) < len(parts):
            say(f"{out}: going on, {len(parts) - len(missing)} of {len(parts)} parts are there", error=True)
        together(world, lambda: _compute(work, out, parts, missing[world.rank :: world.size], world))
        by_main(world, lambda: _join(work, out, parts))
    if world.main:
        seconds = time.monotonic() - began
        say(f"{out}: {work.pictures:,} pictures in {seconds:.1f} s", error=True)


def _file(out: Path, number: int) -> Path:
    return _folder(out) / f"{number:06d}.part"


def _begin(work: Prediction, out: Path, weights: Path, ranks: int, stack: ExitStack) -> list[Part]:
    """Makes the folder of parts this command's, or finds that it is; what its parts are.

    Args:
        stack: holds the folder's lock.

    Raises:
        UserError: its parts are of something else; another process is at it.
    """
    folder = _folder(out)
    with written(out):
        folder.mkdir(exist_ok=True)
        other = "another prediction writes here"
        stack.enter_context(locked_folder(folder, other, todo="wait for it, or another --out"))
    stack.callback(_sweep, out)
    content = _content(work, weights)
    wanted = json.loads(json_text(content))
    with suppress(FileNotFoundError):
        said = _read(folder / _BEGUN)
        changed = [name for name, value in wanted.items() if said.get(name) != value]
        if changed:
            raise UserError(
                f"it was begun with other {', '.join(changed)}",
                where=str(folder),
                todo="the same command as before goes on with it; else remove this folder, or name another --out",
            )
        return [Part(*numbers) for numbers in said["parts"]]
    if any(folder.glob("*.part")):
        raise UserError("it holds parts, and nothing says what of", where=str(folder), todo="remove it")
    parts = work.parts(ranks)
    numbers = [[part.source, part.first, part.last] for part in parts]
    with written(out):
        write_whole(folder / _BEGUN, json_text({**content, "parts": numbers}))
    return parts


def _content(work: Prediction, weights: Path) -> dict[str, Any]:
    """What rows depend on; a bad picture may be skipped from now on, without computing the others again."""
    with weights.open("rb") as file:
        weighed = sha256_of(file)
    options = work.options
    return {
        "weights": weighed,
        "pictures": digest(work.sources),
        "batch": work.batch,
        "top": options.top,
        "none-below": options.none_below,
        "columns": work.text.columns,
        "device": work.model.device.type,
    }


def _read(file: Path) -> dict[str, Any]:
    try:
        said: dict[str, Any] = from_json(file.read_bytes())
        [Part(*map(int, numbers)) for numbers in said["parts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("it is damaged", where=str(file), todo="remove its folder") from error
    return said


def _compute(work: Prediction, out: Path, parts: Sequence[Part], own: Sequence[int], world: Sharing) -> None:
    text, said = work.text, time.monotonic()
    numbers = {parts[number]: number for number in own}
    rows: list[dict[str, Any]] = []
    try:
        for part, found, is_last in work.batches([parts[number] for number in own]):
            rows += found
            if world.stops():
                return
            if not is_last:
                continue
            with written(out):
                write_whole(_file(out, numbers[part]), text.text(rows).encode("utf-8", "surrogateescape"))
            rows = []
            if world.main and time.monotonic() - said > _SAY_S:
                said = time.monotonic()
                there = sum(1 for _ in _folder(out).glob("*.part"))
                say(f"{out}: {there:,} of {len(parts):,} parts", error=True)
    except UserError:
        world.ask_to_stop()
        raise


def _join(work: Prediction, out: Path, parts: Sequence[Part]) -> None:
    """
    Raises:
        UserError: a part of another rank is not seen here.
    """
    files = [_file(out, number) for number in range(len(parts))]
    gone = [file for file in files if not file.exists()]
    if gone:
        todo = "ranks on several machines need a folder that all of them see"
        raise UserError("a part that another rank has written is not here", where=str(gone[0]), todo=todo)
    if not out.exists():
        with written(out), scratch(out) as beside:
            with beside.open("wb") as file:
                work.text.join(files, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, out)
    _remove(_folder(out))


def _sweep(out: Path) -> None:
    """A command that comes to nothing before its first part leaves no folder; what was being written when another was
    killed goes."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        left.unlink(missing_ok=True)
    if not any(_folder(out).glob("*.part")):
        _remove(_folder(out))


def _remove(folder: Path) -> None:
    """What was written there, and then the folder, if that was all."""
    for pattern in ("*.part", ".*.part.*.tmp", _BEGUN, ".lock"):
        for file in folder.glob(pattern):
            file.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
