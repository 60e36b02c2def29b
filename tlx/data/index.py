"""An index for WebDataset tars, ours or made elsewhere.

``index_shards(folder, classes=None, labels=None, hashes=True, jobs=None, progress=False) -> dict[split, Manifest]``

A sample is the members of a tar that share a name up to its first dot: one picture and one label, which is a number or
a class name in ``.cls`` or ``.txt``, or in ``.json`` alone or under a key, or the folder in the name (see `LabelRule`).
Each tar is read once from its start to its end, for its hash: at the disk's speed, and about a second of a core per GB.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from tlx.data.labels import AUTO, LabelRule, NoLabel, folder_of, label_of
from tlx.data.manifest import RECORD, Manifest, Shard, write_index
from tlx.data.progress import in_processes
from tlx.data.sources import EXTENSIONS, listed
from tlx.data.tars import Member, read_members
from tlx.errors import UserError
from tlx.files import sha256_of
from tlx.parsing import from_json
from tlx.terminal import escaped

_LONGEST = 1 << 20  # bytes that are read of a label
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class Scan:
    """What a tar holds: one (offset, size) and one label, a number or a name, per sample; or what is wrong with it.

    Attributes:
        by_folder: nothing said where labels are, no sample had a member for one, and the folders' names were taken.
        sha256: of all its bytes; None where that was not asked for, or something is wrong with it.
    """

    name: str
    bytes: int
    places: tuple[tuple[int, int], ...] = ()
    labels: tuple[int | str, ...] = ()
    problems: tuple[str, ...] = ()
    by_folder: bool = False
    sha256: str | None = None


def index_shards(
    folder: str | os.PathLike[str],
    *,
    classes: str | os.PathLike[str] | None = None,
    labels: LabelRule | None = None,
    hashes: bool = True,
    jobs: int | None = None,
    progress: bool = False,
) -> dict[str, Manifest]:
    """Indexes the tars of a folder, or of each folder in it (train, val ...) with one list of classes.

    Args:
        classes: where the class names come from, in the order of their labels: a text file with one name per line, or
            a folder that is already indexed. Without it, those of an earlier index; or else labels that are names are
            sorted, and labels that are numbers are their own names.
        labels: which part of a sample is its label. Without it, what an earlier index was told, or "auto". The index
            remembers it.
        hashes: read all of each tar and keep its hash; otherwise only headers and labels are read, and nobody can tell
            later whether the bytes of a tar are still those that were indexed.
        jobs: processes; None is one per core.
        progress: show a bar on a terminal.

    Returns:
        folder name -> what was indexed.

    Raises:
        UserError: no tars, compressed tars, duplicate names, samples without a label or picture; all that is wrong,
            with what to do.
    """
    folders = split_folders(Path(folder))
    tars = [tar for f in folders for tar in sorted(f.glob("*.tar"))]
    rule = labels or next((r for r in map(label_rule, folders) if r != AUTO), AUTO)
    titled = "reading tars" if progress else None
    scans = list(in_processes(partial(scan_tar, rule=rule, hashed=hashes), tars, jobs=jobs, title=titled))
    rule, mixed = _settled(rule, tars, scans)
    problems = [*(p for scan in scans for p in scan.problems), *mixed]
    if problems:
        listed = "\n".join(f"  {p}" for p in problems[:20])
        raise UserError(
            f"these tars cannot be indexed, {len(problems)} problem{'s' if len(problems) > 1 else ''}:\n{listed}",
            where=str(folder),
            todo="every sample needs one picture and one label: 000123.jpg and 000123.cls (.json, .txt), "
            "or cats/000123.jpg with --label-from folder. Its name ends at the first dot",
        )
    by_folder: dict[Path, list[Scan]] = {f: [] for f in folders}
    for tar, scan in zip(tars, scans, strict=True):
        by_folder[tar.parent].append(scan)
    known = _names_in(Path(classes)) if classes is not None else _names_before(folders)
    names = _class_names((label for scan in scans for label in scan.labels), known, where=str(folder))
    return {f.name: write_scans(f, by_folder[f], names, rule) for f in folders}


def label_rule(folder: Path) -> LabelRule:
    """What the index of a folder remembers about where its labels are; "auto" if nothing, or nothing sensible."""
    try:
        told = from_json((folder / "index.json").read_bytes()).get("labels", {})
        return LabelRule.make(told.get("from"), told.get("key"))
    except (OSError, ValueError, AttributeError, TypeError, UserError):
        return AUTO


def _settled(rule: LabelRule, tars: Sequence[Path], scans: Sequence[Scan]) -> tuple[LabelRule, list[str]]:
    """The rule that "auto" came out as, and the tars that do not agree with the others."""
    by_folder = [tar for tar, scan in zip(tars, scans, strict=True) if scan.by_folder]
    if not by_folder:
        return rule, []
    if all(scan.by_folder or not scan.labels for scan in scans):
        return LabelRule("folder"), []
    return rule, [f"{tar}: no sample has a label, in other tars they have" for tar in by_folder]


def write_scans(folder: Path, scans: Sequence[Scan], classes: Sequence[str], rule: LabelRule = AUTO) -> Manifest:
    """Writes the index of a folder from what its tars hold; labels are numbers or names out of `classes`.

    Raises:
        UserError: no samples.
    """
    place = {name: i for i, name in enumerate(classes)}
    labels = [label if isinstance(label, int) else place[label] for scan in scans for label in scan.labels]
    if not labels:
        raise UserError("these tars hold no samples", where=str(folder))
    records = np.zeros(len(labels), RECORD)
    places = np.array([p for scan in scans for p in scan.places], dtype=np.uint64).reshape(-1, 2)
    records["offset"], records["size"], records["label"] = places[:, 0], places[:, 1], labels
    shards = [Shard(scan.name, len(scan.labels), scan.bytes, scan.sha256) for scan in scans]
    return write_index(folder, classes=classes, shards=shards, records=records, labels=rule.header())


def split_folders(folder: Path) -> list[Path]:
    """The folder itself where it holds tars, otherwise those of its folders that do.

    Raises:
        UserError: there are none, or compressed ones, or a folder cannot be read.
    """
    if not folder.is_dir():
        raise UserError("there is no such folder", where=str(folder))
    found = [folder] if has_tars(folder) else [f for f in folders_in(folder) if has_tars(f)]
    for place in found or [folder]:
        packed = sorted(p.name for p in place.iterdir() if p.name.endswith(_COMPRESSED))
        if packed:
            raise UserError(
                f"{len(packed)} compressed tar{'s' if len(packed) > 1 else ''}, such as {packed[0]}: samples inside "
                "cannot be reached one by one",
                where=str(place),
                todo=_unpack(packed[0]),
            )
    if not found:
        raise UserError("there are no .tar files here", where=str(folder), todo="tlx shards build SRC OUT makes some")
    return found


def folders_in(folder: Path) -> list[Path]:
    """Its folders, without hidden ones and what a file system keeps for itself.

    Raises:
        UserError: it cannot be read.
    """
    return [p for p in listed(folder) if p.is_dir() and not p.name.startswith(".") and p.name != "lost+found"]


def has_tars(folder: Path) -> bool:
    """
    Raises:
        UserError: it cannot be read.
    """
    return any(p.name.endswith(".tar") for p in listed(folder))


def scan_tar(path: Path, rule: LabelRule = AUTO, *, hashed: bool = True) -> Scan:
    """What a tar holds.

    Args:
        hashed: read all of it, for its hash; otherwise its headers and labels alone.
    """
    size = 0
    try:
        size = path.stat().st_size
        members, end = read_members(path)
        _verify_end(path, end)
        with open(path, "rb", buffering=0) as file:
            scan = _scan(path, size, file.fileno(), members, rule)
            # a second reader of the headers, which is little, and in the page cache by now
            return replace(scan, sha256=sha256_of(file)) if hashed and not scan.problems else scan
    except (tarfile.TarError, OSError, EOFError) as error:
        return Scan(path.name, size, problems=(f"{path}: {_why(path, error)}",))


def _scan(path: Path, size: int, file: int, members: Sequence[Member], rule: LabelRule) -> Scan:
    groups, problems = _group(members, str(path))
    labels: list[int | str] = []
    places, unlabelled, folders = [], [], []
    for key, group in groups.items():

        def read(extension: str, group: Mapping[str, Member] = group) -> bytes:
            member = group[extension]
            return os.pread(file, min(member.size, _LONGEST), member.offset_data)

        try:
            picture = _picture(group)
            places.append((picture.offset_data, picture.size))
            folders.append(folder_of(picture.name))
            labels.append(label_of(rule, picture.name, group, read))
        except NoLabel as error:
            unlabelled.append(f"{path}: {escaped(key)}: {error}")
        except ValueError as error:
            problems.append(f"{path}: {escaped(key)}: {error}")
    by_folder = rule.place == "auto" and not (labels or problems) and bool(folders) and all(folders)
    if by_folder:
        return replace(_scan(path, size, file, members, LabelRule("folder")), by_folder=True)
    return Scan(path.name, size, tuple(places), tuple(labels), (*problems, *unlabelled))


def _verify_end(path: Path, offset: int) -> None:
    """tarfile stops silently at a header that is damaged or cut off, and so would lose what comes after.

    Raises:
        tarfile.ReadError: what it stopped at is not a tar's end, or more comes after it.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        more = not block.strip(b"\0") and any(part.strip(b"\0") for part in iter(partial(file.read, 1 << 20), b""))
    if not block:
        raise tarfile.ReadError(
            f"it may be cut off: it has no end mark (if it is whole: truncate -s +1024 {path.name})"
        )
    if block.strip(b"\0") or len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"it is damaged or cut off at byte {offset}")
    if more:
        raise tarfile.ReadError(
            f"there is more after its end mark at byte {offset} (tars joined with cat? tar -A joins them)"
        )


