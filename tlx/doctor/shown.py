"""Findings for people, on a terminal or in a log, or as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import IO

from tlx.base.terminal import escaped
from tlx.doctor.findings import Section, Verdict, worst

_COLOURS: dict[Verdict, str] = {"ok": "green", "warning": "yellow", "fault": "bold red"}


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
        self._out.print(section.title, style="bold")
        for finding in section.findings:
            self._out.print(f"  {finding.verdict:<8}", style=_COLOURS[finding.verdict], end="")
            self._out.print(escaped(f"{finding.name}: {finding.said}", lines=True))
            if finding.todo and finding.verdict != "ok":
                self._out.print(" " * 10 + escaped(f"-> {finding.todo}", lines=True))
        self._out.file.flush()

    def end(self) -> None:
        """The last line, or all of the JSON."""
        if self._silent:
            return
        found = [{"section": s.title, **dataclasses.asdict(f)} for s in self.sections for f in s.findings]
        if self._json:
            print(json.dumps({"verdict": self.verdict, "findings": found}, indent=1), file=self._out.file)
        else:
            faults, warnings = (sum(f["verdict"] == word for f in found) for word in ("fault", "warning"))
            self._out.print(f"faults: {faults}, warnings: {warnings}, in {len(found)} lines")
        self._out.file.flush()


def _reraise() -> None:
    raise  # it is called while the exception is handled
