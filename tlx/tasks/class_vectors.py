"""A vector for each class, from a file of word vectors or attributes. Nothing is unpickled.

A file is, by its ending: ``.csv`` or ``.tsv``, a row for each name, the name first, with or without a header;
``.parquet``, the same, where the names are the first column and numbers the others, or lists in one; ``.npz``, an array
for each name, or the arrays `names` and `vectors`; anything else the text format of word2vec, GloVe and fastText: a
name and its numbers in each line, parted by blanks, with or without a first line of two counts. Text may be compressed
(``.gz``).
"""

from __future__ import annotations

import csv
import gzip
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tlx.base.errors import UserError, did_you_mean
from tlx.models import ClassVectors

WHERE = "task.embeddings"
_COMPARED = 20_000  # names that a missing class is compared with
_MOST = 100_000  # characters of a cell


def spelled(name: str) -> str:
    """A name as others may write it: case, blanks, hyphens and underscores make no difference."""
    return "_".join(re.split(r"[\s_\-]+", name.strip().lower()))


def from_file(file: Path, names: Mapping[str, str]) -> ClassVectors:
    """
    Args:
        names: of each class, in the order of classes: how the file may write it. As it is, else in any spelling (see
            :func:`spelled`); of several words that the file has one by one, the mean of their vectors.

    Raises:
        UserError: no such file, not of its format, a class that it does not have, vectors of several widths, of zeros,
        or
            that are not finite.
    """
    rows = _read(file, names.values())
    by_spelling: dict[str, str] = {}
    for name in rows.found:
        by_spelling.setdefault(spelled(name), name)
    vectors, means, missing = list[NDArray[np.float64]](), list[str](), list[str]()
    for label, name in names.items():
        vector = _vector_of(name, rows.found, by_spelling)
        if vector is None:
            missing.append(label)
            continue
        vectors.append(vector[0])
        means += [label] * vector[1]
    if missing:
        raise _absent(file, missing, names, rows)
    widths = {len(vector) for vector in vectors}
    if len(widths) > 1:
        raise UserError(f"{file} has vectors of {' and '.join(map(str, sorted(widths)))} numbers", where=WHERE)
    values = np.stack(vectors).astype(np.float32)
    for label, vector in zip(names, values, strict=True):
        if not np.isfinite(vector).all() or not vector.any():
            what = "only zeros" if not vector.any() else "a number that is not finite"
            raise UserError(f'{file}: the vector of class "{label}" has {what}', where=WHERE)
    note = f"; of several words the mean: {', '.join(means[:8])}{' ...' * (len(means) > 8)}" if means else ""
    return ClassVectors(values, f"{values.shape[1]} numbers each from {file}{note}")


def _vector_of(
    name: str, found: Mapping[str, NDArray[np.float64]], by_spelling: Mapping[str, str]
) -> tuple[NDArray[np.float64], bool] | None:
    """Of a class, and whether it is a mean of its words'; None where the file lacks it."""
    own = name if name in found else by_spelling.get(spelled(name))
    if own is not None:
        return found[own], False
    words = [by_spelling.get(word) for word in spelled(name).split("_")]
    there = [found[word] for word in words if word is not None]
    if len(there) < len(words) or len(words) < 2 or len({len(vector) for vector in there}) > 1:
        return None
    return np.mean(there, axis=0), True


def _absent(file: Path, missing: Sequence[str], names: Mapping[str, str], rows: _Rows) -> UserError:
    listed = ", ".join(f'"{label}"' for label in missing[:8]) + (f" and {len(missing) - 8} more" * (len(missing) > 8))
    near = did_you_mean(names[missing[0]], rows.others)
    return UserError(
        f"{file} has no vector of class {listed}{near}",
        where=WHERE,
        todo=f"task.names: {{{missing[0]}: NAME IN THE FILE}}, or add {'them' if len(missing) > 1 else 'it'}",
    )


@dataclass
class _Rows:
    """
    Attributes:
        found: vectors of wanted names, as the file writes these.
        others: names that the file has beside, up to so many.
    """

    found: dict[str, NDArray[np.float64]]
    others: list[str]


