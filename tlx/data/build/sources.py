"""Pictures to be written into shards: from a folder per class (a CSV file: `tables`). Nothing is decoded here.

A `Source` holds class names and, per split, what to write. Every split shares the class names, which are kept as they
are and never become part of a path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from tlx.base.errors import UserError, did_you_mean
from tlx.data.pixels import heif
from tlx.data.shards.class_names import in_order
from tlx.data.shards.passed_over import LINK, OUTSIDE, PassedOver, kind_of_name, no_picture
from tlx.data.shards.target_values import TargetSpec
from tlx.data.shards.targets import Target
from tlx.data.stream.order import derive, permutation

SPLITS = {
    **dict.fromkeys(["train", "training"], "train"),
    **dict.fromkeys(["val", "valid", "validation", "dev"], "val"),
    **dict.fromkeys(["test", "testing"], "test"),
}
"""What a split may be called, in small letters -> what it is called here; see `split_of`."""

_OF_A_SPLIT = re.compile(r"[ _-]?(set|data)\Z")

EXTENSIONS = frozenset(
    "jpg jpeg jpe jfif mpo png apng webp avif gif bmp tif tiff ppm pgm pbm pnm".split()  # noqa: SIM905
).union(heif.EXTENSIONS)
"""Names of pictures end like this, in small or capital letters. AVIF needs Pillow 11.3, HEIC `tlx.data.pixels.heif`."""


def split_of(name: str) -> str | None:
    """The split that a folder or a cell names: ``Train``, ``validation``, ``test_set`` ...; None for anything else."""
    return SPLITS.get(_OF_A_SPLIT.sub("", name.casefold()))


@dataclass(frozen=True)
class Reading:
    """How folders and CSV files are read.

    Attributes:
        path_column, label_column, split_column: of a CSV file; no split_column ("") where no column is one, no
            label_column where there is no class.
        separator: of its cells; None takes the one of comma, semicolon, tab and ``|`` by which there are these columns.
        splits: folders called train, val, test and the like are splits; otherwise they are classes.
        order: classes of an earlier build, whose order is kept where they are the same.
        targets: what other columns say.
        label_separator: between several labels in one cell.
        target_order: classes of targets, as `order`.
        nested: a class is the path of folders to a picture (``animal/dog/poodle``), not the first of them alone.
        labels: whether there is a class; without, a folder's pictures may lie anywhere below it.
    """

    path_column: str = "path"
    label_column: str = "label"
    split_column: str = "split"
    separator: str | None = None
    splits: bool = True
    order: tuple[str, ...] = ()
    targets: tuple[TargetSpec, ...] = ()
    label_separator: str = ";"
    target_order: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    nested: bool = False
    labels: bool = True


USUAL = Reading()


@dataclass(frozen=True)
class Picture:
    """One picture to write: a file, or an item of `Source.items`.

    Attributes:
        origin: what a message calls it.
        label: position in the source's class names; -1 where there are none.
        path: its file; None where the data set only gives decoded pictures.
        place: (name of the data set in `Source.items`, position in it) where there is no file.
        bytes: the file's size; 0 where there is no file.
        targets: its ``.json`` (`tlx.data.shards.target_values`); empty where the source has no targets.
    """

    origin: str
    label: int
    path: str | None = None
    place: tuple[str, int] | None = None
    bytes: int = 0
    targets: str = ""


@dataclass(frozen=True)
class Source:
    """What a build starts from.

    Attributes:
        classes: names, at least two; none where there is no class.
        splits: train, val, test (those there are) -> pictures.
        items: data sets that `Picture.place` points into.
        left_out: what lies among the pictures and is passed over.
        targets: those beside the class.
        version: of what `items` hold, where their names and sizes do not say that it has changed.
        labelled: pictures have a class or targets; without, they are for tasks that draw targets of their own.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, tuple[Picture, ...]]
    items: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[PassedOver, ...] = ()
    targets: tuple[Target, ...] = ()
    version: str = ""
    labelled: bool = True


def prepare(source: Source, *, val: float | None, seed: int, where: str) -> Source:
    """The source with its validation pictures split off, if that is asked for, and found to be usable.

    Raises:
        UserError: no validation split and none asked for, classes without pictures, names that cannot be shown ...
    """
    source = _split_off(source, val, seed, where=where)
    _verify(source, where=where)
    return source


