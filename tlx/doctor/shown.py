"""Findings for people, on a terminal or in a log, or as JSON."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from typing import IO

from tlx.base.terminal import escaped
from tlx.doctor.findings import Finding, Section, Verdict, worst

_COLOURS: dict[Verdict, str] = {"ok": "green", "warning": "yellow", "fault": "bold red"}
_INDENT = 10


def gib(size: float) -> str:
    """Bytes in words."""
    if size < 100 << 20:
        return f"{size / 2**20:.1f} MiB"
    return f"{size / 2**30:.1f} GiB"


class Output:
    """Shows sections as they come; JSON at the end.

    Args:
        silent: nothing is shown; the verdict is kept all the same.
    """

    def __init__(self, *, as_json: bool, silent: bool, file: IO[str] | None = None) -> None:
        from rich.console import Console

        self._json, self._silent = as_json, silent
        self._out = Console(file=file, highlight=False, soft_wrap=True, markup=False, emoji=False)
        self._out.on_broken_pipe = _reraise  # type: ignore[method-assign]  # rich would end the process itself
        self.sections: list[Section] = []

    @property
    def verdict(self) -> Verdict:
        return worst(f.verdict for section in self.sections for f in section.findings)

    def add(self, section: Section) -> None:
        self.sections.append(section)
        if self._silent or self._json or not section.findings:
            return
        from rich.text import Text

        self._out.print(Text(section.title, style="bold"))
        for finding in section.findings:
            line = Text(f"  {finding.verdict:<{_INDENT - 2}}", style=_COLOURS[finding.verdict])
            line.append(_wrapped(f"{finding.name}: {finding.said}", self._width), style="default")
            self._out.print(line)
            if finding.todo and finding.verdict != "ok":
                self._out.print(" " * _INDENT + _wrapped(f"-> {finding.todo}", self._width, more="   "))
        self._out.file.flush()

    def end(self) -> None:
        """The last line, or all of the JSON."""
        if self._silent:
            return
        if self._json:
            found = [{"section": s.title, **dataclasses.asdict(f)} for s in self.sections for f in s.findings]
            print(json.dumps({"verdict": self.verdict, "findings": found}, indent=1), file=self._out.file)
        else:
            self._out.print(self._summary())
        self._out.file.flush()

    def _summary(self) -> str:
        found: list[Finding] = [f for section in self.sections for f in section.findings]
        counts = [
            f"{n} {word}{'s' if n > 1 else ''}"
            for word in ("fault", "warning")
            if (n := sum(f.verdict == word for f in found))
        ]
        return f"{' and '.join(counts)} in {len(found)} lines" if counts else f"all {len(found)} lines are ok"

    @property
    def _width(self) -> int | None:
        """On a terminal; a log's lines stay whole, so that they can be searched."""
        return max(self._out.width - _INDENT, 40) if self._out.is_terminal else None


def _reraise() -> None:
    raise  # it is called while the exception is handled


def _wrapped(text: str, width: int | None, *, more: str = "") -> str:
    """Later lines stand below the first."""
    text = escaped(text, lines=True)
    if width is None:
        return text
    lines = textwrap.wrap(text, width, subsequent_indent=more, break_long_words=False, break_on_hyphens=False)
    return ("\n" + " " * _INDENT).join(lines or [""])
