"""Shards from pictures.

``build_shards(source, out, options=BuildOptions(), progress=False) -> BuildSummary``

``OUT/train``, ``OUT/val`` and ``OUT/test`` are folders of plain WebDataset tars (``000000.tar`` with ``000000123.jpg``
and ``000000123.cls``) and their index; ``OUT/build.json`` says what was asked for and whether it is done. Pictures keep
their bytes unless they are made smaller. The same request gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tlx.data.decode import DecodeError, decode
from tlx.data.index import Scan, scan_tar, write_scans
from tlx.data.order import derive, permutation
from tlx.data.progress import in_processes
from tlx.data.sources import Picture, Source, prepare
from tlx.data.specs import read_source
from tlx.errors import UserError
from tlx.files import write_whole

_FORMAT = 1
_BLOCK, _RECORD = 512, 10240  # what tar rounds members and whole files up to
_END = 2 * _BLOCK
_LOSSLESS = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}  # what a PNG can hold


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
        skip_bad: leave unreadable pictures out and list them; otherwise they are an error.
        jobs: processes; None is one per core.
        root, download, variant: of a torchvision data set.
    """

    val: float | None = None
    seed: int = 0
    shard_samples: int = 1000
    shard_bytes: int = 256 << 20
    resize: int | None = None
    quality: int = 95
    skip_bad: bool = False
    jobs: int | None = None
    root: str | None = None
    download: bool = False
    variant: str | None = None


@dataclass(frozen=True)
class BuildSummary:
    """What a build made.

    Attributes:
        classes: names, shared by all splits.
        splits: split -> {"samples", "shards", "bytes"}.
        bad: unreadable pictures that were left out, each with its reason.
        left_out: files among the pictures that are none.
        already: it was there before, and nothing was done.
        seconds: how long it took.
    """

    out: Path
    classes: tuple[str, ...]
    splits: dict[str, dict[str, int]]
    bad: tuple[str, ...]
    left_out: tuple[str, ...]
    already: bool
    seconds: float


@dataclass(frozen=True)
class _Task:
    """One shard to write."""

    split: str
    name: str
    first: int
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class _Written:
    samples: int
    bad: tuple[str, ...]


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
    state = _state(folder)
    if state and state["state"] == "done":
        return _already(folder, state, request, source)
    read = _read(source, options)
    tasks = list(_tasks(read, options))
    plan = {"format": _FORMAT, "request": request, "pictures": _listing(read), "classes": list(read.classes)}
    _claim(folder, state, plan)
    titled = "writing shards" if progress else None
    done = list(in_processes(partial(_write, read, folder, options), tasks, jobs=options.jobs, title=titled))
    bad = tuple(b for written in done for b in written.bad)
    if bad and not options.skip_bad:
        raise _unreadable(bad, str(folder))
    splits = _index(read, folder, tasks, done, options)
    result = {"splits": splits, "bad": bad, "left_out": read.left_out}
    write_whole(folder / "build.json", json.dumps({**plan, "state": "done", **result}, indent=1).encode())
    return BuildSummary(
        folder, read.classes, splits, bad, read.left_out, already=False, seconds=time.monotonic() - started
    )


def _check(source: str | Source, folder: Path, options: BuildOptions) -> None:
    if isinstance(source, str) and Path(source).is_dir() and folder.resolve().is_relative_to(Path(source).resolve()):
        raise UserError("the shards would lie among their own source", where=str(folder), todo="name a folder outside")
    if options.shard_samples < 1 or options.shard_bytes < 1:
        raise UserError("a shard holds at least one sample and one byte")
    if options.resize is not None and options.resize < 1:
        raise UserError("--resize takes the short side in pixels")
    if not 1 <= options.quality <= 100:
        raise UserError("--quality goes from 1 to 100")


def _request(source: str | Source, options: BuildOptions) -> dict[str, Any]:
    spec = "given" if isinstance(source, Source) else source
    if not spec.startswith("torchvision:") and spec != "given":
        spec = os.path.abspath(spec)
    free = ("jobs", "skip_bad", "download")  # what does not change the pictures that are asked for
    asked = {k: v for k, v in asdict(options).items() if k not in free}
    return {"source": spec, **asked, "root": options.root and os.path.abspath(options.root)}


