"""Which backbones are wanted: named, or all whose weights are on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlx import models
from tlx.base.errors import UserError
from tlx.base.parsing import from_word
from tlx.base.terminal import escaped
from tlx.models import Only, model_table
from tlx.models.libraries.names import listed_networks
from tlx.models.weights import local_weights as shelf

MOST = 30
"""Of more networks than these none is looked at: somebody has meant something else."""


@dataclass(frozen=True)
class Asked:
    """A network and its weights.

    Attributes:
        said: all that `backbone` of a configuration says, and `input` beside it; else name and weights alone.
    """

    name: str
    weights: str = "default"
    said: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        if self.weights == "default":
            return self.name
        is_path = "/" in self.weights
        return f"{self.name}={Path(self.weights).name if is_path else self.weights}"


def asked(text: str | None, under: str | None, *, here: bool) -> list[Asked]:
    """
    Args:
        text: ``NAME[=WEIGHTS]`` or shell patterns, with commas between; or a list in YAML, of these and of what
            `backbone` of a configuration says, with `input` beside it.
        under: the most parameters, ``30M``.
        here: only those whose weights are found without a network.

    Raises:
        UserError: there is none, or more than :data:`MOST`.
    """
    found = list(at_hand()) if here else []
    if text is not None:
        named = [one for word in _words(text) for one in _named(word, found if here else None)]
        found = list(dict.fromkeys(named))
    elif not here:
        limit = (None, model_table.number(under)) if under else (None, None)
        found = [Asked(row.name) for row in models.search("*", Only(parameters=limit, pretrained=True), details=0)]
    if under and (text is not None or here):
        most = model_table.number(under)
        found = [one for one in found if _fits(one.name, most)]
    if not found:
        looked = (
            f"TLX_WEIGHTS ({', '.join(map(str, shelf.folders())) or 'not set'}) and the caches of the hub and torch"
        )
        what = f"no weights were found in {looked}" if here else "no backbone is left"
        raise UserError(what, where="--here" if here else "--backbones", todo="tlx weights fetch NAME --to DIR")
    if len(found) > MOST:
        what = f"{len(found)} backbones, and each takes a pass over all pictures; at most {MOST}"
        raise UserError(
            what, where="--under" if under else "--backbones", todo="name some: --backbones a,b,c; or --here"
        )
    return found


def _words(text: str) -> list[Any]:
    if not text.lstrip().startswith(("[", "{")):
        return [word.strip() for word in text.split(",")]
    said = from_word(text)
    return said if isinstance(said, list) else [said]


def _named(word: Any, among: Sequence[Asked] | None) -> list[Asked]:
    if isinstance(word, Mapping):
        if not isinstance(word.get("name"), str):
            raise UserError(
                "a backbone without a name", where="--backbones", todo="{name: timm/resnet50, weights: FILE}"
            )
        return [Asked(word["name"], str(word.get("weights", "default")), word)]
    name, _, weights = str(word).partition("=")
    if among is not None:
        own = [one for one in among if _matches(one.name, name)]
        return [one for one in own if not weights or one.weights == weights]
    if any(letter in name for letter in "*?["):
        return [Asked(row.name, weights or "default") for row in models.search(name, Only(pretrained=True), details=0)]
    return [Asked(models.owner(name) or name, weights or "default")]


def _matches(full: str, pattern: str) -> bool:
    from fnmatch import fnmatchcase

    return fnmatchcase(full, pattern) or fnmatchcase(full.partition("/")[2], pattern)


def _fits(name: str, most: int) -> bool:
    """Whether a network has at most so many parameters; one of another package is not asked."""
    if not name.startswith(("timm/", "torchvision/")):
        return True
    try:
        rows = models.search(name, Only(parameters=(None, most)), details=0)
        return any(row.name == name.partition(".")[0] for row in rows)
    except UserError:  # none that matches is as small
        return False


def at_hand() -> Iterator[Asked]:
    """Of the folders of TLX_WEIGHTS, the hub's cache, torch's; each once, in this order."""
    seen: dict[Asked, None] = {}
    for one in (*_on_shelves(), *_of_hub(), *_of_torch()):
        seen.setdefault(one)
    yield from seen


def _on_shelves() -> Iterator[Asked]:
    for folder in shelf.folders():
        for file in sorted(folder.glob("*.safetensors")):
            try:
                said = shelf.header(file).get("name", "")
            except UserError:  # damaged: whoever asks for it is told
                continue
            # what is not said under the name of the file is not found by that name
            found = _full(said if shelf.file_name(said) == file.name else file.stem.replace("--", "/", 1))
            if found is not None:
                yield found


def _full(name: str) -> Asked | None:
    """``timm/resnet50.a1_in1k`` as a network and a tag; None of anything else."""
    network, _, tag = name.partition(".")
    library, _, model = network.partition("/")
    known = listed_networks(library) if library in ("timm", "torchvision") else None
    return Asked(network, tag or "default") if known is not None and model in set(known) else None


def _of_hub() -> Iterator[Asked]:
    import huggingface_hub as hub

    from tlx.models.weights.download import cached

    root = Path(hub.constants.HF_HUB_CACHE)
    for folder in sorted(root.glob("models--timm--*")):
        name = folder.name.removeprefix("models--timm--")
        found = _full(f"timm/{name}")
        if found is not None and cached(f"timm/{name}") is not None:
            yield found


def _of_torch() -> Iterator[Asked]:
    import torch

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not folder.is_dir():
        return
    from torchvision.models import get_model_weights

    files = {file.name for file in folder.iterdir()}
    for name in listed_networks("torchvision") or ():
        for member in get_model_weights(name):
            if member.url.rpartition("/")[2] in files:
                yield Asked(f"torchvision/{name}", member.name)


def shown(one: Asked) -> str:
    return escaped(str(one))
