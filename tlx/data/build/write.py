"""Shards from pictures.

``build_shards(source, out, options=BuildOptions(), progress=False) -> BuildSummary``
``build_part(source, out, part, options=BuildOptions(), progress=False) -> PartSummary``, on several machines, before it

``OUT/train``, ``OUT/val`` and ``OUT/test`` are folders of plain WebDataset tars (``000000.tar`` with ``000000123.jpg``
and ``000000123.cls``) and their index; ``OUT/build.json`` says what was asked for, whether it is done, and what the
pictures are like. Pictures keep their bytes unless they are made smaller or written again without loss. The same
request gives the same bytes.

A shard and the note of what is in it (``.000000.json``, removed at the end) are each written beside and renamed, the
shard last: one that has its final name is whole, and is not written again after an interruption.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, cast

import numpy as np

from tlx.base.errors import TlxError, UserError
from tlx.base.files import HashedFile, scratch, write_whole
from tlx.base.locks import locked_folder
from tlx.base.terminal import escaped
from tlx.data.build.build_folder import (
    FORMAT,
    claim,
    claim_for_a_part,
    damaged,
    remove_what_was_left,
    same_request,
    state_of,
    tidy,
)
from tlx.data.build.build_parts import Part, at_work_on, refuse_other_division, wait_for_parts
from tlx.data.build.build_tasks import ShardTask, shard_tasks
from tlx.data.build.content import Stored, import_what_is_needed, needs_extension, read, stored
from tlx.data.build.progress import cores, in_processes
from tlx.data.build.row_tables import HUB, ParquetPictures, hub_commit
from tlx.data.build.sources import USUAL, Picture, Reading, Source, prepare
from tlx.data.build.specs import read_source
from tlx.data.pixels.decode import DecodeError
from tlx.data.pixels.one_picture import at_picture, no_memory
from tlx.data.shards.class_names import NO_CLASS, are_ambiguous, by_position
from tlx.data.shards.duplicates import Copy, Duplicates, find_duplicates
from tlx.data.shards.index import Scan, scan_tar, write_scans
from tlx.data.shards.labels import AUTO, LabelRule
from tlx.data.shards.manifest import Manifest
from tlx.data.shards.notes import Note, Rewrites, read_note
from tlx.data.shards.passed_over import PassedOver, no_picture
from tlx.data.shards.statistics import Facts, Statistics, chosen_for_measuring, summarise
from tlx.data.shards.target_arrays import target_entry
from tlx.data.shards.target_values import TargetSpec, parse_specs
from tlx.data.shards.targets import read_target
from tlx.data.shards.tars import add_sample
from tlx.data.stream.reader import MACHINES
from tlx.data.stream.threads import in_threads
from tlx.data.stream.workers import is_orphaned

NO_ORDER: Mapping[str, tuple[str, ...]] = MappingProxyType({})
_LATER = ("targets", "label_separator", "nested", "labels")  # options that build.json names where they are not usual
_WAIT = "wait for it, or name another folder"


class SourceChanged(UserError):
    """Finished shards are of other pictures than the source has now."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How shards are built.

    Attributes:
        val: share of each class split off for validation (see `read_source`).
        seed: of that split and of the shuffle over shards.
        shard_samples, shard_bytes: a shard ends before it exceeds either (one picture always fits); a picture's size
            counts as it is read, before it is made smaller.
        resize: the short side in pixels that larger pictures are made smaller to.
        quality: of JPEGs that were made smaller.
        rewrite: code JPEGs anew without loss where that makes them smaller, or where they are progressive: baseline,
            with Huffman tables of their own and a restart marker in every row of blocks.
        skip_bad: leave unreadable pictures out and list them; otherwise they are an error.
        jobs: processes; None is one per core.
        root, download, variant: of a torchvision data set.
        path_column, label_column, split_column, separator, splits: of a CSV file, of folders (see `Reading`).
        targets: what else is known of a picture, each as `TargetSpec.parse` reads it.
        label_separator, nested, labels: see `Reading`.
    """

    val: float | None = None
    seed: int = 0
    shard_samples: int = 1000
    shard_bytes: int = 256 << 20
    resize: int | None = None
    quality: int = 95
    rewrite: bool = False
    skip_bad: bool = False
    jobs: int | None = None
    root: str | None = None
    download: bool = False
    variant: str | None = None
    path_column: str = USUAL.path_column
    label_column: str = USUAL.label_column
    split_column: str = USUAL.split_column
    separator: str | None = None
    splits: bool = True
    targets: tuple[str, ...] = ()
    label_separator: str = ";"
    nested: bool = False
    labels: bool = True

    def reading(self, order: Sequence[str] = (), target_order: Mapping[str, tuple[str, ...]] = NO_ORDER) -> Reading:
        """How the source is read; with the classes in these orders, where they are the same."""
        return Reading(
            path_column=self.path_column,
            label_column=self.label_column,
            split_column=self.split_column,
            separator=self.separator,
            splits=self.splits,
            order=tuple(order),
            targets=parse_specs(self.targets),
            label_separator=self.label_separator,
            target_order=target_order,
            nested=self.nested,
            labels=self.labels,
        )


@dataclass(frozen=True)
class BuildSummary:
    """What a build made.

    Attributes:
        classes: names, shared by all splits.
        splits: split -> {"samples", "shards", "bytes"}.
        bad: unreadable pictures that were left out, each with its reason.
        left_out: what lay among the pictures and was passed over.
        statistics: split -> what its pictures are like.
        duplicates: pictures with the same content, by the names they have in the source.
        rewrites: what --rewrite did; None where it was not asked for.
        already: it was there before, and nothing was done.
        seconds: how long it took.
        commit: of a data set of the hub.
    """

    out: Path
    classes: tuple[str, ...]
    splits: dict[str, dict[str, int]]
    bad: tuple[str, ...]
    left_out: tuple[PassedOver, ...]
    statistics: dict[str, Statistics] = field(default_factory=dict)
    duplicates: Duplicates = field(default_factory=Duplicates)
    rewrites: Rewrites | None = None
    already: bool = False
    seconds: float = 0.0
    commit: str = ""


@dataclass(frozen=True)
class PartSummary:
    """What one part of a build made.

    Attributes:
        shards: how many are its own.
        before: of these, how many were there before.
        samples: pictures in its shards.
        bad: unreadable pictures that were left out, each with its reason.
        already: the whole build is finished, and nothing was done.
        seconds: how long it took.
    """

    part: Part
    shards: int = 0
    before: int = 0
    samples: int = 0
    bad: tuple[str, ...] = ()
    already: bool = False
    seconds: float = 0.0


def build_shards(
    source: str | os.PathLike[str] | Source,
    out: str | os.PathLike[str],
    options: BuildOptions = BuildOptions(),
    *,
    progress: bool = False,
) -> BuildSummary:
    """Writes shards of a source; run it again after an interruption.

    Raises:
        UserError: a source that is not usable, unreadable pictures without skip_bad, or a folder that holds
            something else: what, where and what to do.
    """
    started, folder = time.monotonic(), Path(out)
    source = source if isinstance(source, Source) else os.fspath(source)
    _check(source, folder, options)
    request = _request(source, options)
    already = _already(folder, request, source)
    if already is not None:
        return already
    found, tasks, plan = _planned(source, options, request, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked_folder(folder, "another build is writing shards here", todo=_WAIT):
        already = _already(folder, request, source)
        if already is not None:  # by another build, since we looked
            return already
        wait_for_parts(folder)
        claim(folder, plan, asdict(BuildOptions()))
        _write_all(found, folder, options, tasks, progress=progress)
        notes = [read_note(_note_of(folder, task)) for task in tasks]
        result = _finish(found, folder, tasks, notes, options)
        write_whole(folder / "build.json", json.dumps({**plan, "state": "done", **result}, indent=1).encode())
        tidy(folder)
    return _summary(folder, {**plan, **result}, seconds=time.monotonic() - started)


def build_part(
    source: str | os.PathLike[str] | Source,
    out: str | os.PathLike[str],
    part: Part,
    options: BuildOptions = BuildOptions(),
    *,
    progress: bool = False,
) -> PartSummary:
    """Writes one part of the shards of a source, while others write other parts into the same folder; `build_shards`
    then writes the index. Run it again after an interruption.

    Raises:
        UserError: what `build_shards` raises; somebody else is at this part, or at parts of another number; the source
            has changed since other parts were built; `download`, which several machines would do at once.
    """
    started, folder = time.monotonic(), Path(out)
    source = source if isinstance(source, Source) else os.fspath(source)
    _check(source, folder, options)
    if options.download:
        raise UserError(
            "every part would download the data set into one folder", where="--download", todo="download it once before"
        )
    request = _request(source, options)
    if _already(folder, request, source) is not None:
        return PartSummary(part, already=True)
    found, tasks, plan = _planned(source, options, request, folder)
    own = part.share(tasks)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with locked_folder(folder, "another build is writing shards here", todo=_WAIT):  # only until we have begun
            if _already(folder, request, source) is not None:
                return PartSummary(part, already=True)
            claim_for_a_part(folder, plan, asdict(BuildOptions()))
            refuse_other_division(folder, part)
            held.enter_context(at_work_on(folder, part))
        remove_what_was_left(folder, {(task.split, task.name.removesuffix(".tar")) for task in own})
        before = sum(_known(folder, task, options) is not None for task in own)
        _write_all(found, folder, options, own, progress=progress)
        if _already(folder, request, source) is not None:  # finished by others meanwhile, where there are no locks
            return PartSummary(part, already=True)
        notes = [read_note(_note_of(folder, task)) for task in own]
    return PartSummary(
        part,
        shards=len(own),
        before=before,
        samples=sum(len(note.records) for note in notes),
        bad=tuple(b for note in notes for b in note.bad),
        seconds=time.monotonic() - started,
    )


def _check(source: str | Source, folder: Path, options: BuildOptions) -> None:
    if source == "":
        raise UserError(
            "the source has no name", todo="give a folder, a .csv or .parquet file, torchvision:NAME or hf:OWNER/NAME"
        )
    if options.jobs is not None and options.jobs < 0:
        raise UserError("--jobs takes a number of processes, 0 or more")
    if isinstance(source, str) and Path(source).is_dir() and folder.resolve().is_relative_to(Path(source).resolve()):
        raise UserError("the shards would lie among their own source", where=str(folder), todo="name a folder outside")
    if options.shard_samples < 1 or options.shard_bytes < 1:
        raise UserError("a shard holds at least one sample and one byte")
    if options.resize is not None and options.resize < 1:
        raise UserError("--resize takes the short side in pixels")
    if not 1 <= options.quality <= 100:
        raise UserError("--quality goes from 1 to 100")
    if not options.label_separator.strip() or "?" in options.label_separator:
        raise UserError(f"{options.label_separator!r} does not separate labels", where="--label-separator")
    parse_specs(options.targets)
    if options.rewrite:
        needs_extension("--rewrite")


def _request(source: str | Source, options: BuildOptions) -> dict[str, Any]:
    spec = "given" if isinstance(source, Source) else source
    if not spec.startswith(("torchvision:", HUB)) and spec != "given":
        spec = os.path.abspath(spec)
    free = ("jobs", "skip_bad", "download")  # what does not change the pictures that are asked for
    usual = asdict(BuildOptions())
    # what came later is written down only where it is asked for, so that the others' build.json stays what it was
    later = [k for k in _LATER if getattr(options, k) == usual[k]]
    asked = {k: v for k, v in asdict(options).items() if k not in (*free, *later)}
    if "targets" in asked:
        asked["targets"] = list(options.targets)
    return {"source": spec, **asked, "root": options.root and os.path.abspath(options.root)}


def _read(source: str | Source, options: BuildOptions, before: dict[str, Any] | None = None) -> Source:
    """The source, with the order of classes that build.json had before."""
    if isinstance(source, Source):
        return prepare(source, val=options.val, seed=options.seed, where="the source")
    return read_source(
        source,
        val=options.val,
        seed=options.seed,
        root=options.root,
        download=options.download,
        variant=options.variant,
        reading=options.reading(before["classes"] if before else (), _target_order(before)),
    )


def _target_order(before: dict[str, Any] | None) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    with suppress(ValueError, TypeError, AttributeError):  # build.json is damaged
        for said in (before or {}).get("targets", ()):
            target = read_target(said)
            found[target.name] = target.classes
    return found


def _planned(
    source: str | Source, options: BuildOptions, request: dict[str, Any], folder: Path
) -> tuple[Source, list[ShardTask], dict[str, Any]]:
    """What there is to store, the shards to write, and what build.json says from the beginning."""
    begun = state_of(folder)
    found = _read(source, options, begun)  # by an earlier version, perhaps in another order
    plan = {"format": FORMAT, "request": request, "pictures": _listing(found), "classes": list(found.classes)}
    if found.targets:
        plan["targets"] = [target_entry(target) for target in found.targets]
    if request["source"].startswith(HUB):
        plan["commit"] = found.version
    tasks = shard_tasks(found, seed=options.seed, samples=options.shard_samples, size=options.shard_bytes)
    return found, list(tasks), plan


def _listing(source: Source) -> str:
    """A hash of which pictures there are: names, sizes, labels, targets, splits. A file that was changed and kept its
    size counts as unchanged; another spelling of the same path makes no difference."""
    seen = hashlib.sha256()
    for split in sorted(source.splits):
        for p in source.splits[split]:
            name = p.origin if p.path is None else os.path.abspath(p.path)
            targets = f"\0{p.targets}" if source.targets else ""
            seen.update(f"{split}\0{name}\0{p.label}\0{p.bytes}{targets}\n".encode("utf-8", "surrogateescape"))
    seen.update(source.version.encode())
    return seen.hexdigest()


# What is in the folder already


def _already(folder: Path, request: dict[str, Any], source: str | Source) -> BuildSummary | None:
    """A finished build of this request; None if it has to be made."""
    state = state_of(folder)
    if state is None or state["state"] != "done":
        return None
    same_request(folder, state, request, asdict(BuildOptions()), "holds finished shards of another request")
    commit = hub_commit(request["source"]) if request["source"].startswith(HUB) else None
    if commit is not None and commit != state.get("commit"):
        raise SourceChanged(
            f"these shards are of commit {str(state.get('commit'))[:12]}, and the hub has {commit[:12]} now",
            where=str(folder),
            todo="build into a new folder; or name the commit: hf:OWNER/NAME@COMMIT",
        )
    if isinstance(source, Source) or os.path.exists(request["source"]):
        as_asked = ("val", "seed", "path_column", "label_column", "split_column", "separator", "splits")
        later = {k: request[k] for k in _LATER if k in request}
        now = _read(source, BuildOptions(**{key: request[key] for key in as_asked}, **later), state)
        if _listing(now) != state["pictures"]:
            raise SourceChanged(
                "the source has changed since these shards were built",
                where=str(folder),
                todo="build into a new folder",
            )
    _still_whole(folder, state)
    if os.access(folder, os.W_OK):
        tidy(folder)  # a kill may have come between the last word of build.json and this
    try:
        return _summary(folder, state, already=True)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(folder, f"{type(error).__name__}: {error}") from error


def _still_whole(folder: Path, state: dict[str, Any]) -> None:
    for split in state["splits"]:
        for shard in Manifest.open(folder / split).shards:
            tar = folder / split / shard.name
            if tar.stat().st_size != shard.bytes:
                raise UserError(
                    f"this shard was written with {shard.bytes} bytes and now has {tar.stat().st_size}",
                    where=str(tar),
                    todo=f"bring it back, or remove {folder} and build again",
                )


def _summary(folder: Path, state: dict[str, Any], *, already: bool = False, seconds: float = 0.0) -> BuildSummary:
    rewrites = state.get("rewrites")
    return BuildSummary(
        folder,
        tuple(state["classes"]),
        state["splits"],
        tuple(state["bad"]),
        _left_out(state),
        statistics={split: Statistics.read(said) for split, said in state.get("statistics", {}).items()},
        duplicates=Duplicates.read(state.get("duplicates", [])),
        rewrites=Rewrites(**rewrites) if rewrites else None,
        already=already,
        seconds=seconds,
        commit=str(state.get("commit", "")),
    )


def _left_out(state: dict[str, Any]) -> tuple[PassedOver, ...]:
    """What was passed over; an earlier version said no kinds."""
    names, kinds = state["left_out"], state.get("left_out_kinds")
    if not isinstance(kinds, list) or len(kinds) != len(names):
        kinds = [no_picture(name) for name in names]
    return tuple(PassedOver(str(kind), name) for name, kind in zip(names, kinds, strict=True))


# Writing


def _note_of(folder: Path, task: ShardTask) -> Path:
    return folder / task.split / f".{task.name.removesuffix('.tar')}.json"


def _write_all(
    source: Source, folder: Path, options: BuildOptions, tasks: Sequence[ShardTask], *, progress: bool
) -> None:
    jobs = cores() if options.jobs is None else options.jobs
    measured = {split: chosen_for_measuring(split, len(pictures)) for split, pictures in source.splits.items()}
    # fewer shards than processes: the rest of the cores help inside
    threads = max(1, jobs // max(len(tasks), 1))
    write = partial(_write, source, folder, options, measured, threads)
    titled = "writing shards" if progress else None
    import_what_is_needed(resize=options.resize is not None, rewrite=options.rewrite)
    try:
        with _unpacked(source, folder, [task for task in tasks if _known(folder, task, options) is None]):
            bad = [b for found in in_processes(write, tasks, jobs=options.jobs, title=titled) for b in found]
    except BaseException:  # what a process was at that was ended with the others: room that may be wanted
        remove_what_was_left(folder, {(task.split, task.name.removesuffix(".tar")) for task in tasks})
        raise
    if bad and not options.skip_bad:
        raise _unreadable(bad, str(folder))


@contextmanager
def _unpacked(source: Source, folder: Path, tasks: Sequence[ShardTask]) -> Iterator[None]:
    """While it lasts, the pictures of these shards can be read in any order."""
    wanted: dict[str, list[int]] = {}
    for picture in (p for task in tasks for p in task.pictures):
        if picture.place is not None:
            wanted.setdefault(picture.place[0], []).append(picture.place[1])
    with ExitStack() as held:
        for number, (name, rows) in enumerate(wanted.items()):
            items = source.items[name]
            if isinstance(items, ParquetPictures):
                held.enter_context(items.unpack(rows, folder / f"{number}.rows"))
        yield


def _write(
    source: Source,
    folder: Path,
    options: BuildOptions,
    measured: dict[str, frozenset[int]],
    threads: int,
    task: ShardTask,
) -> tuple[str, ...]:
    """One shard, under its name only when it is whole; one that is there already is kept. What was unreadable."""
    path = folder / task.split / task.name
    known = _known(folder, task, options)
    if known is not None:
        return known.bad
    path.parent.mkdir(exist_ok=True)
    bad, facts, rewrites = [], Facts(), Rewrites()
    made = in_threads(
        partial(_stored, source, options, measured[task.split]), enumerate(task.pictures, task.first), threads
    )
    with scratch(path) as beside:
        with open(beside, "wb") as file:
            hashed = HashedFile(file)
            with tarfile.open(fileobj=cast(IO[bytes], hashed), mode="w|") as tar:
                for (place, picture), content in zip(enumerate(task.pictures, task.first), made, strict=True):
                    if is_orphaned():  # the build was killed, and perhaps another one has begun
                        raise TlxError("the build that asked for this shard is gone")
                    if isinstance(content, str):
                        bad.append(f"{picture.origin}: {content}")
                        continue
                    add_sample(tar, f"{place:09d}", {content.extension: content.data, **_beside(source, picture)})
                    facts.add(place, picture.label, len(content.data), content.seen)
                    rewrites = rewrites.and_one(content.rewrite, content.before, len(content.data))
            file.flush()
            os.fsync(file.fileno())
        if bad and not options.skip_bad:
            beside.unlink()
            return tuple(bad)
        size = beside.stat().st_size if facts.rows else 0
        write_whole(_note_of(folder, task), Note(size, hashed.sha256, tuple(bad), *facts.packed(), rewrites).text())
        if facts.rows:
            os.replace(beside, path)
        else:
            beside.unlink()
    return tuple(bad)


def _beside(source: Source, picture: Picture) -> dict[str, bytes]:
    """The members beside a picture."""
    label = {"cls": str(picture.label).encode()} if source.classes else {}
    return {**label, **({"json": picture.targets.encode()} if source.targets else {})}


def _known(folder: Path, task: ShardTask, options: BuildOptions) -> Note | None:
    """The note of a shard that an earlier build has finished, and that is as it is wanted now."""
    tar = folder / task.split / task.name
    try:
        known = read_note(_note_of(folder, task))
        whole = (tar.stat().st_size if known.size else 0) == known.size
        return known if whole and (options.skip_bad or not known.bad) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _stored(source: Source, options: BuildOptions, measured: frozenset[int], task: tuple[int, Picture]) -> Stored | str:
    """What to store of a picture, or why it cannot be read."""
    place, picture = task
    try:
        with at_picture(lambda: picture.origin):
            data, extension = read(source, picture)
            return stored(
                data,
                extension,
                resize=options.resize,
                quality=options.quality,
                rewrite=options.rewrite,
                measured=place in measured,
            )
    except DecodeError as error:
        return str(error)
    except MemoryError as error:
        raise no_memory(picture.origin, "fewer --jobs") from error
    except OSError as error:
        if error.errno in MACHINES:
            raise
        return str(error)
    except Exception as error:  # one odd picture is named, and does not end the build
        return f"{type(error).__name__}: {error}"


# When all are written


def _finish(
    source: Source, folder: Path, tasks: Sequence[ShardTask], notes: Sequence[Note], options: BuildOptions
) -> dict[str, Any]:
    """An index for each split, and what build.json says of the pictures."""
    splits = _index(source, folder, tasks, notes, options)
    records, statistics = {}, {}
    for split in splits:
        own = [note for task, note in zip(tasks, notes, strict=True) if task.split == split]
        records[split] = np.concatenate([note.records for note in own])
        found = summarise(records[split], [note.pixels for note in own], source.classes)
        statistics[split] = asdict(found) if found else {}
    # a split's pictures in the order in which they are in its shards
    pictures = {split: [p for task in tasks if task.split == split for p in task.pictures] for split in splits}
    groups = [
        tuple(_copy(source, split, pictures[split][int(records[split]["place"][row])]) for split, row in group)
        for group in find_duplicates(records)
    ]
    rewrites = sum((note.rewrites for note in notes), Rewrites())
    return {
        "splits": splits,
        "bad": [b for note in notes for b in note.bad],
        "left_out": [passed.name for passed in source.left_out],
        "left_out_kinds": [passed.kind for passed in source.left_out],
        "statistics": statistics,
        "duplicates": Duplicates(tuple(groups)).plain(),
        "rewrites": asdict(rewrites) if options.rewrite else None,
    }


def _copy(source: Source, split: str, picture: Picture) -> Copy:
    return Copy(split, source.classes[picture.label] if source.classes else "", picture.origin)


def _index(
    source: Source, folder: Path, tasks: Sequence[ShardTask], notes: Sequence[Note], options: BuildOptions
) -> dict[str, dict[str, int]]:
    """An index for each split, from what lies on the disk."""
    splits: dict[str, dict[str, int]] = {}
    rule, classes = _rule(source), by_position(source.classes) if source.classes else NO_CLASS
    kept = [(task, note) for task, note in zip(tasks, notes, strict=True) if note.size]
    for split in dict.fromkeys(task.split for task, _ in kept):
        tars = [folder / split / task.name for task, _ in kept if task.split == split]
        read = partial(scan_tar, rule=rule, hashed=False)  # the notes have the hashes
        scans: list[Scan] = list(in_processes(read, tars, jobs=options.jobs, title=None))
        problems = [p for scan in scans for p in scan.problems]
        expected = [len(note.records) for task, note in kept if task.split == split]
        if problems or [len(scan.labels) for scan in scans] != expected:
            raise UserError(
                f"the shards on the disk are not what was written: {problems[:3]}", where=str(folder / split)
            )
        hashes = [note.sha256 for task, note in kept if task.split == split]
        scans = [replace(scan, sha256=sha256) for scan, sha256 in zip(scans, hashes, strict=True)]
        manifest = write_scans(folder / split, scans, classes, rule, source.targets)
        lost = [source.classes[i] for i in (manifest.counts() == 0).nonzero()[0]] if split == "train" else []
        if lost:
            raise UserError(f"no readable training picture is left of: {', '.join(lost)}", where=str(folder))
        size = sum(s.bytes for s in manifest.shards)
        splits[split] = {"samples": len(manifest), "shards": len(manifest.shards), "bytes": size}
    if not splits:
        raise UserError("no readable picture is left", where=str(folder), todo="tlx shards build without --skip-bad")
    return splits


def _rule(source: Source) -> LabelRule:
    """Where the tars of a source say what its pictures are."""
    specs = tuple(TargetSpec(target.name, target.kind, (target.name,)) for target in source.targets)
    if not source.classes:
        return replace(AUTO, place="none", targets=specs)
    return replace(AUTO, numbers="positions" if are_ambiguous(source.classes) else None, targets=specs)


def _unreadable(bad: Sequence[str], where: str) -> UserError:
    listed = "\n".join(f"  {escaped(b)}" for b in bad[:20]) + ("\n  ..." if len(bad) > 20 else "")
    return UserError(
        f"{len(bad)} unreadable picture{'s' if len(bad) > 1 else ''}:\n{listed}",
        where=where,
        todo="repair or remove them and build again, or leave them out with --skip-bad",
    )
