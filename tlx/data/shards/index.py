"""An index for WebDataset tars, ours or made elsewhere.

``index_folder(folder, classes=None, labels=None, hashes=True, jobs=None, fresh=False) -> Indexed``

A sample is the members of a tar that share a name up to its first dot: one picture and one label, which is a number or
a class name in ``.cls`` or ``.txt``, or in ``.json`` alone or under a key, or the folder in the name (see `LabelRule`).
Which class a label is: `class_names`. Targets beside the label stand in a ``.json`` (`target_values`). What is neither
is counted and named by kind (`passed_over`).
Each tar is read once from its start to its end, for its hash: at the disk's speed, and about a second of a core per GB.
"""

from __future__ import annotations

import os
import sys
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from tlx.base.errors import UserError
from tlx.base.files import sha256_of
from tlx.base.parsing import from_json
from tlx.base.terminal import escaped
from tlx.data.build.progress import in_processes
from tlx.data.build.sources import listed
from tlx.data.shards.class_names import NO_CLASS, ClassList, Numbers, are_ambiguous, class_list
from tlx.data.shards.index_file import refuse_unfinished
from tlx.data.shards.index_targets import names_in, target_array, targets_in
from tlx.data.shards.labels import AUTO, FOLDERS, LabelRule, NoLabel, TargetReader, folder_of, label_of, pictures_in
from tlx.data.shards.labels import EXTENSIONS as LABELS
from tlx.data.shards.manifest import RECORD, Manifest, Shard, write_index
from tlx.data.shards.passed_over import (
    BELOW,
    DANGLING,
    UNUSED,
    PassedOver,
    is_document,
    kind_of_name,
    kind_of_path,
    merged,
    no_picture,
)
from tlx.data.shards.target_values import Column, Labels, TargetSpec, Written, packed
from tlx.data.shards.targets import LABEL, Target, read_target
from tlx.data.shards.tars import Contents, Member, read_members

_LONGEST = 1 << 20  # bytes that are read of a label
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class Scan:
    """What a tar holds: one (offset, size) and one label, as it is written, per sample; or what is wrong with it.

    Attributes:
        targets: by target of the rule, one value per sample.
        hints: by name of a target, what a key may be called that a sample lacks.
        by_folder: nothing said where labels are, no sample had a member for one, and the folders' names were taken.
        sha256: of all its bytes; None where that was not asked for, or something is wrong with it.
    """

    name: str
    bytes: int
    places: tuple[tuple[int, int], ...] = ()
    labels: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    by_folder: bool = False
    sha256: str | None = None
    passed_over: tuple[PassedOver, ...] = ()
    targets: tuple[Column, ...] = ()
    hints: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Indexed:
    """The indexes that were made of a folder.

    Attributes:
        manifests: folder name -> what was indexed.
        passed_over: what is no sample, and what lies beside the tars.
        kept: classes of the earlier index, or of `--classes`, that no sample has.
    """

    manifests: dict[str, Manifest]
    passed_over: tuple[PassedOver, ...] = ()
    kept: tuple[str, ...] = ()