def _read(file: Path, names: Iterable[str]) -> _Rows:
    """
    Raises:
        UserError: see :func:`from_file`.
    """
    if not file.is_file():
        near = did_you_mean(file.name, [p.name for p in file.parent.glob("*")]) if file.parent.is_dir() else ""
        raise UserError(f"there is no file {file}{near}", where=WHERE)
    wanted = {spelled(name) for name in names}
    wanted |= {word for name in wanted for word in name.split("_")}
    rows = _Rows({}, [])
    try:
        for name, vector in _FORMATS.get(file.name.removesuffix(".gz").rpartition(".")[2], _words)(file):
            if spelled(name) not in wanted:
                rows.others += [name] * (len(rows.others) < _COMPARED)
                continue
            if name in rows.found:
                raise ValueError(f'"{name[:100]}" comes twice')
            rows.found[name] = np.asarray(vector(), np.float64).reshape(-1)
    except (ValueError, KeyError, TypeError, OSError, EOFError, csv.Error, zipfile.BadZipFile, zlib.error) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{file} cannot be read as vectors by name: {why}", where=WHERE, todo=_SAID) from error
    return rows


_SAID = (
    "a .csv or .parquet with the name first, an .npz of arrays by name (or names and vectors), "
    "or lines of a name and its numbers (word2vec's text, GloVe)"
)
_Row = tuple[str, Callable[[], Any]]


def _text(file: Path) -> IO[str]:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8", newline="")
    return file.open("r", encoding="utf-8-sig", newline="")


def _table(file: Path) -> Iterator[_Row]:
    csv.field_size_limit(_MOST)
    with _text(file) as opened:
        lines = csv.reader(opened, delimiter="\t" if ".tsv" in file.suffixes else ",")
        first = next(lines, [])
        header = [] if len(first) > 1 and all(map(_is_number, first[1:])) else [first]
        for cells in lines if header else chain([first], lines):
            if cells:
                yield cells[0].strip(), lambda cells=cells: [float(cell) for cell in cells[1:]]  # type: ignore[misc]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _words(file: Path) -> Iterator[_Row]:
    """Blanks part the numbers; a name may hold some itself (GloVe's 840B has such), so that numbers are counted from
    the end, by the width of the first line."""
    width = None
    with _text(file) as opened:
        for number, line in enumerate(opened):
            cells = line.rstrip().split(" ") if "\t" not in line else line.rstrip().split("\t")
            cells = [cell for cell in cells if cell]
            if number == 0 and len(cells) == 2 and all(cell.isdigit() for cell in cells):
                width = int(cells[1])
                continue
            if not cells:
                continue
            width = len(cells) - 1 if width is None else width
            if width < 1 or len(cells) <= width:
                raise ValueError(f"line {number + 1} has {len(cells) - 1} numbers, not {max(width, 1)}")
            yield " ".join(cells[:-width]), lambda own=cells[-width:]: [float(cell) for cell in own]  # type: ignore[misc]


def _arrays(file: Path) -> Iterator[_Row]:
    with np.load(file, allow_pickle=False) as opened:
        if set(opened.files) == {"names", "vectors"}:
            names, vectors = opened["names"], opened["vectors"]
            if names.dtype.kind != "U" or vectors.ndim != 2 or len(names) != len(vectors):
                raise ValueError("`names` are no text, or `vectors` are not one row for each")
            yield from ((str(name), lambda row=row: row) for name, row in zip(names, vectors, strict=True))  # type: ignore[misc]
            return
        for name in opened.files:
            yield name, lambda name=name: opened[name]  # type: ignore[misc]


def _parquet(file: Path) -> Iterator[_Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        todo = "pip install 'tlx[parquet]', or write it as .csv"
        raise UserError(f"{file}: parquet files are read by pyarrow, not installed here", todo=todo) from error
    try:
        with ParquetFile(file) as opened:
            for batch in opened.iter_batches():
                for row in batch.to_pylist():
                    name, *numbers = row.values()
                    inside = numbers[0] if len(numbers) == 1 and isinstance(numbers[0], list) else numbers
                    yield str(name), lambda inside=inside: [math.nan if one is None else one for one in inside]  # type: ignore[misc]
    except ArrowException as error:
        raise ValueError(str(error)) from error


_FORMATS: Mapping[str, Callable[[Path], Iterator[_Row]]] = {
    "csv": _table,
    "tsv": _table,
    "npz": _arrays,
    "parquet": _parquet,
}
