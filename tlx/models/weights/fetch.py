"""`tlx weights fetch`: pretrained weights in a folder, one file each, to be carried to machines without internet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tlx import models
from tlx.base.errors import UserError
from tlx.models.libraries.sources import Source
from tlx.models.weights import download, files
from tlx.models.weights import local_weights as shelf
from tlx.models.weights.pretrained import HUB, Origin, choose, repository


@dataclass(frozen=True)
class Fetched:
    """A file of the folder.

    Attributes:
        backbone: the network that the weights are of; None for a hub repository, which does not say.
        kept: whether it was there already.
    """

    path: Path
    backbone: str | None
    kept: bool


@dataclass(frozen=True)
class _Wanted:
    origin: Origin
    source: Source | None  # None for a hub repository


def fetch(names: Sequence[str], folder: Path, *, tag: str | None = None) -> Iterator[Fetched]:
    """Writes the weights into `folder` under names that `local_weights` foretells, one after the other.

    Tensors have the library's own names, for the network as it is without arguments; those of a hub repository are as
    they are there. What is there already stays as it is.

    Args:
        names: ``timm/resnet50``, with a tag ``timm/resnet50.a1_in1k`` or ``torchvision/resnet50.IMAGENET1K_V2``, or
            ``hf-hub:OWNER/REPO[@REVISION]``.
        tag: of the weights, for names without one.

    Raises:
        UserError: unknown names or tags (before anything is downloaded), no server that answers, a download that
            fails, a folder that cannot be written to.
    """
    for wanted in [_wanted(name, tag) for name in names]:
        yield _fetch(wanted, folder)


def _wanted(name: str, tag: str | None) -> _Wanted:
    if name.startswith(HUB):
        if tag:
            raise UserError(f'{name} has no tag "{tag}"', todo="a revision is written hf-hub:OWNER/REPO@REVISION")
        repository(name)
        return _Wanted(Origin(f"{HUB[0]}{name[len(HUB[0]) :]}"), None)
    base, _, own = name.partition(".") if ":" not in name else (name, "", "")
    if own and tag and own != tag:
        raise UserError(f'{name} has the tag "{own}" already, and not "{tag}"', todo="give one of them")
    source = models.source(base)
    origin = choose(source, own or tag or "default")
    if origin.tag is None or origin.file is not None:
        raise UserError(f"{source.name} has no pretrained weights to fetch", todo="tlx models show NAME lists them")
    return _Wanted(origin, source)


def _fetch(wanted: _Wanted, folder: Path) -> Fetched:
    name, tag, source = wanted.origin.name, wanted.origin.tag, wanted.source
    path = folder / shelf.file_name(name)
    backbone = source.name if source else None
    if path.exists():
        shelf.header(path)
        return Fetched(path, backbone, kept=True)
    shelf.make(folder)  # before the download, which may take long
    try:
        state = source.pretrained({}, tag) if source and tag is not None else files.read(_of_hub(name))
    except download.NotHere as absent:
        raise UserError(
            f"cannot be fetched: {absent.why}",
            where=name,
            todo="run this on a machine with internet; a proxy is taken from HTTPS_PROXY",
        ) from absent
    libraries = {library: version(library) for library in ("tlx", "timm", "torch", "torchvision")}
    shelf.put(path.parent, name, state, {**({"tag": tag} if tag is not None else {}), **libraries})
    return Fetched(path, backbone, kept=False)


def _of_hub(name: str) -> Path:
    return download.from_hub(*repository(name))
