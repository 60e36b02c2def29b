"""Tests of one file that are marked gpu, a row for each: ``run_tests.py FILE WORDS``, words of pytest's ``-k``.

A dry run only finds them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from rows import Setting, setting_of


class Told:
    """A plugin that leaves a row for each test."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if self.setting.dry:
            for item in session.items:
                self.setting.row(item.name, ok=None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed or (report.when == "call" and report.passed):
            why = {} if report.passed else {"why": str(report.longrepr)[-1500:]}
            self.setting.row(
                report.nodeid.partition("::")[2], ok=report.passed, seconds=round(report.duration, 1), **why
            )
        elif report.skipped:
            self.setting.row(report.nodeid.partition("::")[2], ok=False, why="it was skipped")


def main() -> None:
    setting, said = setting_of(["file", "words"])
    tests = Path(__file__).parents[1]
    words = [
        str(tests / said.file),
        "-m",
        "gpu",
        "-q",
        "-x" if setting.dry else "--maxfail=5",
        "-p",
        "no:cacheprovider",
    ]
    words += ["-k", said.words] if said.words else []
    raise SystemExit(pytest.main([*words, *(["--collect-only"] if setting.dry else [])], plugins=[Told(setting)]))


if __name__ == "__main__":
    main()