def read_folder(folder: Path, reading: Reading = USUAL) -> Source:
    """A folder per class, with or without train, val and test folders above; pictures may lie deeper in a class folder,
    and are of a class of their own then if `reading` is nested.

    A link in a class folder is followed, unless it leads to what is read as another class or split, or to a folder that
    such a one lies in.

    Raises:
        UserError: no class folders, class folders mixed with split folders, two class folders that are one.
    """
    left_out: list[PassedOver] = []
    inside = _folders(folder, left_out)
    if not inside:
        _no_classes(folder)
    named = _split_folders(folder, inside) if reading.splits else {}
    classes_of = (
        {split: _class_folders(f, left_out) for f, split in named.items()}
        if named
        else {"train": {f.name: f for f in inside}}
    )
    read = _ReadFolders.of([list(folders.values()) for folders in classes_of.values()], nested=reading.nested)
    found = {
        split: [one for name, f in folders.items() for one in _pictures_in(f, name, read, left_out)]
        for split, folders in classes_of.items()
    }
    names = {name for folders in classes_of.values() for name in folders}
    if reading.nested:
        names = {name for files in found.values() for name, _ in files}
    classes = in_order(names, reading.order)
    place = {name: i for i, name in enumerate(classes)}
    splits = {
        split: tuple(Picture(path, place[name], path, bytes=size_of(path)) for name, path in files)
        for split, files in found.items()
    }
    return Source(classes, splits, left_out=tuple(left_out))


def read_unlabelled(folder: Path, reading: Reading = USUAL) -> Source:
    """Every picture below a folder, or below its train, val and test folders; links are followed.

    Raises:
        UserError: there are none, or other folders beside split folders.
    """
    left_out: list[PassedOver] = []
    inside = [f for f in listed(folder) if f.is_dir() and kind_of_name(f.name) is None]
    named = _split_folders(folder, inside) if reading.splits else {}
    everything = _ReadFolders(frozenset(), frozenset())
    splits = {
        split: tuple(
            Picture(path, -1, path, bytes=size_of(path)) for _, path in _pictures_in(of, "", everything, left_out)
        )
        for of, split in (named or {folder: "train"}).items()
    }
    return Source((), splits, left_out=tuple(left_out), labelled=False)


def without_labels(source: Source) -> Source:
    """The same pictures, of no class."""
    splits = {split: tuple(replace(p, label=-1) for p in pictures) for split, pictures in source.splits.items()}
    return replace(source, classes=(), splits=splits, labelled=False)


def _split_folders(folder: Path, inside: Sequence[Path]) -> dict[Path, str]:
    """Those of its folders that are splits; none where folders called so are classes.

    Raises:
        UserError: two folders for one split, class folders beside them.
    """
    named = {f: split for f in inside if (split := split_of(f.name)) is not None}
    if named and len(named) < len(inside):
        # a class may be called test, or train, and then it holds pictures, not classes
        beside = {f.name for f in inside if f not in named}
        below = {f: _folder_names(f) for f in named}
        if not any(names and ("train" in named.values() or names & beside) for names in below.values()):
            return {}
        odd = next(f for f in inside if f not in named)
        raise UserError(
            f'"{odd.name}" beside "{next(iter(named)).name}" is no split'
            + did_you_mean(odd.name, ("train", "val", "test")),
            where=str(folder),
            todo="keep only train, val and test here, with the class folders inside each; "
            "or --no-splits, if all of these are classes",
        )
    if len(set(named.values())) < len(named):
        raise UserError(
            f"two folders for one split: {', '.join(f.name for f in named)}",
            where=str(folder),
            todo="keep one for each of train, val and test; or --no-splits, if all of these are classes",
        )
    return named


def _folder_names(folder: Path) -> set[str]:
    return {p.name for p in listed(folder) if p.is_dir() and not kind_of_name(p.name)}


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


def _folders(folder: Path, left_out: list[PassedOver]) -> list[Path]:
    """The folders in it, sorted; what else there is, is noted."""
    here, found = os.path.realpath(folder), []
    for path in listed(folder):
        kind = kind_of_name(path.name)
        if kind is None and path.is_dir():
            if not path.is_symlink() or not _is_within(here, os.path.realpath(path)):
                found.append(path)
                continue
            kind = LINK
        left_out.append(PassedOver(kind or (OUTSIDE if _is_picture(path.name) else no_picture(path.name)), str(path)))
    return found


def _class_folders(folder: Path, left_out: list[PassedOver]) -> dict[str, Path]:
    return {f.name: f for f in _folders(folder, left_out)} or _no_classes(folder, split=True)


def _no_classes(folder: Path, *, split: bool = False) -> NoReturn:
    loose = sum(_is_picture(p.name) for p in folder.iterdir())
    raise UserError(
        f"there are no class folders here{f', but {loose} loose pictures' if loose else ''}",
        where=str(folder),
        todo="one folder per class with its pictures inside; or a CSV file with the columns path,label"
        + ("; --no-splits, if this is no split but a class" if split else ""),
    )


def _is_picture(name: str) -> bool:
    return name.rpartition(".")[2].lower() in EXTENSIONS


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


