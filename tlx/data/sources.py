"""Pictures to be written into shards: from a folder per class or a CSV file. Nothing is decoded here.

A `Source` holds class names and, per split, what to write. Every split shares the class names, which are kept as they
are and never become part of a path.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from tlx.data.order import derive, permutation
from tlx.errors import UserError, did_you_mean

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""What a split may be called -> what it is called here."""

EXTENSIONS = frozenset(
    ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm"]
)
"""Names of pictures end like this, in small or capital letters. AVIF needs Pillow 11.3."""


@dataclass(frozen=True)
class Picture:
    """One picture to write: a file, or an item of `Source.items`.

    Attributes:
        origin: what a message calls it.
        label: position in the source's class names.
        path: its file; None where the data set only gives decoded pictures.
        place: (name of the data set in `Source.items`, position in it) where there is no file.
        bytes: the file's size; 0 where there is no file.
    """

    origin: str
    label: int
    path: str | None = None
    place: tuple[str, int] | None = None
    bytes: int = 0


@dataclass(frozen=True)
class Source:
    """What a build starts from.

    Attributes:
        classes: names, at least two.
        splits: train, val, test (those there are) -> pictures.
        items: data sets that `Picture.place` points into.
        left_out: files among the pictures that are none.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, tuple[Picture, ...]]
    items: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def prepare(source: Source, *, val: float | None, seed: int, where: str) -> Source:
    """The source with its validation pictures split off, if that is asked for, and found to be usable.

    Raises:
        UserError: no validation split and none asked for, classes without pictures, names that cannot be shown ...
    """
    source = _split_off(source, val, seed, where=where)
    _verify(source, where=where)
    return source


def read_folder(folder: Path) -> Source:
    """A folder per class, with or without train, val and test folders above; pictures may lie deeper in a class folder.

    Raises:
        UserError: no class folders, or class folders mixed with split folders.
    """
    inside = _folders(folder)
    if not inside:
        _no_classes(folder)
    named = {f: SPLITS[f.name] for f in inside if f.name in SPLITS}
    if named and len(named) < len(inside):
        odd = next(f for f in inside if f not in named)
        if "train" in named.values():
            raise UserError(
                f'"{odd.name}" beside "{next(iter(named)).name}" is no split'
                + did_you_mean(odd.name, ("train", "val", "test")),
                where=str(folder),
                todo="keep only train, val and test here, with the class folders inside each",
            )
        named = {}  # a class that happens to be called test
    if len(set(named.values())) < len(named):
        raise UserError("two folders for one split", where=str(folder), todo=f"keep one of {', '.join(SPLITS)}")
    found = {split: _class_folders(f) for f, split in named.items()} or {"train": _class_folders(folder)}
    classes = tuple(sorted({name for classes in found.values() for name in classes}))
    left_out: list[str] = []
    splits = {
        split: tuple(p for name, f in of.items() for p in _pictures_in(f, classes.index(name), left_out))
        for split, of in found.items()
    }
    return Source(classes, splits, left_out=tuple(left_out))


def read_csv(path: Path) -> Source:
    """A CSV file with the columns path, label and perhaps split; paths are relative to the file.

    Raises:
        UserError: other columns, empty cells, unknown splits, files that are missing or listed twice.
    """
    try:
        rows = list(_rows(path))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"neither a folder nor a CSV file: {error}", where=str(path)) from error
    if not rows:
        raise UserError("there are no rows below the header", where=str(path))
    labels = {label for _, label, _, _ in rows}
    numbers = all(label.isdecimal() and len(label) < 20 for label in labels)
    classes = tuple(sorted(labels, key=int) if numbers else sorted(labels))
    place = {name: i for i, name in enumerate(classes)}
    splits: dict[str, list[Picture]] = {}
    missing, seen = [], set()
    for name, label, split, line in rows:
        file = path.parent / name
        if name in seen:
            raise UserError(f"{name} is listed twice", where=f"{path}:{line}", todo="keep one row per picture")
        seen.add(name)
        try:
            size = file.stat().st_size
        except (OSError, ValueError):  # ValueError: a name that no file can have
            missing.append(f"line {line}: {name}")
            continue
        splits.setdefault(split, []).append(Picture(str(file), place[label], str(file), bytes=size))
    if missing:
        listed = "\n".join(f"  {m}" for m in missing[:10])
        raise UserError(
            f"{len(missing)} of {len(rows)} files are missing:\n{listed}",
            where=str(path),
            todo="paths are relative to the CSV file",
        )
    return Source(classes, {s: tuple(p) for s, p in splits.items()})


def _rows(path: Path) -> Iterable[tuple[str, str, str, int]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        columns = [c.strip() for c in reader.fieldnames or []]
        unknown = sorted(set(columns) - {"path", "label", "split"})
        if unknown or not {"path", "label"} <= set(columns) or len(set(columns)) < len(columns):
            raise UserError(
                f"the columns are {', '.join(columns) or 'none'}",
                where=f"{path}:1",
                todo="the first line must be path,label or path,label,split",
            )
        reader.fieldnames = columns
        for row in reader:
            where = f"{path}:{reader.line_num}"
            cells = {c: (row[c] or "").strip() for c in columns}
            if None in row or not cells["path"] or not cells["label"]:
                raise UserError("a row needs a path and a label, and no more than the header names", where=where)
            split = cells.get("split", "train")
            if split not in SPLITS:
                raise UserError(f'unknown split "{split}"{did_you_mean(split, ("train", "val", "test"))}', where=where)
            yield cells["path"], cells["label"], SPLITS[split], reader.line_num


def size_of(path: str) -> int:
    """A file's size in bytes, 0 for a link to nowhere: reading it tells more."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def listed(folder: Path) -> list[Path]:
    """What lies in a folder, sorted.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        _unreadable(error)


def _unreadable(error: OSError) -> NoReturn:
    raise UserError(
        f"this folder cannot be read: {error.strerror}", where=str(error.filename), todo="make it readable"
    ) from error


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in listed(folder) if p.is_dir() and not p.name.startswith(".") and p.name != "__MACOSX")


def _class_folders(folder: Path) -> dict[str, Path]:
    return {f.name: f for f in _folders(folder)} or _no_classes(folder)


def _no_classes(folder: Path) -> Any:
    loose = sum(p.suffix[1:].lower() in EXTENSIONS for p in folder.iterdir())
    raise UserError(
        f"there are no class folders here{f', but {loose} loose pictures' if loose else ''}",
        where=str(folder),
        todo="one folder per class with its pictures inside; or a CSV file with the columns path,label",
    )


def _pictures_in(folder: Path, label: int, left_out: list[str]) -> Iterable[Picture]:
    seen = set()
    for at, inside, names in os.walk(folder, onerror=_unreadable, followlinks=True):
        seen.add(os.path.realpath(at))  # a link may lead back up
        deeper = sorted(d for d in inside if not d.startswith("."))
        inside[:] = [d for d in deeper if os.path.realpath(os.path.join(at, d)) not in seen]
        for name in sorted(names):
            path = os.path.join(at, name)
            if name.startswith(".") or name.rpartition(".")[2].lower() not in EXTENSIONS:
                left_out.append(path)
            else:
                yield Picture(path, label, path, bytes=size_of(path))


def _split_off(source: Source, val: float | None, seed: int, *, where: str) -> Source:
    if val is None:
        if set(source.splits) == {"train"}:
            raise UserError(
                "there is no validation split", where=where, todo="--val 0.2 splits it off (--val 0: I want none)"
            )
        return source
    if "val" in source.splits:
        raise UserError(
            f"--val {val} for a source that has its own validation split", where=where, todo="leave --val out"
        )
    if not 0 <= val < 1 or "train" not in source.splits:
        raise UserError(f"--val {val} of the training pictures", where=where, todo="a share below 1, such as 0.2")
    if not val:
        return source
    pictures = source.splits["train"]
    chosen = set(_stratified(np.array([p.label for p in pictures]), val, seed))
    train = tuple(p for i, p in enumerate(pictures) if i not in chosen)
    held = tuple(p for i, p in enumerate(pictures) if i in chosen)
    return replace(
        source, splits={"train": train, "val": held, **{s: p for s, p in source.splits.items() if s != "train"}}
    )


def _stratified(labels: NDArray[np.int64], part: float, seed: int) -> list[int]:
    """Positions of `part` of each class, to the nearest; a class of two or more keeps one on either side."""
    chosen: list[int] = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        count = min(max(round(part * len(own)), 1), len(own) - 1)
        chosen += own[permutation(derive(seed, "split", int(label)), len(own))[:count]].tolist()
    return chosen


def _verify(source: Source, *, where: str) -> None:
    if not any(source.splits.values()):
        raise UserError("there are no pictures", where=where, todo=f"known file types: {', '.join(sorted(EXTENSIONS))}")
    for name in source.classes:
        if not name.isprintable() or name.strip() != name or not name:
            raise UserError(
                f"the class name {name!r} holds characters that cannot be shown, or spaces at an end",
                where=where,
                todo="rename it",
            )
    if len(set(source.classes)) < len(source.classes):
        raise UserError("two classes have one name", where=where)
    if len(source.classes) < 2:
        only = ", ".join(source.classes) or "none"
        raise UserError(f"a classifier needs two classes or more; here: {only}", where=where)
    train = source.splits.get("train", ())
    empty = sorted(set(range(len(source.classes))) - {p.label for p in train}) if train else []
    if empty:
        names = ", ".join(f'"{source.classes[i]}"' for i in empty[:10])
        raise UserError(
            f"{len(empty)} of {len(source.classes)} classes have no training pictures: {names}",
            where=where,
            todo="add some, or remove the class",
        )