def index_folder(
    folder: str | os.PathLike[str],
    *,
    classes: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
    labels: LabelRule | None = None,
    hashes: bool = True,
    jobs: int | None = None,
    fresh: bool = False,
    progress: bool = False,
) -> Indexed:
    """Indexes the tars of a folder, or of each folder in it (train, val ...) with one list of classes.

    Args:
        classes: where the class names come from, in the order of their labels: a text file with one name per line, or
            a folder that is already indexed. Without it, those of an earlier index; or else the labels that there are.
            Those of targets, too: by name, the class being `label`.
        labels: which part of a sample is its label, and which are its targets. Without it, what an earlier index was
            told, or "auto". The index remembers it.
        hashes: read all of each tar and keep its hash; otherwise only headers and labels are read, and nobody can tell
            later whether the bytes of a tar are still those that were indexed.
        jobs: processes; None is one per core.
        fresh: forget what an earlier index says: its classes, and where it found the labels.
        progress: show a bar on a terminal.

    Raises:
        UserError: no tars, compressed tars, duplicate names, samples without a label or picture, labels that could be
            read in two ways; all that is wrong, with what to do.
    """
    refuse_unfinished(Path(folder))
    folders, passed_over = split_folders(Path(folder)), passed_over_beside(Path(folder))
    tars = [tar for f in folders for tar in tars_in(f)]
    before = AUTO if fresh else next((r for r in map(label_rule, folders) if r != AUTO), AUTO)
    if before == AUTO:
        before = _rule_of_build(folders[0].parent)
    given = labels or AUTO
    rule = given.over(before)
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
            "or cats/000123.jpg with --label-from folder; pictures alone: --label-from none. "
            "Its name ends at the first dot (--last-dot: at the last)",
        )
    by_folder: dict[Path, list[Scan]] = {f: [] for f in folders}
    for tar, scan in zip(tars, scans, strict=True):
        by_folder[tar.parent].append(scan)
    lists = dict(classes) if isinstance(classes, Mapping) else {LABEL: classes} if classes is not None else {}
    found = {label for scan in scans for label in scan.labels}
    named, rule = _class_list(found, lists.pop(LABEL, None), folders, rule, said=given.numbers, fresh=fresh)
    targets, rule = targets_in(rule, scans, folders, lists, fresh=fresh)
    made = {f.name: write_scans(f, by_folder[f], named, rule, targets) for f in folders}
    used = set(named.place.values())
    kept = tuple(name for i, name in enumerate(named.names) if i not in used)
    return Indexed(made, merged((*passed_over, *(p for scan in scans for p in scan.passed_over))), kept)


def _class_list(
    labels: Collection[str],
    classes: str | os.PathLike[str] | None,
    folders: Sequence[Path],
    rule: LabelRule,
    *,
    said: Numbers | None,
    fresh: bool,
) -> tuple[ClassList, LabelRule]:
    """The classes of labels, and the rule with what is known of numbers.

    Args:
        said: what numbers are, as it was said now; `rule` may remember it from an earlier time, of an earlier list.
    """
    where, is_folder = str(folders[0] if len(folders) == 1 else folders[0].parent), rule.place in FOLDERS
    if rule.place == "none":
        if classes is not None:
            raise UserError(
                "a list of classes, where there is no class", where="--classes", todo="leave one of them out"
            )
        return NO_CLASS, rule
    earlier, built = _names_before(folders, fresh=fresh)
    given = names_in(Path(classes)) if classes is not None else None
    known = given if given is not None else earlier
    # a build writes nothing but positions in its own list
    positional = not is_folder and said is None and (built or rule.numbers == "positions")
    if positional and are_ambiguous(known or ()):
        rule = replace(rule, numbers="positions")
    named = class_list(labels, known, numbers=rule.numbers, named=is_folder, where=where)
    positional |= not is_folder and said is None and any(label not in named.names for label in named.place)
    if positional and given is not None and earlier is not None:
        _refuse_moved(earlier, given, where)
    return named, rule


def _refuse_moved(earlier: Sequence[str], given: Sequence[str], where: str) -> None:
    """
    Raises:
        UserError: a class has another position in a list than in the earlier one, which labels are positions in.
    """
    place = {name: i for i, name in enumerate(given)}
    moved = next((name for i, name in enumerate(earlier) if place.get(name, i) != i), None)
    if moved is not None:
        raise UserError(
            f'the labels are positions, and "{escaped(moved)}" is at position {earlier.index(moved)} '
            f"in the earlier index or build, at {place[moved]} in --classes",
            where=where,
            todo="leave --classes out, and the earlier list is kept; --numbers positions, if --classes is right",
        )


def label_rule(folder: Path) -> LabelRule:
    """What the index of a folder remembers about where its labels are; "auto" if nothing, or nothing sensible."""
    try:
        return LabelRule.read(from_json((folder / "index.json").read_bytes()).get("labels", {}))
    except (OSError, ValueError, AttributeError, TypeError, UserError):
        return AUTO


