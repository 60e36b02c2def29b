"""What tests have counted is printed after the times of the slowest, and so comes into FULL.md."""

from __future__ import annotations

import pytest


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter) -> None:
    """Prints what tests gave to `record_property("figures", ...)`, in this process or in a worker of xdist."""
    reports = [r for outcome in ("passed", "failed") for r in terminalreporter.stats.get(outcome, ())]
    for report in reports:
        for name, text in getattr(report, "user_properties", ()):
            if name == "figures" and report.when == "call":
                terminalreporter.write_line(text)