def _read(source: str | Source, options: BuildOptions) -> Source:
    if isinstance(source, Source):
        return prepare(source, val=options.val, seed=options.seed, where="the source")
    return read_source(
        source,
        val=options.val,
        seed=options.seed,
        root=options.root,
        download=options.download,
        variant=options.variant,
    )


def _listing(source: Source) -> str:
    """A hash of which pictures there are: names, sizes, labels, splits."""
    seen = hashlib.sha256()
    for split in sorted(source.splits):
        for p in source.splits[split]:
            seen.update(f"{split}\0{p.origin}\0{p.label}\0{p.bytes}\n".encode("utf-8", "surrogateescape"))
    return seen.hexdigest()


# What is in the folder already


def _state(folder: Path) -> dict[str, Any] | None:
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise UserError("this is a file", where=str(folder), todo="name a new folder")
    try:
        state: dict[str, Any] = json.loads((folder / "build.json").read_text())
    except FileNotFoundError:
        if any(folder.iterdir()):
            raise UserError(
                "the folder is not empty and was not made by tlx shards build", where=str(folder), todo="name a new one"
            ) from None
        return None
    except ValueError as error:
        raise UserError(
            f"not a build of tlx: {error}", where=str(folder / "build.json"), todo="name a new one"
        ) from error
    if state.get("format") != _FORMAT:
        raise UserError(f"built by another version of tlx (format {state.get('format')})", where=str(folder))
    return state


def _already(folder: Path, state: dict[str, Any], request: dict[str, Any], source: str | Source) -> BuildSummary:
    _same(folder, state, request, "holds finished shards of another request")
    if isinstance(source, Source) or os.path.exists(request["source"]):
        now = _read(source, BuildOptions(val=request["val"], seed=request["seed"]))
        if _listing(now) != state["pictures"]:
            raise UserError(
                "the source has changed since these shards were built",
                where=str(folder),
                todo="build into a new folder",
            )
    return BuildSummary(
        folder,
        tuple(state["classes"]),
        state["splits"],
        tuple(state["bad"]),
        tuple(state["left_out"]),
        already=True,
        seconds=0.0,
    )


def _same(folder: Path, state: dict[str, Any], request: dict[str, Any], what: str) -> None:
    differ = [
        f"{k}: {state['request'].get(k)} there, {v} now" for k, v in request.items() if state["request"].get(k) != v
    ]
    if differ:
        raise UserError(
            f"the folder {what} ({'; '.join(differ)})", where=str(folder), todo="name a new folder, or remove this one"
        )


def _claim(folder: Path, state: dict[str, Any] | None, plan: dict[str, Any]) -> None:
    """Makes the folder ours; what an interrupted build of other pictures left is removed."""
    if state:
        _same(folder, state, plan["request"], "holds an interrupted build of another request")
    if state and state["pictures"] != plan["pictures"]:
        for tar in folder.glob("*/[0-9]*.tar"):
            tar.unlink()
    for rest in folder.glob("*/.*.tmp"):
        rest.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "build.json", json.dumps({**plan, "state": "building"}, indent=1).encode())


# Writing


def _tasks(source: Source, options: BuildOptions) -> Iterable[_Task]:
    for split, pictures in source.splits.items():
        order = permutation(derive(options.seed, f"shuffle {split}"), len(pictures))
        first = 0
        for number, part in enumerate(_cut([pictures[i] for i in order], options)):
            yield _Task(split, f"{number:06d}.tar", first, tuple(part))
            first += len(part)