def _rule_of_build(folder: Path) -> LabelRule:
    """Where a build has written what its pictures are."""
    try:
        said = from_json((folder / "build.json").read_bytes())
        targets = tuple(map(read_target, said.get("targets", ())))
        place = "auto" if said["classes"] else "none"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return AUTO
    return LabelRule(place, targets=tuple(TargetSpec(t.name, t.kind, (t.name,)) for t in targets))


def _settled(rule: LabelRule, tars: Sequence[Path], scans: Sequence[Scan]) -> tuple[LabelRule, list[str]]:
    """The rule that "auto" came out as, and the tars that do not agree with the others."""
    by_folder = [tar for tar, scan in zip(tars, scans, strict=True) if scan.by_folder]
    if not by_folder:
        return rule, []
    if all(scan.by_folder or not scan.labels for scan in scans):
        return replace(rule, place="folder"), []
    folders = {tar.parent for tar in tars}
    apart = f"; index {tars[0].parent.parent}/... one by one, the second with --classes" if len(folders) > 1 else ""
    return rule, [f"{tar}: no sample has a label, in other tars they have{apart}" for tar in by_folder]


def write_scans(
    folder: Path,
    scans: Sequence[Scan],
    classes: ClassList,
    rule: LabelRule = AUTO,
    targets: Sequence[Target] = (),
) -> Manifest:
    """Writes the index of a folder from what its tars hold.

    Args:
        targets: those of the rule.

    Raises:
        UserError: no samples, or a value that is none of its target.
    """
    labels = [classes.place[label] for scan in scans for label in scan.labels]
    if not labels:
        raise UserError("these tars hold no samples", where=str(folder))
    records = np.zeros(len(labels), RECORD)
    places = np.array([p for scan in scans for p in scan.places], dtype=np.uint64).reshape(-1, 2)
    records["offset"], records["size"], records["label"] = places[:, 0], places[:, 1], labels
    shards = [Shard(scan.name, len(scan.labels), scan.bytes, scan.sha256) for scan in scans]
    arrays = [(target, target_array(target, rule, scans)) for target in targets]
    lost = next((target.name for target, array in arrays if array is None), None)
    if lost is not None:
        raise UserError(f"a value of the target {lost} is not among its classes", where=str(folder))
    return write_index(
        folder,
        classes=classes.names,
        shards=shards,
        records=records,
        labels=rule.header(),
        targets=[(target, array) for target, array in arrays if array is not None],
    )


def split_folders(folder: Path) -> list[Path]:
    """The folder itself where it holds tars, otherwise those of its folders that do.

    Raises:
        UserError: there are none, or compressed ones, or a folder cannot be read.
    """
    if not folder.is_dir():
        raise UserError("not a folder" if folder.exists() else "there is no such folder", where=str(folder))
    found = [folder] if has_tars(folder) else [f for f in folders_in(folder) if has_tars(f)]
    for place in found or [folder]:
        packed = [p.name for p in listed(place) if p.name.endswith(_COMPRESSED) and not kind_of_name(p.name)]
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
    """Its folders, without what is passed over everywhere (`tlx.data.shards.passed_over`).

    Raises:
        UserError: it cannot be read.
    """
    return [p for p in listed(folder) if p.is_dir() and not kind_of_name(p.name)]


def tars_in(folder: Path) -> list[Path]:
    """Its tars, without what is passed over everywhere, such as ``._000.tar`` of macOS.

    Raises:
        UserError: it cannot be read.
    """
    return [p for p in listed(folder) if p.name.endswith(".tar") and not kind_of_name(p.name)]


def has_tars(folder: Path) -> bool:
    """
    Raises:
        UserError: it cannot be read.
    """
    return bool(tars_in(folder))


