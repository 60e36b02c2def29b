"""From a folder of pictures to the file of a configuration and its plan; or back to the file that was made before."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tlx.base.errors import UserError
from tlx.base.files import why_not_writable, write_whole
from tlx.base.parsing import from_yaml
from tlx.data.build.progress import cores
from tlx.init.choices import Choices, Machine
from tlx.init.pictures import Pictures, find
from tlx.plan import defaults
from tlx.plan.config import parse
from tlx.plan.defaults import network_name


@dataclass(frozen=True)
class Begun:
    """A configuration that was made from pictures.

    Attributes:
        plan: in words.
        was_there: the file is an earlier one, and says the same.
    """

    file: Path
    plan: str
    was_there: bool


def write(pictures: Pictures, backbone: str | None = None, *, out: Path | None = None) -> Begun:
    """Writes the file, unless it is there, and plans.

    Raises:
        UserError: no such network, a plan that training would refuse, another file of that name.
    """
    network, file = backbone or defaults.BACKBONE, out or file_of(pictures.name, backbone)
    text, plan = _planned(pictures, network, _command(pictures, backbone, out))
    was_there = file.exists()
    if was_there and _meaning(file) != from_yaml(text):
        raise UserError(
            "there is another configuration of that name, which stays as it is",
            where=str(file),
            todo=f"tlx train {file}; or --out ANOTHER.yaml",
        )
    if not was_there:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, text)
    return Begun(file, plan, was_there)


def refuse_unwritable(out: Path) -> None:
    """What :func:`write` would find out after the shards are built.

    Raises:
        UserError: no file can be made there.
    """
    folder = next(place for place in out.absolute().parents if place.exists())
    if why := why_not_writable(folder):
        raise UserError(f"cannot be written: {why}", where=str(folder), todo="another --out")


def file_of(name: str, backbone: str | None) -> Path:
    """Where the file goes that no other place is named for."""
    if backbone is None or backbone == defaults.BACKBONE:
        return Path(f"{name}.yaml")
    return Path(f"{name}-{network_name(backbone)}.yaml")


def existing(name: str, shards: Path, backbone: str | None) -> Path | None:
    """The file that was made before, or what a person has made of it: one of that name that trains on these shards."""
    file = file_of(name, backbone)
    said = _meaning(file)
    data = said.get("data") if isinstance(said, dict) else None
    return file if isinstance(data, dict) and data.get("train") == str(shards / "train") else None


def made_before(source: Path, backbone: str | None) -> Path | None:
    """The file of the newest finished shards of a folder; whether the pictures have changed since is not looked at."""
    found = find(source)
    return existing(*found, backbone) if found is not None else None


def backbone_in(overrides: Sequence[str]) -> str | None:
    """The network that changes of a configuration name."""
    said = [word.partition("=")[2] for word in overrides if word.startswith(("backbone.name=", "backbone="))]
    return said[-1] if said and not said[-1].startswith("{") else None


def _planned(pictures: Pictures, backbone: str, command: str) -> tuple[str, str]:
    """The file's text, and its plan in words."""
    from tlx.train import build

    text = Choices(pictures, backbone, _machine()).text(command)
    return text, build.plan(parse(from_yaml(text)))[1]


def _machine() -> Machine:
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Machine(gpus > 0, max(cores() // max(gpus, 1), 1))


def _command(pictures: Pictures, backbone: str | None, out: Path | None) -> str:
    wishes = pictures.wishes
    said = {"--backbone": backbone, "--out": out, "--shards": wishes.shards, "--val": wishes.val}
    words = [word for option, value in said.items() if value is not None for word in (option, str(value))]
    words += [] if wishes.nested is None else ["--nested" if wishes.nested else "--no-nested"]
    words += ["--skip-bad"] if wishes.skip_bad else []
    return shlex.join(["tlx", "init", str(pictures.source), *words])


def _meaning(file: Path) -> object:
    try:
        return from_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