@dataclass(frozen=True)
class _ReadFolders:
    """The folders that are read as classes, by their real paths.

    Attributes:
        own: the folders.
        above: every folder that one of them lies in.
        nested: each folder in them is a class of its own.
    """

    own: frozenset[str]
    above: frozenset[str]
    nested: bool = False

    @staticmethod
    def of(splits: Sequence[Sequence[Path]], *, nested: bool = False) -> _ReadFolders:
        """
        Args:
            splits: the class folders of each.

        Raises:
            UserError: a class folder is a link to, or into, another one of its split, or to what holds class folders.
        """
        every: dict[str, Path] = {}
        for folders in splits:
            real = {os.path.realpath(f): f for f in folders}
            for f in folders:
                inside = next((p for p in _upward(os.path.realpath(f)) if real.get(p, f) != f), None)
                if inside is not None:
                    raise UserError(
                        f'the class folders "{f.name}" and "{real[inside].name}" are one, by a link',
                        where=str(f),
                        todo="remove one of them",
                    )
            every |= real
        above = frozenset(p for f in every for p in _upward(os.path.dirname(f)))
        holder = next((f for path, f in every.items() if path in above), None)
        if holder is not None:
            raise UserError("this class folder is a link to class folders", where=str(holder), todo="remove it")
        return _ReadFolders(frozenset(every), above, nested)

    def is_elsewhere(self, target: str, own: str) -> bool:
        """Whether a link from class folder `own` to `target` would bring other classes' pictures, or its own again."""
        return target in self.above or any(p in self.own and (self.nested or p != own) for p in _upward(target))


def _upward(path: str) -> Iterator[str]:
    """A real path, and every folder that it lies in."""
    while True:
        yield path
        above = os.path.dirname(path)
        if above == path:
            return
        path = above


def _pictures_in(
    folder: Path, name_of_class: str, read: _ReadFolders, left_out: list[PassedOver]
) -> Iterable[tuple[str, str]]:
    """Pictures of a class folder: (name of the class, path)."""
    own, seen = os.path.realpath(folder), set()
    for at, inside, names in os.walk(folder, onerror=_unreadable, followlinks=True):
        seen.add(os.path.realpath(at))
        deeper = []
        # links last: of a folder and a link to it, the folder is read; a link may also lead back up
        for is_link, name in sorted((os.path.islink(os.path.join(at, name)), name) for name in inside):
            path = os.path.join(at, name)
            real, kind = os.path.realpath(path), kind_of_name(name)
            if kind is None and is_link and (real in seen or read.is_elsewhere(real, own)):
                kind = LINK
            if kind is not None:
                left_out.append(PassedOver(kind, path))
            elif real not in seen:
                seen.add(real)
                deeper.append(name)
        inside[:] = sorted(deeper)
        below = os.path.relpath(at, folder) if read.nested else "."
        label = name_of_class if below == "." else f"{name_of_class}/{below}"
        for name in sorted(names):
            path = os.path.join(at, name)
            kind = kind_of_name(name) or (None if _is_picture(name) else no_picture(name))
            if kind is not None:
                left_out.append(PassedOver(kind, path))
            else:
                yield label, path


def _verify_names(names: Iterable[str], where: str) -> None:
    for name in names:
        if not name.isprintable() or name.strip() != name or not name:
            raise UserError(
                f"the class name {name!r} holds characters that cannot be shown, or spaces at an end",
                where=where,
                todo="rename it",
            )


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
    _verify_names(source.classes, where)
    for target in source.targets:
        _verify_names(target.classes, where)
    if not source.classes and any(p.label != -1 for pictures in source.splits.values() for p in pictures):
        raise UserError("there are labels, and no classes", where=where)
    if source.targets and any(not p.targets for pictures in source.splits.values() for p in pictures):
        raise UserError("there are targets, and pictures without any", where=where)
    if len(set(source.classes)) < len(source.classes):
        raise UserError("two classes have one name", where=where)
    if source.labelled and len(source.classes) < 2 and (source.classes or not source.targets):
        only = ", ".join(source.classes) or "none"
        todo = "add folders or rows of others"
        if not source.classes:
            todo += "; --target NAME, where there is no class; --no-labels, to pretrain without any"
        raise UserError(f"a classifier needs two classes or more; here: {only}", where=where, todo=todo)
    train = source.splits.get("train", ())
    empty = sorted(set(range(len(source.classes))) - {p.label for p in train}) if train else []
    if empty:
        names = ", ".join(f'"{source.classes[i]}"' for i in empty[:10])
        raise UserError(
            f"{len(empty)} of {len(source.classes)} classes have no training pictures: {names}",
            where=where,
            todo="add some, or remove the class",
        )
