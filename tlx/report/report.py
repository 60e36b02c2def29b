"""Reports on trainings: a page for the browser, figures, a table on the terminal; of finished and unfinished runs."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tlx.base.errors import UserError
from tlx.base.terminal import drawn, escaped, folded, say, tables, width
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.file_list import FileList
from tlx.report.compare import Comparison, compare_histories
from tlx.report.inside_report import Network
from tlx.report.parts import Parts, limit
from tlx.report.run_page import html, markdown
from tlx.report.run_report import RunReport, run_report
from tlx.report.run_text import COLUMNS, cells
from tlx.report.writing import write
from tlx.runs.history import History, named, read_history

OpenRun = Callable[[Path, "Manifest | FileList"], Network]
"""Opens the network of a run, to be shown pictures of these."""


def report(
    folders: Sequence[Path], *, out: Path | None = None, network: OpenRun | None = None, seconds: float | None = None
) -> list[Path]:
    """Writes ``report.html``, ``report.md`` and ``figures/`` into each run folder and prints a table of the runs.

    Several runs, or an `out`, add what :func:`tlx.report.compare.compare` writes, and its verdict. All of it replaces
    what an earlier report has written. Runs may be unfinished: then it tells how far they are.

    Args:
        folders: of runs; one given twice counts once.
        out: where the comparison goes; by default the first run's folder.
        network: for what only the trained network can tell of pictures; None leaves that out.
        seconds: that each page may take; None: 5 % of the training's, or 20 where that is longer.

    Returns:
        The files written.

    Raises:
        UserError: a folder is not a run's, or cannot be written.
    """
    histories, written, comparison = _drawn(folders, out, network, seconds)
    _print_table(histories, named(histories))
    if len(histories) > 1:
        _print_comparison(comparison)
    return written


def report_data(
    folders: Sequence[Path], *, out: Path | None = None, network: OpenRun | None = None, seconds: float | None = None
) -> dict[str, Any]:
    """The same files, and what was found as plain data instead of tables, of a single run too.

    Raises:
        UserError: as `report`.
    """
    _, written, comparison = _drawn(folders, out, network, seconds)
    return {**comparison.data(), "files": [str(file) for file in written]}


def _drawn(
    folders: Sequence[Path], out: Path | None, network: OpenRun | None, seconds: float | None
) -> tuple[list[History], list[Path], Comparison]:
    """Writes all files; the runs, the files, and what the comparison found."""
    paths = list({path.resolve(): path for path in folders}.values())
    if not paths:
        raise UserError("no run was given", todo="tlx report RUN...")
    histories = [read_history(path) for path in paths]
    pairs = zip(histories, named(histories), strict=True)
    written = [file for one, name in pairs for file in _write_run(one, name, network=network, seconds=seconds)]
    comparison = compare_histories(histories, out=out or (paths[0] if len(paths) > 1 else None))
    return histories, [*written, *comparison.files], comparison


def report_run(folder: Path, *, network: OpenRun | None = None, seconds: float | None = None) -> Path:
    """Writes the report of one run into its folder, as `report` does, and says nothing; its page.

    Raises:
        UserError: as `report`.
    """
    history = read_history(folder)
    return _write_run(history, history.name, network=network, seconds=seconds)[-1]


def is_drawn(folder: Path) -> bool:
    """Whether the report in a folder is that of its result, and not of an earlier one."""
    try:
        return (folder / "report.html").stat().st_mtime_ns >= (folder / "result.json").stat().st_mtime_ns
    except OSError:
        return False


def _write_run(
    history: History, name: str, *, network: OpenRun | None = None, seconds: float | None = None
) -> list[Path]:
    left = limit(history.number("wall_time_s")) if seconds is None else seconds
    more = f"tlx report {shlex.quote(str(history.path))} --full"
    opened = None if network is None else functools.partial(network, history.path)
    return write_pages(history.path, run_report(history, name, Parts(left, more), network=opened))


def write_pages(folder: Path, made: RunReport) -> list[Path]:
    """``figures/``, report.md and, last, report.html.

    Raises:
        UserError: they cannot be written.
    """
    files = {f"figures/{name}.png": figure.png for name, figure in made.figures.items()}
    return write(folder, {**files, "report.md": markdown(made).encode(), "report.html": html(made).encode()})


def _print_table(histories: Sequence[History], names: Sequence[str]) -> None:
    rows = [cells(history, escaped(name)) for history, name in zip(histories, names, strict=True)]
    columns = dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
    about = {COLUMNS[0]: columns.pop(COLUMNS[0])}
    say(drawn(*tables("", about, columns, width(), more="", lines=len(rows) > 1)))


def _print_comparison(comparison: Comparison) -> None:
    for of, (heads, rows) in zip(comparison.sets, comparison.tables(), strict=True):
        columns = {head: [escaped(row[i], lines=True) for row in rows] for i, head in enumerate(heads)}
        about = {heads[0]: columns.pop(heads[0])}
        if len(of.groups) > 1:
            say(drawn(*tables(f"groups by {of.metric}", about, columns, width(), more="", lines=True)))
    for said in comparison.verdicts:
        say(folded(said))