def _cut(pictures: Sequence[Picture], options: BuildOptions) -> Iterable[list[Picture]]:
    shards = -(-len(pictures) // options.shard_samples)
    most = -(-len(pictures) // max(shards, 1))  # as even as the limit allows, not a small one at the end
    part: list[Picture] = []
    size = _END
    for picture in pictures:
        more = 3 * _BLOCK + -(-picture.bytes // _BLOCK) * _BLOCK  # two headers, the label, the picture
        if part and (len(part) == most or _padded(size + more) > options.shard_bytes):
            yield part
            part, size = [], _END
        part.append(picture)
        size += more
    if part:
        yield part


def _padded(size: int) -> int:
    return -(-size // _RECORD) * _RECORD


def _write(source: Source, folder: Path, options: BuildOptions, task: _Task) -> _Written:
    """One shard, under its name only when it is whole; one that is there already is kept."""
    from webdataset.writer import TarWriter

    path = folder / task.split / task.name
    if path.exists() and len(scan_tar(path).labels) == len(task.pictures):
        return _Written(len(task.pictures), ())
    path.parent.mkdir(exist_ok=True)
    beside, bad, samples = path.with_name(f".{task.name}.{os.getpid()}.tmp"), [], 0
    with open(beside, "wb") as file:
        with TarWriter(file, encoder=False, mtime=0) as tar:
            for place, picture in enumerate(task.pictures, task.first):
                try:
                    data, extension = _content(source, picture, options)
                except (DecodeError, OSError) as error:
                    bad.append(f"{picture.origin}: {error}")
                    continue
                tar.write({"__key__": f"{place:09d}", extension: data, "cls": str(picture.label).encode()})
                samples += 1
        file.flush()
        os.fsync(file.fileno())
    if samples and (options.skip_bad or not bad):
        os.replace(beside, path)
    else:
        beside.unlink()
    return _Written(samples, tuple(bad))


def _content(source: Source, picture: Picture, options: BuildOptions) -> tuple[bytes, str]:
    """The bytes to store and their extension.

    Raises:
        DecodeError, OSError: the picture cannot be read.
    """
    if picture.path is not None:
        data, extension = Path(picture.path).read_bytes(), picture.path.rpartition(".")[2].lower()
    else:
        assert picture.place is not None
        split, place = picture.place
        data, extension = _png(source, split, place), "png"
    height, width = decode(data).shape[-2:]
    if options.resize and min(height, width) > options.resize:
        return _smaller(data, options)
    return data, {"jpeg": "jpg"}.get(extension, extension)


def _png(source: Source, split: str, place: int) -> bytes:
    buffer = io.BytesIO()
    try:
        image = source.items[split][place][0]
        (image if image.mode in _LOSSLESS else image.convert("RGB")).save(buffer, "PNG")
    except Exception as error:  # whatever the data set's own reading may raise
        raise DecodeError(f"the data set gives no picture: {error}") from error
    return buffer.getvalue()


def _smaller(data: bytes, options: BuildOptions) -> tuple[bytes, str]:
    """JPEGs stay JPEGs, everything else becomes PNG; upright, transparency kept, without what a camera wrote beside."""
    from PIL import Image
    from torchvision.transforms.v2 import functional

    jpeg = data[:2] == b"\xff\xd8"
    with Image.open(io.BytesIO(data)) as stored:
        alpha = "A" in stored.getbands() or "transparency" in stored.info
    pixels = functional.resize(decode(data, 4 if alpha else 3), [options.resize], antialias=True)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    buffer = io.BytesIO()
    if jpeg:
        image.save(buffer, "JPEG", quality=options.quality)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue(), "jpg" if jpeg else "png"


def _index(
    source: Source, folder: Path, tasks: Sequence[_Task], done: Sequence[_Written], options: BuildOptions
) -> dict[str, dict[str, int]]:
    """An index for each split, from what lies on the disk."""
    splits = {}
    kept = [(task, written) for task, written in zip(tasks, done, strict=True) if written.samples]
    for split in dict.fromkeys(task.split for task, _ in kept):
        tars = [folder / split / task.name for task, _ in kept if task.split == split]
        scans: list[Scan] = list(in_processes(scan_tar, tars, jobs=options.jobs, title=None))
        problems = [p for scan in scans for p in scan.problems]
        expected = [written.samples for task, written in kept if task.split == split]
        if problems or [len(scan.labels) for scan in scans] != expected:
            raise UserError(
                f"the shards on the disk are not what was written: {problems[:3]}", where=str(folder / split)
            )
        manifest = write_scans(folder / split, scans, source.classes)
        lost = [source.classes[i] for i in (manifest.counts() == 0).nonzero()[0]] if split == "train" else []
        if lost:
            raise UserError(f"no readable training picture is left of: {', '.join(lost)}", where=str(folder))
        size = sum(s.bytes for s in manifest.shards)
        splits[split] = {"samples": len(manifest), "shards": len(manifest.shards), "bytes": size}
    return splits


def _unreadable(bad: Sequence[str], where: str) -> UserError:
    listed = "\n".join(f"  {b}" for b in bad[:20]) + ("\n  ..." if len(bad) > 20 else "")
    return UserError(
        f"{len(bad)} unreadable picture{'s' if len(bad) > 1 else ''}:\n{listed}",
        where=where,
        todo="repair or remove them and build again, or leave them out with --skip-bad",
    )
