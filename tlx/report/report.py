"""Reports on trainings: figures, a page for the browser, a table on the terminal; of finished and unfinished runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tlx.base.errors import UserError
from tlx.base.terminal import drawn, escaped, folded, say, tables, width
from tlx.report import figures
from tlx.report.compare import Comparison, compare_histories
from tlx.report.page import COLUMNS, Section, cells, page
from tlx.report.writing import write
from tlx.runs.history import History, named, read_history

FILES = {
    "Loss, metric and learning rate over training": "figures/curves.png",
    "Each task over training": "figures/tasks.png",
    "Validation of each phase, best and last": "figures/phases.png",
}
"""Pictures of a run, by caption."""


def report(folders: Sequence[Path], *, out: Path | None = None) -> list[Path]:
    """Writes ``report.html`` and ``figures/`` into each run folder and prints a table of the runs.

    Several runs, or an `out`, add what :func:`tlx.report.compare.compare` writes, and its verdict. All of it replaces
    what an earlier report has written. Runs may be unfinished: then it tells how far they are.

    Args:
        folders: of runs; one given twice counts once.
        out: where the comparison goes; by default the first run's folder.

    Returns:
        The files written.

    Raises:
        UserError: a folder is not a run's, or cannot be written.
    """
    histories, written, comparison = _drawn(folders, out)
    _print_table(histories, named(histories))
    if len(histories) > 1:
        _print_comparison(comparison)
    return written


def report_data(folders: Sequence[Path], *, out: Path | None = None) -> dict[str, Any]:
    """The same files, and what was found as plain data instead of tables, of a single run too.

    Raises:
        UserError: as `report`.
    """
    _, written, comparison = _drawn(folders, out)
    return {**comparison.data(), "files": [str(file) for file in written]}


def _drawn(folders: Sequence[Path], out: Path | None) -> tuple[list[History], list[Path], Comparison]:
    """Writes all files; the runs, the files, and what the comparison found."""
    paths = list({path.resolve(): path for path in folders}.values())
    if not paths:
        raise UserError("no run was given", todo="tlx report RUN...")
    histories = [read_history(path) for path in paths]
    sections = [_section(history, name) for history, name in zip(histories, named(histories), strict=True)]
    written = [file for section in sections for file in _write_run(section)]
    comparison = compare_histories(histories, out=out or (paths[0] if len(paths) > 1 else None))
    return histories, [*written, *comparison.files], comparison


def report_run(folder: Path) -> Path:
    """Writes the report of one run into its folder, as `report` does, and says nothing; its page.

    Raises:
        UserError: as `report`.
    """
    history = read_history(folder)
    return _write_run(_section(history, history.name))[-1]


def is_drawn(folder: Path) -> bool:
    """Whether the report in a folder is that of its result, and not of an earlier one."""
    try:
        return (folder / "report.html").stat().st_mtime_ns >= (folder / "result.json").stat().st_mtime_ns
    except OSError:
        return False


def _section(history: History, name: str) -> Section:
    drawn = (figures.curves(history), figures.tasks(history), figures.phases(history))
    return Section(history, name, {caption: png for caption, png in zip(FILES, drawn, strict=True) if png is not None})


def _write_run(section: Section) -> list[Path]:
    files = {FILES[caption]: png for caption, png in section.pictures.items()}
    text = page([section], title=f"Run {section.name}")
    return write(section.history.path, {**files, "report.html": text.encode()})


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