def _group(members: Iterable[Member], where: str) -> tuple[dict[str, dict[str, Member]], list[str]]:
    groups: dict[str, dict[str, Member]] = {}
    problems, last = [], None
    for member in members:
        folder, slash, file = member.name.rpartition("/")
        stem, _, extension = file.partition(".")
        key, extension = folder + slash + stem, extension.lower()
        if not stem:  # .DS_Store and the like
            continue
        # WebDataset takes neighbours together, so the same name further on would be another sample there
        if extension in groups.get(key, {}) or (key in groups and key != last):
            problems.append(f"{where}: two samples are called {escaped(key)}")
        groups.setdefault(key, {})[extension] = member
        last = key
    return groups, problems


def _picture(group: Mapping[str, Member]) -> Member:
    pictures = [m for extension, m in group.items() if extension in EXTENSIONS]
    if len(pictures) != 1:
        raise ValueError(f"{len(pictures) or 'no'} pictures among {', '.join(map(escaped, group))}")
    if pictures[0].size >= 1 << 32:
        raise ValueError("a picture of 4 GiB or more")
    return pictures[0]


def _class_names(labels: Iterable[int | str], known: Sequence[str] | None, *, where: str) -> tuple[str, ...]:
    counted = Counter(labels)
    numbers = {label for label in counted if isinstance(label, int)}
    names = {label for label in counted if isinstance(label, str)}
    if numbers and names:
        raise UserError(f"some labels are numbers ({min(numbers)}), others names ({escaped(min(names))})", where=where)
    if known is not None:
        unknown: list[str | int] = [*sorted(names - set(known)), *sorted(n for n in numbers if n >= len(known))]
        if unknown:
            raise UserError(
                f"the label {unknown[0]} is not among the {len(known)} classes of --classes or the earlier index",
                where=where,
                todo="give a complete list: --classes FILE (a name per line)",
            )
        return tuple(known)
    absent = next((i for i, number in enumerate(sorted(numbers)) if i != number), None)
    if absent is not None:
        raise UserError(
            f"labels go from {min(numbers)} to {max(numbers)}, but none is {absent}",
            where=where,
            todo="name the classes, also those without samples: --classes FILE (a name per line) or an indexed folder",
        )
    return tuple(sorted(names)) if names else tuple(map(str, range(len(numbers))))


def _names_before(folders: Sequence[Path]) -> tuple[str, ...] | None:
    """The class names that an earlier index or build of these tars knew."""
    for file in [f / "index.json" for f in folders] + [f.parent / "build.json" for f in folders]:
        try:
            names = from_json(file.read_bytes())["classes"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return tuple(names)
    return None


def _names_in(source: Path) -> tuple[str, ...]:
    if source.is_dir():
        return Manifest.open(source).classes
    try:
        names = tuple(line.strip() for line in source.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the class names cannot be read: {error}", where=str(source)) from error
    if len(set(names)) < len(names):
        raise UserError("a class is named twice", where=str(source))
    return names


def _why(path: Path, error: Exception) -> str:
    if isinstance(error, OSError):
        return f"it cannot be read: {error.strerror or error}"
    with suppress(OSError), open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            return f"compressed although it is called .tar; {_unpack(path.name + '.gz')}"
    return f"not a whole tar: {error}"


def _unpack(name: str) -> str:
    tool = {"gz": "gunzip", "tgz": "gunzip", "bz2": "bunzip2", "xz": "unxz", "zst": "unzstd"}[name.rpartition(".")[2]]
    return f"unpack the compression, not the tar: {tool} {name}"
