"""``index.json`` and ``index.npy`` as files: what they hold, how they are read, and what is said of damaged ones."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from tlx.base.errors import UserError
from tlx.base.files import sha256_of
from tlx.base.location import is_remote
from tlx.base.parsing import from_json
from tlx.base.terminal import escaped
from tlx.data.shards.targets import Target, read_target

FORMATS = (1, 2, 3)
"""2: with a hash of each shard. 3: with targets beside the class, or without a class. What needs neither is written as
of format 1 or 2, byte for byte as before."""
LARGEST = 1 << 50
"""Bytes of a tar: more than any disk or object store takes as one file."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
RECORD = np.dtype([("offset", "<u8"), ("size", "<u4"), ("label", "<i4")])
"""One sample: where its picture's bytes start in its tar, how many there are, its class."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar.

    Attributes:
        name: of its file.
        samples: how many it holds.
        bytes: its length.
        sha256: of all its bytes, in hexadecimal digits; None in an index that was made without.
    """

    name: str
    samples: int
    bytes: int
    sha256: str | None = None


def format_of(classes: Sequence[str], shards: Sequence[Shard], targets: Sequence[object]) -> int:
    """The format that an index of these is written in."""
    if targets or not classes:
        return 3
    return 2 if any(s.sha256 for s in shards) else 1


def read_header(folder: Path) -> bytes:
    """``index.json`` of a folder.

    Raises:
        UserError: there is none; what there is instead.
    """
    try:
        return (folder / "index.json").read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except ValueError as error:
        raise UserError("no folder can have this name", where=ascii(str(folder))) from error
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "there is no such folder"
        raise UserError(what, where=str(folder), todo="make shards with tlx shards build SRC OUT")
    inside = sorted(p.parent.name for p in folder.glob("*/index.json"))
    if inside:
        raise UserError(
            f"this folder holds splits: {', '.join(inside)}", where=str(folder), todo=f"use {folder / inside[0]}"
        )
    refuse_unfinished(folder)
    if any(folder.glob("*.tar")):
        raise UserError("these tars have no index", where=str(folder), todo=f"tlx shards index {folder}")
    raise UserError("this folder holds no shards", where=str(folder), todo="make them with tlx shards build SRC OUT")


