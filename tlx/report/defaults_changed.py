"""What a run's configuration says that the defaults do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tlx.base import plug
from tlx.base.differences import differences
from tlx.base.errors import TlxError
from tlx.plan.config import Config, parse, plain
from tlx.runs.run_files import mapping

_TOLD = ("run:", "data.train:", "data.val:", "data.test:", "backbone.name:", "world.", "unfreeze", "task")
"""Of every run, and told elsewhere on a page."""

_PARTS = ("head", "objective", "optimizer")
"""Parts whose defaults stand in the file: they are known when their function is looked at."""


def changed(config: Mapping[str, Any]) -> list[str] | None:
    """A line for each key: the default -> what the run has; of each phase what it is trained with. None of what is no
    configuration of this version."""
    if not config:
        return None
    data, backbone = mapping(config.get("data")), mapping(config.get("backbone"))
    raw = {
        "run": "run",
        "data": {"train": data.get("train", "-"), **({"val": data["val"]} if data.get("val") else {})},
        "backbone": {"name": backbone.get("name", "-")},
        **({"task": config["task"]} if "task" in config else {}),
        **({"unfreeze": config["unfreeze"]} if "unfreeze" in config else {}),
    }
    own, usual = _effective(parse(dict(config), libraries=False)), _effective(parse(raw, libraries=False))
    for group in _PARTS:
        own[group], usual[group] = (_whole(group, part) for part in (own.get(group), usual.get(group)))
    return [line for line in differences(_joined(usual), _joined(own)) if not line.startswith(_TOLD)]


def _effective(config: Config) -> dict[str, Any]:
    """Plain, and each phase with all that it is trained with."""
    own = plain(config)
    names = [name for name in config.phase_names if name != "each"]
    return own | {"phases": {name: config.settings(name).model_dump(mode="json") for name in names}}


def _whole(group: str, part: Any) -> Any:
    """A part with its defaults, where its function is there."""
    said = {"name": part} if isinstance(part, str) else mapping(part)
    try:
        return {**plug.defaults(plug.find(group, str(said.get("name")))), **said}
    except TlxError:
        return said


def _joined(node: Any) -> Any:
    """Parts of other groups by their name alone where they have no arguments: `constant` is {name: constant}."""
    if not isinstance(node, Mapping):
        return list(node) if isinstance(node, tuple) else node
    found = {str(key): _joined(value) for key, value in node.items()}
    return found["name"] if set(found) == {"name"} else found
