"""What a run's configuration says that the defaults do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tlx.base.differences import differences
from tlx.plan.config import parse, plain
from tlx.runs.run_files import mapping

_OWN = ("run:", "data.train:", "data.val:", "data.test:", "backbone.name:", "world.")
"""Of every run, and told elsewhere on a page."""


def changed(config: Mapping[str, Any]) -> list[str] | None:
    """A line for each key: the default -> what the run has. None of what is no configuration of this version."""
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
    own, usual = plain(parse(dict(config), libraries=False)), plain(parse(raw, libraries=False))
    return [line for line in differences(usual, own) if not line.startswith(_OWN)]
