"""tlx's C extension `tlx.data._jpeg`, where it was built, and for this source: ``extension: module or None``."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from tlx.base.terminal import say

INTERFACE = 1
"""Of the extension that this source calls: `INTERFACE` in `_jpeg.c`; both change when a call or its answer changes."""


def fitting(module: ModuleType) -> Any:
    """The module, or None and a warning: one that was built for another source gives other answers."""
    if getattr(module, "INTERFACE", None) == INTERFACE:
        return module
    say(
        "warning: tlx's C extension was built for another version of tlx and is not used; pictures are read more slowly"
        "\n  -> install tlx again, which builds it",
        error=True,
    )
    return None


extension: Any
try:
    from tlx.data import _jpeg
except ImportError:  # built where there is a compiler and libjpeg's header
    extension = None
else:
    extension = fitting(_jpeg)