def passed_over_beside(folder: Path) -> list[PassedOver]:
    """What looks like tars of a set of shards and is not read with it: tars in folders below its own, or hidden."""
    has_own, found = has_tars(folder), []
    for path in listed(folder):
        kind = kind_of_name(path.name)
        with suppress(UserError):  # a folder that nobody may read is not ours either
            if kind and path.name.endswith(".tar"):
                found.append(PassedOver(kind, str(path)))
            elif has_own and not kind and path.is_dir() and has_tars(path):
                found.append(PassedOver(BELOW, str(path)))
    return found


def scan_tar(path: Path, rule: LabelRule = AUTO, *, hashed: bool = True) -> Scan:
    """What a tar holds.

    Args:
        hashed: read all of it, for its hash; otherwise its headers and labels alone.
    """
    size = 0
    try:
        size = path.stat().st_size
        contents = read_members(path)
        _verify_end(path, contents.end)
        with open(path, "rb", buffering=0) as file:
            scan = _scan(path, size, file.fileno(), contents, rule)
            # a second reader of the headers, which is little, and in the page cache by now
            return replace(scan, sha256=sha256_of(file)) if hashed and not scan.problems else scan
    except (tarfile.TarError, OSError, EOFError) as error:
        return Scan(path.name, size, problems=(f"{path}: {_why(path, error)}",))


def _scan(path: Path, size: int, file: int, contents: Contents, rule: LabelRule) -> Scan:
    groups, problems, passed_over = _group(contents.members, str(path), last_dot=rule.last_dot)
    passed_over += contents.passed_over
    lost = _lost_links(contents, last_dot=rule.last_dot)
    samples, unlabelled, folders, bare = _Samples(rule), [], [], []
    for key, group in groups.items():

        def read(extension: str, group: Mapping[str, Member] = group) -> bytes:
            member = group[extension]
            return os.pread(file, min(member.size, _LONGEST), member.offset_data)

        if not pictures_in(group):
            bare.append((key, group))
            continue
        try:
            picture = _picture(group, rule)
            folders.append(folder_of(_with_slashes(picture.name)))
            label = label_of(rule, _with_slashes(picture.name), group, read)
            samples.add(picture, label, samples.reader.read(group, read), group)
        except NoLabel as error:
            unlabelled.append(f"{path}: {escaped(key)}: {error}{lost.get(key, '')}")
        except ValueError as error:
            problems.append(f"{path}: {escaped(key)}: {error}")
    by_folder = rule.place == "auto" and not (samples.labels or problems) and bool(folders) and all(folders)
    if by_folder:
        return replace(_scan(path, size, file, contents, replace(rule, place="folder")), by_folder=True)
    for key, group in bare:
        if _is_stray(key, group, samples.label_extensions, rule):
            passed_over += [PassedOver(no_picture(member.name), member.name) for member in group.values()]
        else:
            among = ", ".join(map(escaped, group))
            problems.append(f"{path}: {escaped(key)}: no pictures among {among}{lost.get(key, '')}")
    found, labels = tuple(samples.places), tuple(samples.labels)
    unused = (PassedOver(UNUSED, f"*.{extension}", count) for extension, count in samples.unused.items())
    return Scan(
        path.name,
        size,
        found,
        labels,
        (*problems, *unlabelled),
        passed_over=(*passed_over, *unused),
        targets=tuple(packed(spec, values) for spec, values in zip(rule.targets, samples.targets, strict=True)),
        hints=samples.reader.hints,
    )