def refuse_unfinished(folder: Path) -> None:
    """
    Raises:
        UserError: a build of shards has begun here, or in the folder above, and has not come to its end.
    """
    for place in (folder, folder.parent):
        try:
            state = from_json((place / "build.json").read_bytes())["state"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if state == "building":
            raise UserError(
                "these tars have no index: the build of this folder is unfinished",
                where=str(place),
                todo="the same tlx shards build goes on with it (--skip-bad leaves unreadable pictures out)",
            )


def shard_entry(shard: Shard) -> dict[str, Any]:
    """What ``index.json`` says of a shard."""
    said = {"name": shard.name, "samples": shard.samples, "bytes": shard.bytes}
    return {**said, "sha256": shard.sha256} if shard.sha256 else said


def as_text(header: Mapping[str, Any]) -> bytes:
    """The content of ``index.json``."""
    return json.dumps(header, indent=1, ensure_ascii=False).encode()


def digest_of(header: Mapping[str, Any], text: bytes) -> str:
    """Of what the index would say without hashes of shards, so that adding them makes no other data of it."""
    if header["format"] == 1:
        return hashlib.sha256(text).hexdigest()
    said = ("classes", "labels", "samples", "shards", "sha256", *(("targets",) if header["format"] == 3 else ()))
    plain = {k: header[k] for k in said if k in header}
    plain["shards"] = [{k: s[k] for k in ("name", "samples", "bytes")} for s in header["shards"]]
    return hashlib.sha256(as_text({"format": 3 if header["format"] == 3 else 1, **plain})).hexdigest()


def parse(where: str, text: bytes) -> dict[str, Any]:
    """What ``index.json`` says.

    Raises:
        UserError: it is of another format, or damaged.
    """
    try:
        header = from_json(text)
        version = header["format"]
    except (ValueError, KeyError, TypeError):
        damaged(where, "index.json is not an index of tlx")
    if version not in FORMATS:
        raise UserError(
            f"the index has format {str(version)[:40]}; this tlx reads {FORMATS[0]} to {FORMATS[-1]}",
            where=where,
            todo=make_again(where),
        )
    if not _whole(header):
        damaged(where, "index.json lacks something, or holds something else in its place")
    names = [s["name"] for s in header["shards"]]
    if any(os.path.basename(name) != name or name in ("", ".", "..") for name in names):
        damaged(where, "it names a tar outside its folder")
    if len(set(names)) < len(names):
        damaged(where, "it names a tar twice")
    for shard in header["shards"]:
        if shard["bytes"] > LARGEST:
            damaged(where, f"it says that {escaped(shard['name'])[:200]} has {shard['bytes']:,} bytes; no file has")
    if sum(s["samples"] for s in header["shards"]) != header["samples"]:
        damaged(where, "its shards and its samples do not add up")
    _check_targets(where, header)
    return header  # type: ignore[no-any-return]


def _check_targets(where: str, header: Mapping[str, Any]) -> None:
    if header["format"] < 3:
        return
    said = header.get("targets")
    if not isinstance(said, list) or not all(isinstance(t, dict) and _is_sha256(t.get("sha256")) for t in said):
        damaged(where, "index.json does not say which targets there are")
    try:
        names = [read_target(target).name.casefold() for target in said]
    except (ValueError, TypeError, KeyError) as error:
        damaged(where, f"a target of index.json is none: {error}")
    if len(set(names)) < len(names):
        damaged(where, "it names a target twice")


def targets_of(header: Mapping[str, Any]) -> dict[str, tuple[Target, str]]:
    """The targets beside the class, by name, and the hash of each one's array."""
    said = header["targets"] if header["format"] == 3 else []
    return {t["name"]: (read_target(t), t["sha256"]) for t in said}


def _whole(header: dict[str, Any]) -> bool:
    """Whether it has all that is read of it, each of its type."""
    classes, shards = header.get("classes"), header.get("shards")
    return (
        isinstance(classes, list)
        and all(isinstance(c, str) for c in classes)
        and isinstance(shards, list)
        and all(isinstance(s, dict) and isinstance(s.get("name"), str) for s in shards)
        and all(_is_count(s.get("samples")) and _is_count(s.get("bytes")) for s in shards)
        and all(s.get("sha256") is None or _is_sha256(s["sha256"]) for s in shards)
        and _is_count(header.get("samples"))
        and isinstance(header.get("sha256"), str)
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def missing_tars(folder: Path, header: dict[str, Any]) -> list[str]:
    """Names of tars that are not there."""
    return sorted({s["name"] for s in header["shards"]} - set(os.listdir(folder)))


def refuse_missing(folder: Path, missing: Sequence[str], of: int) -> None:
    """
    Raises:
        UserError: there are missing ones.
    """
    if missing:
        shortened = [escaped(name)[:200] for name in missing[:3]]
        listed = ", ".join(shortened) + (" ..." if len(missing) > 3 else "")
        raise UserError(
            f"{len(missing)} of {of} tars are missing: {listed}",
            where=str(folder),
            todo=f"bring them back, or index what is there: tlx shards index {folder}",
        )


def map_records(path: Path, where: str, sha256: str | None) -> NDArray[np.void]:
    """The records, mapped; of this hash, unless it is known already."""
    nothing: NDArray[np.void] = np.zeros(0, RECORD)
    try:
        with path.open("rb") as file:
            if sha256 is not None and sha256_of(file) != sha256:
                damaged(where, "index.npy is not the one that index.json was written for")
        # numpy cannot map an array without elements; of anything else that small it would take what its header claims
        if path.stat().st_size <= len(npy(nothing)):
            if path.read_bytes() != npy(nothing):
                damaged(where, "index.npy holds something else")
            return nothing
        records: NDArray[np.void] = np.load(path, mmap_mode="r", allow_pickle=False)
    except UserError:
        raise
    except Exception as error:  # numpy reads the header as Python's literals, which fail in many ways
        damaged(where, f"index.npy cannot be read: {error}")
    if not isinstance(records, np.ndarray) or records.dtype != RECORD or records.ndim != 1:
        damaged(where, "index.npy holds something else")
    return records


def npy(array: NDArray[Any]) -> bytes:
    """The array as a file's content."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def damaged(where: str, why: str) -> NoReturn:
    """
    Raises:
        UserError: the index is damaged, why, and how to make it again.
    """
    raise UserError(f"the index is damaged: {why}", where=where, todo=make_again(where))


def make_again(where: str) -> str:
    """How to make the index of a place again."""
    if is_remote(where):
        return "index the tars where they lie on a disk, with tlx shards index FOLDER, and bring both files here"
    return f"make it again: tlx shards index {where}"
