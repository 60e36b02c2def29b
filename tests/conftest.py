"""The dearest files are dealt first; what tests have counted is printed, and so comes into FULL.md."""

from __future__ import annotations

import collections
import csv
import os
from pathlib import Path

import psutil
import pytest

os.environ.pop("COLUMNS", None)  # which xdist sets to 80: plans and logs would be folded

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once in a process

COSTS = Path(__file__).with_name("costs.csv")
"""Seconds of each file's tests, those of the quick tier and the slow ones; `launch/test.sh --all` writes it."""


@pytest.fixture
def born():
    """Gives the children of this process that are younger than the test: others are of tests before it (`forked`)."""
    before = {child.pid for child in psutil.Process().children()}
    return lambda: [child for child in psutil.Process().children() if child.pid not in before]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three classes of 8 training and 4 validation pictures of 16 x 16."""
    from images import make_shards

    return make_shards(tmp_path_factory.mktemp("s") / "s", classes=3, per_class={"train": 8, "val": 4}, size=16)


@pytest.fixture
def compose(shards, tmp_path, monkeypatch):
    """Makes a run of one rank on the small network (see `composed`)."""
    from composed import composer

    return composer(shards, tmp_path / "run", monkeypatch)


def pytest_addoption(parser):
    parser.addoption("--write-costs", action="store_true", help=f"write {COSTS.name}")


def pytest_collection_modifyitems(items):
    """Files in falling order of cost: workers take whole files, and none must be left with a long one at the end."""
    costs = collections.Counter()
    if COSTS.exists():
        with COSTS.open(newline="") as file:
            for name, quick, slow in list(csv.reader(file))[1:]:
                costs[name, False], costs[name, True] = float(quick), float(slow)
    files = collections.Counter()
    for name, slow in {(item.path.name, "slow" in item.keywords) for item in items}:
        files[name] += costs[name, slow]
    items.sort(key=lambda item: (-files[item.path.name], item.path.name))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter) -> None:
    """Prints what tests gave to `record_property("figures", ...)`, in this process or in a worker of xdist."""
    reports = [r for outcome in ("passed", "failed") for r in terminalreporter.stats.get(outcome, ())]
    for report in reports:
        for name, text in getattr(report, "user_properties", ()):
            if name == "figures" and report.when == "call":
                terminalreporter.write_line(text)
    if terminalreporter.config.getoption("--write-costs"):
        write_costs([r for rs in terminalreporter.stats.values() for r in rs if isinstance(r, pytest.TestReport)])


def write_costs(reports):
    costs = collections.Counter()
    for report in reports:
        costs[Path(report.nodeid.partition("::")[0]).name, "slow" in report.keywords] += report.duration
    names = sorted({name for name, _ in costs}, key=lambda name: -costs[name, False] - costs[name, True])
    with COSTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "quick", "slow"])
        writer.writerows([name, f"{costs[name, False]:.0f}", f"{costs[name, True]:.0f}"] for name in names)