class _Samples:
    """Samples of a tar: where their pictures are, their labels, and the extensions of what else they have."""

    def __init__(self, rule: LabelRule) -> None:
        self.rule, self.reader = rule, TargetReader(rule)
        self.targets: list[list[Written]] = [[] for _ in rule.targets]
        self._seen: dict[Labels, Labels] = {}
        self.places: list[tuple[int, int]] = []
        self.labels: list[str] = []
        self.label_extensions: set[str] = set()
        self.unused: Counter[str] = Counter()

    def add(self, picture: Member, label: str, targets: Sequence[Written], group: Mapping[str, Member]) -> None:
        """Adds one sample."""
        rule = self.rule
        own = next(extension for extension, member in group.items() if member is picture)
        of_label = None if rule.place in (*FOLDERS, "none") else rule.label_in(group, own)
        of_targets = self.reader.member_in(group)
        self.places.append((picture.offset_data, picture.size))
        self.labels.append(sys.intern(label))
        self.label_extensions |= {of_label} if of_label else set()
        for values, value in zip(self.targets, targets, strict=True):
            # samples with the same labels share them, of which there may be many
            values.append(self._seen.setdefault(value, value) if isinstance(value, Labels) else value)
        self.unused.update(extension for extension in group if extension not in (own, of_label, of_targets))


def _is_stray(key: str, group: Mapping[str, Member], of_labels: Collection[str], rule: LabelRule) -> bool:
    """Whether members without a picture belong to no sample: README.md, or classes.txt where labels are in .cls."""
    if is_document(key.rpartition("/")[2]) or rule.place in (*FOLDERS, "none"):
        return True
    if rule.place != "auto":
        return not any(e == rule.place or e.endswith(f".{rule.place}") for e in group)
    return not any(e.rpartition(".")[2] in LABELS and (not of_labels or e in of_labels) for e in group)


def _lost_links(contents: Contents, *, last_dot: bool) -> dict[str, str]:
    """By the name of a sample, what is said of its link that leads nowhere."""
    links = [p.name for p in contents.passed_over if p.kind == DANGLING]
    names = {_parts_of(n.partition(" -> ")[0], last_dot=last_dot)[0]: n for n in links}
    return {name: f"; {escaped(link)} leads to nothing in this tar" for name, link in names.items()}


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


def _group(
    members: Iterable[Member], where: str, *, last_dot: bool
) -> tuple[dict[str, dict[str, Member]], list[str], list[PassedOver]]:
    """The members of each sample by extension; what is wrong with them; what is none of a sample."""
    groups: dict[str, dict[str, Member]] = {}
    problems, passed_over, last = [], [], None
    for member in members:
        kind = kind_of_path(_with_slashes(member.name))
        if kind is not None:
            passed_over.append(PassedOver(kind, member.name))
            continue
        key, extension = _parts_of(member.name, last_dot=last_dot)
        # WebDataset takes neighbours together, so the same name further on would be another sample there
        if extension in groups.get(key, {}) or (key in groups and key != last):
            problems.append(f"{where}: two samples are called {escaped(key)}")
        groups.setdefault(key, {})[extension] = member
        last = key
    return groups, problems, passed_over


def _parts_of(name: str, *, last_dot: bool) -> tuple[str, str]:
    """What a member's name has before its first (or last) dot, folders included, and after it, in small letters."""
    folder, slash, file = _with_slashes(name).rpartition("/")
    stem, _, extension = file.partition(".")
    if last_dot and extension:
        stem, _, extension = file.rpartition(".")
    return folder + slash + stem, extension.lower()


def _with_slashes(name: str) -> str:
    """A name that was written on Windows, as others write it."""
    return name if "/" in name else name.replace("\\", "/")


def _picture(group: Mapping[str, Member], rule: LabelRule) -> Member:
    picture = group[rule.picture_in(group)]
    if picture.size >= 1 << 32:
        raise ValueError("a picture of 4 GiB or more")
    return picture


def _names_before(folders: Sequence[Path], *, fresh: bool) -> tuple[tuple[str, ...] | None, bool]:
    """The class names that an earlier index or build of these tars knew; and whether a build has made the tars.

    Args:
        fresh: only a build counts: its tars hold positions in its list, and no names.
    """
    of_build = _names_of(folders[0].parent / "build.json")
    of_index = next((n for f in folders if (n := _names_of(f / "index.json")) is not None), None)
    known = of_index if of_index is not None and not fresh else of_build
    return known, of_build is not None and known == of_build


def _names_of(file: Path) -> tuple[str, ...] | None:
    try:
        names = from_json(file.read_bytes())["classes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


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
