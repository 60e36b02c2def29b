"""A view in a notebook: one display of a cell that is replaced in place, whatever is printed beside it."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import RenderableType

from tlx.base.terminal import drawn

COLUMNS = 110
"""Of a view in a cell."""

_EVERY_S = 0.5  # between two updates, which travel to a browser


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel, whose cells show what is displayed."""
    ipython = sys.modules.get("IPython")  # a kernel has it
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"


class Display:
    """What a cell shows, from the first :meth:`show` on."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._shown = 0.0

    def show(self, view: Callable[[int], RenderableType], *, at_once: bool = False) -> None:
        """Shows the view of so many columns in place of the one before, at most twice a second; `at_once` always, if
        there was one."""
        now = time.monotonic()
        if (at_once and self._handle is None) or (not at_once and now - self._shown < _EVERY_S):
            return
        from IPython.display import display

        text = drawn(view(COLUMNS), columns=COLUMNS)
        style = "line-height: 1.3; font-family: monospace; white-space: pre; overflow-x: auto"
        data = {"text/plain": text, "text/html": f'<pre style="{style}">{html.escape(text)}</pre>'}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(data, raw=True)
        self._shown = now
