"""Pictures listed in a CSV file: a path, a label, perhaps a split and targets in each row. Nothing is decoded here."""

from __future__ import annotations

import codecs
import csv
import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tlx.base.errors import UserError, did_you_mean
from tlx.data.build.sources import USUAL, Picture, Reading, Source, split_of
from tlx.data.shards.class_names import in_order
from tlx.data.shards.passed_over import COLUMN, EMPTY_ROW, PassedOver
from tlx.data.shards.target_values import Written, as_json, from_cells, target_of
from tlx.data.shards.targets import Target

SEPARATORS = (",", ";", "\t", "|")
_WORDS = {"tab": "\t", "\\t": "\t"}

_USUAL = {
    "path": (
        "file_name",
        "filename",
        "filepath",
        "file_path",
        "file",
        "image_path",
        "image",
        "img_path",
        "img",
        "name",
    ),
    "label": ("class", "class_name", "category", "target", "label_name", "labels", "species", "y"),
}
"""What others call the two columns."""


@dataclass(frozen=True)
class _Row:
    path: str
    label: str | None
    split: str
    line: int
    targets: tuple[Written, ...] = ()


@dataclass(frozen=True)
class _Columns:
    """Positions of the columns that are read; `label` and `split` are None where there is none."""

    path: int
    label: int | None
    split: int | None
    targets: tuple[tuple[int, ...], ...]
    others: tuple[int, ...]


def read_csv(path: Path, reading: Reading = USUAL) -> Source:
    """A CSV file with a column of paths, one of labels, perhaps one of splits, and those of targets; paths are relative
    to the file.

    Other columns and empty rows are counted and named in `Source.left_out`. A path that only exists with slashes in
    place of its backslashes is that one.

    Raises:
        UserError: columns that are not there, empty cells, values that are none of their target, unknown splits, files
            that are missing or listed twice.
    """
    left_out: list[PassedOver] = []
    try:
        rows = list(_rows(path, reading, left_out))
    except (UnicodeDecodeError, csv.Error) as error:
        _unreadable(path, error)
    if not rows:
        raise UserError("there are no rows below the header", where=str(path))
    classes = in_order({row.label for row in rows if row.label is not None}, reading.order)
    targets = targets_of([row.targets for row in rows], reading, where=str(path))
    place = {name: i for i, name in enumerate(classes)}
    splits: dict[str, list[Picture]] = {}
    missing, seen = [], set()
    for row in rows:
        file = _file(path.parent, row.path)
        if os.path.normpath(file) in seen:
            raise UserError(f"{row.path} is listed twice", where=f"{path}:{row.line}", todo="keep one row per picture")
        seen.add(os.path.normpath(file))
        try:
            size = file.stat().st_size
        except (OSError, ValueError):  # ValueError: a name that no file can have
            missing.append(f"line {row.line}: {row.path}")
            continue
        label = -1 if row.label is None else place[row.label]
        said = as_json(reading.targets, row.targets) if targets else ""
        splits.setdefault(row.split, []).append(Picture(str(file), label, str(file), bytes=size, targets=said))
    if missing:
        listed = "\n".join(f"  {m}" for m in missing[:10])
        raise UserError(
            f"{len(missing)} of {len(rows)} files are missing:\n{listed}",
            where=str(path),
            todo="paths are relative to the CSV file",
        )
    return Source(classes, {s: tuple(p) for s, p in splits.items()}, left_out=tuple(left_out), targets=targets)


def targets_of(rows: Sequence[Sequence[Written]], reading: Reading, *, where: str) -> tuple[Target, ...]:
    """The targets that `reading` asks for, of the values in each row.

    Raises:
        UserError: no row has one, numbers of different counts, names that cannot be.
    """
    found = []
    for place, spec in enumerate(reading.targets):
        try:
            found.append(target_of(spec, (row[place] for row in rows), reading.target_order.get(spec.name)))
        except UserError as error:
            raise UserError(error.what, where=where, todo=error.todo) from None
    return tuple(found)


def _file(folder: Path, name: str) -> Path:
    """The file of a row; one that was written on Windows may have backslashes."""
    file = folder / name
    try:
        if "\\" in name and not file.exists():
            return folder / name.replace("\\", "/")
    except (OSError, ValueError):  # a name that no file can have
        pass
    return file


def _rows(path: Path, reading: Reading, left_out: list[PassedOver]) -> Iterator[_Row]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        separator = _separator(file.readline(), reading)
        file.seek(0)
        reader = csv.reader(file, delimiter=separator)
        header = [c.strip() for c in next(reader, [])]
        columns = _columns(header, reading, where=f"{path}:1")
        left_out += [PassedOver(COLUMN, header[i] or f"column {i + 1}") for i in columns.others]
        maybe_splits = set(columns.others) if columns.split is None and reading.split_column else set()
        values: dict[int, set[str]] = {i: set() for i in maybe_splits}
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                left_out.append(PassedOver(EMPTY_ROW, where))
                continue
            cells += [""] * (len(header) - len(cells))
            label = None if columns.label is None else cells[columns.label]
            if any(cells[len(header) :]) or not cells[columns.path] or label == "":
                what = "a path" if label is None else "a path and a label"
                raise UserError(f"a row needs {what}, and no more than the header names", where=where)
            maybe_splits = {i for i in maybe_splits if split_of(cells[i]) is not None}
            for i in maybe_splits:
                values[i].add(cells[i])
            split = "train" if columns.split is None else split_in(cells[columns.split], where)
            targets = _values(reading, columns, cells, where)
            yield _Row(cells[columns.path], label, split, reader.line_num, targets)
    for i in sorted(i for i in maybe_splits if values[i]):
        raise UserError(
            f'the column "{header[i]}" holds {", ".join(sorted(values[i]))}',
            where=f"{path}:1",
            todo=f"--split-column {header[i]}, if that is each picture's split; --split-column '', if there is none",
        )


