"""The winner of a grid as a configuration to train from."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tlx.base.errors import UserError
from tlx.base.files import why_not_writable
from tlx.base.parsing import to_yaml
from tlx.base.terminal import escaped
from tlx.plan.config import Config, parse, read
from tlx.plan.parts import Part
from tlx.probe.members import Member


def place(config: Path, out: Path | None) -> Path:
    """Where the file goes: `out`; else beside nothing that is there, ``CONFIG-probe.yaml``, ``CONFIG-probe-2.yaml`` ...

    Raises:
        UserError: there is one, or none can be made.
    """
    if out is not None and out.exists():
        raise UserError("is there already, and stays as it is", where=str(out), todo="another --out")
    free = out or next(file for file in _names(config.stem) if not file.exists())
    folder = next(parent for parent in free.absolute().parents if parent.exists())
    if why := why_not_writable(folder):
        raise UserError(f"cannot be written: {why}", where=str(folder), todo="another --out")
    return free


def _names(stem: str) -> Any:
    yield Path(f"{stem}-probe.yaml")
    number = 2
    while True:
        yield Path(f"{stem}-probe-{number}.yaml")
        number += 1


def write(file: Path, source: tuple[Path, Sequence[str]], member: Member, about: Sequence[str]) -> None:
    """What the file `source`, with its changes, says, but with the member's head, rate and decay.

    Args:
        about: lines for the head of the file.

    Raises:
        UserError: somebody else has made one of this name meanwhile.
    """
    raw = chosen(read(*source), member, run=file.stem)
    parse(raw)  # else it would be no configuration to train from
    header = textwrap.indent("\n".join(escaped(line) for line in about), "# ", lambda _: True)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with file.open("x", encoding="utf-8") as written:
            written.write(f"{header}\n{to_yaml(raw)}")
    except FileExistsError as error:
        raise UserError("is there already, and stays as it is", where=str(file), todo="another --out") from error


def chosen(raw: Mapping[str, Any], member: Member, *, run: str) -> dict[str, Any]:
    """Plain data of a configuration, with the member's settings, in a run of its own."""
    config = parse(raw)
    phase = first_phase(config)
    phases = {**(raw.get("phases") or {})}
    if phase is None:  # nothing trains the head alone: the winner is what a training of that gives
        phases = {"feature_extraction": {"duration": _duration(config, raw)}} if _duration(config, raw) else {}
        phase = "feature_extraction"
    phases[phase] = {**(phases.get(phase) or {}), "lr": member.lr}
    optimizer = Part(name=config.optimizer.name, args={**config.optimizer.args, "weight_decay": member.weight_decay})
    found = {**raw, "run": str(Path(config.run).parent / run)}
    found |= {"head": member.head.model_dump(mode="json"), "optimizer": optimizer.model_dump(mode="json")}
    if first_phase(config) is None:
        found = {key: value for key, value in found.items() if key != "further"} | {"unfreeze": "head_only"}
    return found | {"phases": phases}


def first_phase(config: Config) -> str | None:
    """The first phase, where it trains the head alone."""
    names = {"two_phase": "feature_extraction", "head_only": "feature_extraction"}
    at_head = config.unfreeze.args.get("first", "head") == "head"
    return names.get(config.unfreeze.name) if at_head else None


def _duration(config: Config, raw: Mapping[str, Any]) -> str | None:
    first = next((name for name in config.phase_names if name != "each"), "each")
    said = config.settings(first).model_dump(mode="json").get("duration")
    return said["max"] if isinstance(said, Mapping) else said
