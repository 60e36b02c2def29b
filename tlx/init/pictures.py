"""Shards of a folder of pictures, in a place that follows from its name: built once, and again where it has changed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tlx.base.errors import UserError
from tlx.base.terminal import say
from tlx.data.build.build_folder import state_of
from tlx.data.build.row_tables import HUB
from tlx.data.build.sources import Reading, Source
from tlx.data.build.specs import read_plain
from tlx.data.build.write import BuildOptions, BuildSummary, SourceChanged, build_shards
from tlx.plan.defaults import plain_name

SHARDS = Path("shards")
"""The folder of shards, where none is named."""

VAL = 0.2
"""The share of each class that is split off where the pictures have no validation split."""

RESIZE = 512
"""Larger pictures are stored with a short side of so many pixels: enough for networks up to 448."""


@dataclass(frozen=True)
class Wishes:
    """What is asked of the shards; None where nothing is.

    Attributes:
        shards: their folder; by default one in `SHARDS`.
        nested: whether a class is the path of folders to a picture.
    """

    shards: Path | None = None
    val: float | None = None
    nested: bool | None = None
    skip_bad: bool = False


@dataclass(frozen=True)
class Pictures:
    """A folder of pictures, and its shards.

    Attributes:
        name: of the folder, with a number from 2 on where pictures of that name have been built before.
        val: the share of each class that was split off for validation, where the pictures had no such split.
        wishes: what was asked of the shards.
    """

    name: str
    source: Path
    built: BuildSummary
    val: float | None = None
    wishes: Wishes = Wishes()

    def counts(self, split: str) -> int:
        return self.built.splits.get(split, {}).get("samples", 0)


def build(source: Path, wishes: Wishes, *, progress: bool = False) -> Pictures:
    """Builds the shards of a folder, or finds that they are there.

    Raises:
        UserError: no folder of pictures, pictures that cannot be read, shards of another request in the folder named.
    """
    refuse_others(source)
    for name, folder in _places(source, wishes.shards):
        begun = _begun(folder, source)
        if begun is None and wishes.shards is None:
            continue
        options = _options(source, wishes, begun or {})
        try:
            built = build_shards(str(source), folder, options, progress=progress)
            return Pictures(name, source, built, options.val, wishes)
        except SourceChanged:
            if wishes.shards is not None:
                raise
            say(f"note: {source} has changed since {folder} was built, which stays as it is", error=True)
    raise AssertionError("there is always a next name")


def find(source: Path) -> tuple[str, Path] | None:
    """Name and folder of the newest finished shards of a folder, whether or not it has changed since."""
    finished = None
    for name, folder in _places(source, None):
        begun = _begun(folder, source)
        if begun == {}:
            return finished
        if begun is not None and (state_of(folder) or {}).get("state") == "done":
            finished = name, folder
    return finished


def refuse_others(source: Path) -> None:
    """
    Raises:
        UserError: what is named is no folder, is a run, or holds shards.
    """
    if not source.exists():
        todo = f"tlx shards build {source} shards/NAME, then data.train=shards/NAME/train"
        raise UserError(
            "there is no such folder", where=str(source), todo=todo if str(source).startswith(HUB) else None
        )
    if not source.is_dir():
        todo = "name the folder that its class folders lie in"
        if source.suffix.lower() in (".csv", ".parquet"):
            todo = (
                f"tlx shards build {source} shards/{source.stem} --val 0.2, then data.train=shards/{source.stem}/train"
            )
        raise UserError("this is a file, not a folder of pictures", where=str(source), todo=todo)
    if (source / "config.yaml").is_file():
        raise UserError("this is a run", where=str(source), todo=f"tlx train {source / 'config.yaml'}")
    train = next((f for f in (source / "train", source) if (f / "index.json").is_file() or any(f.glob("*.tar"))), None)
    if train is not None:
        val = f", data.val: {source / 'val'}" if train != source and (source / "val").is_dir() else ""
        raise UserError(
            "these are shards, not pictures",
            where=str(source),
            todo=f"a configuration names them: data: {{train: {train}{val}}}, backbone: timm/deit_tiny_patch16_224",
        )


def _places(source: Path, wanted: Path | None) -> Iterator[tuple[str, Path]]:
    """Names for the pictures and places for their shards, the first first."""
    name = plain_name(_whole(source).name, "pictures")
    if wanted is not None:
        yield plain_name(_whole(wanted).name, name), wanted
        return
    yield name, SHARDS / name
    yield from ((f"{name}-{n}", SHARDS / f"{name}-{n}") for n in itertools.count(2))


def _begun(folder: Path, source: Path) -> Mapping[str, Any] | None:
    """What a build of this source in a folder was asked for; nothing where none was begun; None where the folder is
    something else's."""
    try:
        state = state_of(folder)
    except UserError:
        return None
    if state is None:
        return {}
    request: Mapping[str, Any] = state["request"]
    return request if request.get("source") == str(_whole(source)) else None


def _whole(path: Path) -> Path:
    """From the root on, without the dots of ``../photos``: as a build notes down its source."""
    return Path(os.path.abspath(path))


def _options(source: Path, wishes: Wishes, begun: Mapping[str, Any]) -> BuildOptions:
    """As the shards there were built, but for what is asked for now."""
    known = {field.name for field in fields(BuildOptions)} - {"targets"}
    options = {"resize": RESIZE, **{key: value for key, value in begun.items() if key in known}}
    asked = {"val": wishes.val, "nested": wishes.nested, "skip_bad": wishes.skip_bad or None}
    options |= {key: value for key, value in asked.items() if value is not None}
    if not begun:
        found = read_plain(str(source), Reading(nested=bool(wishes.nested)))
        if wishes.nested is None:
            _refuse_nested(source, found)
        if wishes.val is None and "val" not in found.splits:
            options["val"] = VAL
    return BuildOptions(**options)


def _refuse_nested(source: Path, found: Source) -> None:
    """
    Raises:
        UserError: no picture lies in a class folder itself, so that nobody knows which folders are the classes.
    """
    pictures = [p for split in found.splits.values() for p in split]
    if found.items:  # rows of tables, where a class is no folder
        return
    paths = [Path(p.path or "").relative_to(source) for p in pictures]
    above = 2 if paths and paths[0].parts[0] != found.classes[pictures[0].label] else 1  # below train, val, or not
    if any(len(path.parts) <= above + 1 for path in paths) or not paths:
        return
    example = "/".join(paths[0].parts[above - 1 : -1])
    inner = source / Path(*paths[0].parts[:above])
    if len(found.classes) == 1:
        raise UserError("there is only one folder here, with folders in it", where=str(source), todo=f"name {inner}?")
    raise UserError(
        f"all pictures lie in folders inside of the class folders, such as {example}",
        where=str(source),
        todo=f"--nested makes that a class; --no-nested makes {example.partition('/')[0]} one, with all that is in it",
    )
