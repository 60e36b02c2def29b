"""Reports on trainings: figures, a page for the browser, a table on the terminal; of finished and unfinished runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tlx.base.errors import UserError
from tlx.base.files import write_whole
from tlx.base.terminal import drawn, escaped, say, tables, width
from tlx.report import figures
from tlx.report.page import COLUMNS, Section, cells, page
from tlx.runs.history import History, named, read_history

FILES = {
    "Loss, metric and learning rate over training": "figures/curves.png",
    "Each task over training": "figures/tasks.png",
    "Validation of each phase, best and last": "figures/phases.png",
}
"""Pictures of a run, by caption."""


def report(folders: Sequence[Path], *, out: Path | None = None) -> list[Path]:
    """Writes ``report.html`` and ``figures/`` into each run folder and prints a table of the runs.

    Several runs, or an `out`, add ``comparison.html`` and ``figures/comparison.png``. All of it replaces what an
    earlier report has written. Runs may be unfinished: then it tells how far they are.

    Args:
        folders: of runs; one given twice counts once.
        out: where the comparison goes; by default the first run's folder.

    Returns:
        The files written.

    Raises:
        UserError: a folder is not a run's, or cannot be written.
    """
    paths = list({path.resolve(): path for path in folders}.values())
    if not paths:
        raise UserError("no run was given", todo="tlx report RUN...")
    histories = [read_history(path) for path in paths]
    names = named(histories)
    sections = [_section(history, name) for history, name in zip(histories, names, strict=True)]
    written = [file for section in sections for file in _write_run(section)]
    if len(sections) > 1 or out is not None:
        written += _write_comparison(sections, folder=out or paths[0])
    _print_table(histories, names)
    return written


def report_run(folder: Path) -> Path:
    """Writes the report of one run into its folder, as `report` does, and says nothing; its page.

    Raises:
        UserError: as `report`.
    """
    history = read_history(folder)
    return _write_run(_section(history, history.name))[-1]


def compare(folders: Sequence[Path], *, out: Path) -> list[Path]:
    """Writes the comparison of several runs into `out`, nothing into their own folders, and prints nothing.

    Raises:
        UserError: as `report`.
    """
    histories = [read_history(path) for path in folders]
    sections = [_section(history, name) for history, name in zip(histories, named(histories), strict=True)]
    return _write_comparison(sections, folder=out)


def is_drawn(folder: Path) -> bool:
    """Whether the report in a folder is that of its result, and not of an earlier one."""
    try:
        return (folder / "report.html").stat().st_mtime_ns >= (folder / "result.json").stat().st_mtime_ns
    except OSError:
        return False


def _section(history: History, name: str) -> Section:
    drawn = (figures.curves(history), figures.tasks(history), figures.phases([history], [name]))
    return Section(history, name, {caption: png for caption, png in zip(FILES, drawn, strict=True) if png is not None})


def _write_run(section: Section) -> list[Path]:
    files = {FILES[caption]: png for caption, png in section.pictures.items()}
    text = page([section], title=f"Run {section.name}")
    return _write(section.history.path, {**files, "report.html": text.encode()})


def _write_comparison(sections: Sequence[Section], *, folder: Path) -> list[Path]:
    picture = figures.comparison([s.history for s in sections], [s.name for s in sections])
    title = f"Comparison of {len(sections)} run{'s' if len(sections) > 1 else ''}"
    text = page(sections, title=title, pictures={"Validation curves, and each phase": picture})
    return _write(folder, {"figures/comparison.png": picture, "comparison.html": text.encode()})


def _write(folder: Path, files: dict[str, bytes]) -> list[Path]:
    try:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(folder / name, content)
    except OSError as error:
        raise UserError(
            f"cannot be written: {error.strerror or error}",
            where=str(error.filename or folder),
            todo="report on a copy of the run, or make its folder writable; the comparison goes where --out says",
        ) from error
    return [folder / name for name in files]


def _print_table(histories: Sequence[History], names: Sequence[str]) -> None:
    rows = [cells(history, escaped(name)) for history, name in zip(histories, names, strict=True)]
    columns = dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
    about = {COLUMNS[0]: columns.pop(COLUMNS[0])}
    say(drawn(*tables("", about, columns, width(), more="", lines=len(rows) > 1)))
