"""How many parameters networks have, where only building them tells.

What was counted is remembered in the user's cache folder, by the library's version: a convenience, which may be
deleted, damaged or missing at any time.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from tlx.base.files import write_whole
from tlx.base.launcher import environment
from tlx.base.terminal import BestEffort
from tlx.models import Backbone
from tlx.models.layers.trace import build_empty
from tlx.models.libraries.names import LIBRARIES
from tlx.models.libraries.sources import Source

CLASSES = 1000


def count(wanted: Sequence[tuple[Source, str | None]]) -> list[int | None]:
    """Parameters with 1000 classes of networks with these weights; None where one cannot be built.

    On a terminal a bar shows how far it is: a network takes a tenth of a second or two.
    """
    keys = [f"{source.name}@{tag or ''}" for source, tag in wanted]
    known = {key: number for library in LIBRARIES for key, number in _remembered(library).items()}
    missing = [(key, *pair) for key, pair in zip(keys, wanted, strict=True) if key not in known]
    found: dict[str, int] = {}
    try:
        shown = sys.stderr.isatty() and len(missing) > 1
        bar: Any = BestEffort(sys.stderr, "standard error")
        for key, source, tag in track(
            missing, "counting parameters", console=Console(file=bar), transient=True, disable=not shown
        ):
            number = _count(source, tag)
            if number is not None:
                found[key] = number
    finally:  # what an impatient user has waited for is kept
        for library in LIBRARIES:
            _remember(library, {key: number for key, number in found.items() if key.startswith(f"{library}/")})
    return [(known | found).get(key) for key in keys]


def _count(source: Source, tag: str | None) -> int | None:
    def build() -> nn.Module:
        return source.build(CLASSES, {}, tag)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with torch.device("meta"):  # nothing at all is computed; some networks compute with what they make
                    net = build()
            except Exception:
                net = build_empty(build)
        module = net.module if isinstance(net, Backbone) else net
        return sum(p.numel() for p in module.parameters())
    except Exception:  # one network that cannot be built must not hide the others
        return None


def _file(library: str) -> Path:
    folder = environment().get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "tlx" / f"parameters-{library}-{version(library)}.json"


def _remembered(library: str) -> Mapping[str, int]:
    with suppress(OSError, ValueError, RuntimeError, RecursionError):
        content = json.loads(_file(library).read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return {key: n for key, n in content.items() if type(n) is int and n > 0 and key.startswith(f"{library}/")}
    return {}


def _remember(library: str, found: Mapping[str, int]) -> None:
    with suppress(OSError, RuntimeError):
        if found:
            file = _file(library)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps({**_remembered(library), **found}, indent=0, sort_keys=True))