def _values(reading: Reading, columns: _Columns, cells: Sequence[str], where: str) -> tuple[Written, ...]:
    found = []
    for spec, places in zip(reading.targets, columns.targets, strict=True):
        try:
            found.append(from_cells(spec, [cells[i] for i in places], reading.label_separator))
        except ValueError as error:
            raise UserError(f"target {spec.name}: {error}", where=where) from None
    return tuple(found)


def split_in(cell: str, where: str) -> str:
    """
    Raises:
        UserError: it names no split.
    """
    split = split_of(cell)
    if split is None:
        raise UserError(f'unknown split "{cell}"{did_you_mean(cell, ("train", "val", "test"))}', where=where)
    return split


def _separator(line: str, reading: Reading) -> str:
    """What was said; or the character by which the header falls into the columns that are read, else into most."""
    said = reading.separator
    if said is not None:
        said = _WORDS.get(said.lower(), said)
        if len(said) != 1 or said in '"\r\n':
            raise UserError(
                f"{reading.separator!r} is no separator", where="--separator", todo="one character, such as ';', or tab"
            )
        return said
    headers = {s: _cells(line, s) for s in SEPARATORS}
    columns = [c for spec in reading.targets for c in spec.sources]
    wanted = {c.casefold() for c in (reading.path_column, reading.label_column, *columns) if c}
    fitting = (s for s, cells in headers.items() if wanted <= {c.casefold() for c in cells})
    return next(fitting, max(SEPARATORS, key=lambda s: len(headers[s])))


def _cells(line: str, separator: str) -> list[str]:
    try:
        return [c.strip() for c in next(csv.reader([line], delimiter=separator), [])]
    except csv.Error:
        return []


def _columns(header: Sequence[str], reading: Reading, *, where: str) -> _Columns:
    path = find_column(header, reading.path_column)
    label = find_column(header, reading.label_column) if reading.label_column else None
    split = find_column(header, reading.split_column) if reading.split_column else None
    is_default = reading.split_column == USUAL.split_column
    if (
        path is None
        or (label is None and reading.label_column)
        or (split is None and reading.split_column and not is_default)
    ):
        _other_columns(header, reading, where)
    targets = tuple(tuple(_column(header, name, where) for name in spec.sources) for spec in reading.targets)
    read = {path, label, split, *(i for places in targets for i in places)}
    others = tuple(i for i in range(len(header)) if i not in read)
    if split is None and is_default:
        for i in others:
            if difflib.get_close_matches(header[i].casefold(), ["split"], cutoff=0.8):
                raise UserError(
                    f"the columns are {', '.join(header)}",
                    where=where,
                    todo=f"call it split, or --split-column {header[i]}; --split-column '' where there is no split",
                )
    return _Columns(path, label, split, targets, others)


def _column(header: Sequence[str], name: str, where: str) -> int:
    """
    Raises:
        UserError: there is no column of a target of this name.
    """
    found = find_column(header, name)
    if found is None:
        raise UserError(
            f'there is no column "{name}" for a target{did_you_mean(name, header)}',
            where=where,
            todo="--target NAME:KIND=COLUMN",
        )
    return found


def find_column(header: Sequence[str], name: str) -> int | None:
    """The position of a column; small letters or capitals make no difference where only one column fits then."""
    same = [i for i, column in enumerate(header) if column == name]
    alike = [i for i, column in enumerate(header) if column.casefold() == name.casefold()]
    found = same or alike
    return found[0] if len(found) == 1 else None


def _other_columns(header: Sequence[str], reading: Reading, where: str) -> NoReturn:
    wanted = [("path", reading.path_column)]
    if reading.label_column:
        wanted.append(("label", reading.label_column))
    if reading.split_column and reading.split_column != USUAL.split_column:
        wanted.append(("split", reading.split_column))
    options = [
        f"--{what}-column {usual_column(header, what)}" for what, name in wanted if find_column(header, name) is None
    ]
    raise UserError(
        f"the columns are {', '.join(header) or 'none'}",
        where=where,
        todo="the first line must name the columns: path,label or path,label,split; "
        f"or say theirs: {' '.join(options)} (and --separator, if it is none of , ; | and tab)"
        + ("; --label-column '', where there is no class" if reading.targets else ""),
    )


def usual_column(header: Sequence[str], what: str) -> str:
    """The column that others would call so, for what is called path or label here; NAME where there is none."""
    by_name = {column.casefold(): column for column in header}
    return next((by_name[usual] for usual in _USUAL.get(what, ()) if usual in by_name), "NAME")


def _unreadable(path: Path, error: Exception) -> NoReturn:
    with open(path, "rb") as file:
        start = file.read(2)
    if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise UserError("its text is UTF-16", where=str(path), todo="save it as CSV in UTF-8") from error
    raise UserError(f"neither a folder nor a CSV file: {error}", where=str(path)) from error
