"""What `backbone.weights` means, and where its tensors are: in a file, a folder, a cache, or on a server."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tlx.base.errors import UserError, did_you_mean
from tlx.models.libraries.sources import Source
from tlx.models.weights import download, files
from tlx.models.weights import local_weights as shelf
from tlx.models.weights.provenance import RunRecord, Size, base, best_of_run, record_of

HUB = ("hf-hub:", "hf_hub:")
"""How timm writes that a name is a repository of the Hugging Face hub."""


@dataclass(frozen=True)
class Origin:
    """Where a network's values come from; nothing set: it keeps those it was built with.

    Attributes:
        name: of the weights, ``timm/resnet50.a1_in1k`` or ``hf-hub:OWNER/REPO``, or the file.
        tag: the library's name for them, which fixes the preprocessing; also where they are read from a file or
            from the library's own repository. Other weights are taken to see what the default ones see.
        file: read instead of what the library or the hub would give.
    """

    name: str = ""
    tag: str | None = None
    file: Path | None = None

    def state(self, source: Source, args: Mapping[str, Any], key: str = "") -> files.Given | None:
        """The tensors; None where the network keeps what it was built with.

        Args:
            key: see :func:`tlx.models.weights.files.opened`.

        Raises:
            UserError: they are not on this machine and cannot be had from here, or are damaged.
        """
        if not self.name:
            return None
        path = self.file or shelf.find(self.name)
        known = [source.trained_size(self.tag)] if self.tag is not None else []
        sizes = [size for size in known if size is not None]
        if path is not None:
            given, record = files.opened(path, key), record_of(path)
            if record is None:
                return replace(given, sizes=(*sizes, *given.sizes))
            built = record.sizes or _usual_size(source, record)
            return replace(given, sizes=(*sizes, *built, *given.sizes), same=record.is_of(source.name, args))
        try:
            if self.name.startswith(HUB) or self.tag is None:
                given = files.opened(download.from_hub(*repository(self.name)), key)
                return replace(given, where=self.name, sizes=(*sizes, *given.sizes))
            if key:
                what = f"{self.name} are weights of a library, in one dict"
                raise UserError(what, where="backbone.weights_key", todo="leave it out")
            return files.Given(source.pretrained(args, self.tag), self.name, sizes, same=True)
        except download.NotHere as absent:
            raise _missing(self.name, absent) from absent


def _usual_size(source: Source, record: RunRecord) -> tuple[Size, ...]:
    """That the network of a run was built for which said none: its library's, by the weights that it began with."""
    (name, tag), (own, _) = base(record.backbone), base(source.name)
    if name != own:
        return ()
    tags = [tag_in(source, record.weights), tag]
    size = source.trained_size(next((one for one in tags if one in source.tags()), ""))
    return () if size is None else (size,)


def choose(source: Source, weights: str, *, there: bool = True) -> Origin:
    """Reads the setting `backbone.weights`.

    Args:
        there: whether a file or a folder must exist.

    Raises:
        UserError: nothing has that name.
    """
    if weights == "none":
        return Origin()
    tags = source.tags()
    if weights.startswith(HUB):
        name, tag = f"{HUB[0]}{weights[len(HUB[0]) :]}", tag_in(source, repository(weights)[0].partition("/")[2])
        return Origin(name, tag if name.startswith(f"{HUB[0]}timm/") and tag in tags else None)
    if weights == "default" and not tags:
        if source.ships_weights and there:
            raise UserError(f"{source.name} has no pretrained weights", todo="set backbone.weights to a file, or none")
        return Origin()
    tag = tags[0] if weights == "default" else tag_in(source, weights)
    if tag in tags:
        return Origin(shelf.full_name(source.name, tag), tag)
    path = files.location(weights)
    if path.is_dir():
        best = best_of_run(path)
        return Origin(str(best), None, best) if best is not None else _in_folder(source, path, there=there)
    if files.is_file(weights):
        return Origin(weights, _tag_of(path, source), path)
    raise UserError(
        f'{source.name} has no weights "{weights}"{did_you_mean(tag, tags)}',
        todo="backbone.weights is default, one of the library's tags, a file, a folder, hf-hub:OWNER/REPO, or none",
    )


def tag_in(source: Source, weights: str) -> str:
    """The tag without what the libraries write before it: ``resnet50.a1_in1k``, ``ResNet50_Weights.IMAGENET1K_V2``."""
    bare = weights.removeprefix(f"{source.name.partition('/')[0]}/")
    return bare.removeprefix(f"{source.name.partition('/')[2]}.").rpartition("_Weights.")[2]


def repository(name: str) -> tuple[str, tuple[str, ...], str | None]:
    """``hf-hub:OWNER/REPO[@REVISION]`` as arguments of :func:`tlx.models.weights.download.from_hub`.

    Raises:
        UserError: it is written otherwise.
    """
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name[len(HUB[0]) :], flags=re.ASCII)
    if not found or not download.is_repository(found[1]):
        raise UserError(f'"{name}" is no repository', todo="write hf-hub:OWNER/REPO or hf-hub:OWNER/REPO@REVISION")
    return found[1], download.WEIGHTS, found[2]


def _in_folder(source: Source, folder: Path, *, there: bool) -> Origin:
    """The default weights of `source` in a folder that `tlx weights fetch` filled."""
    tag = next(iter(source.tags()), None)
    if tag is None:
        raise UserError(
            f"is a folder, and {source.name} has no pretrained weights whose file could be meant",
            where=str(folder),
            todo="set backbone.weights to one file of it",
        )
    name = shelf.full_name(source.name, tag)
    path = folder / shelf.file_name(name)
    if there and not path.is_file():
        stem = Path(shelf.file_name(shelf.full_name(source.name, None))).stem
        others = sorted(p.name for p in folder.glob(f"{stem}.*.safetensors"))
        also = f"; there is {', '.join(others[:4])}, which backbone.weights can name" if others else ""
        raise UserError(
            f"this folder has no {path.name}{also}",
            where=str(folder),
            todo=f"on a connected machine run  tlx weights fetch {name} --to DIR  and copy the file here",
        )
    return Origin(name, tag, path)


def _tag_of(path: Path, source: Source) -> str | None:
    """What a file that `tlx weights fetch` wrote says about itself, if it is of this network."""
    said = shelf.header(path)
    tag = said.get("tag")
    known = tag in source.tags() and said.get("name") == shelf.full_name(source.name, tag)
    return tag if known else None


def _missing(name: str, absent: download.NotHere) -> UserError:
    """The error for weights that are neither on this machine nor to be had from here."""
    file, folders = shelf.file_name(name), shelf.folders()
    looked = [str(folder / file) for folder in folders] or [f"{file} ({shelf.VARIABLE} is not set)"]
    places = "".join(f"\n    {place}" for place in [*looked, str(absent.looked)])
    return UserError(
        f"these weights are not on this machine, and {absent.why}. Looked for{places}",
        where=name,
        todo=(
            f"on a connected machine run  tlx weights fetch {name} --to DIR\n"
            f"     then bring DIR here and set the environment variable {shelf.VARIABLE}=DIR, or backbone.weights to\n"
            f"     DIR/{file}; or to a file of your own, or to none"
        ),
    )
