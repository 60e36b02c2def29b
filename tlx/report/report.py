"""Reports on trainings: figures, a page for the browser, a table on the terminal; of finished and unfinished runs."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from tlx.base.errors import UserError
from tlx.base.files import write_whole
from tlx.base.terminal import drawn, escaped, say, tables, width
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.file_list import FileList
from tlx.report import figures
from tlx.report.inside_report import Network
from tlx.report.page import COLUMNS, Section, cells, page
from tlx.report.parts import Parts, limit
from tlx.report.run_page import html, markdown
from tlx.report.run_report import RunReport, run_report
from tlx.runs.history import History, named, read_history

OpenRun = Callable[[Path, "Manifest | FileList"], Network]
"""Opens the network of a run, to be shown pictures of these."""


def report(
    folders: Sequence[Path], *, out: Path | None = None, network: OpenRun | None = None, seconds: float | None = None
) -> list[Path]:
    """Writes ``report.html``, ``report.md`` and ``figures/`` into each run folder and prints a table of the runs.

    Several runs, or an `out`, add ``comparison.html`` and ``figures/comparison.png``. All of it replaces what an
    earlier report has written. Runs may be unfinished: then it tells how far they are.

    Args:
        folders: of runs; one given twice counts once.
        out: where the comparison goes; by default the first run's folder.
        network: opens a run's network, of which maps are drawn; None: none is asked.
        seconds: of the page of one run; by default :func:`tlx.report.parts.limit` of its training.

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
    several = len(paths) > 1 or out is not None
    written = [
        file
        for history, name in zip(histories, names, strict=True)
        for file in _write_run(history, name, network=network, seconds=seconds)
    ]
    if several:
        sections = [_section(history, name) for history, name in zip(histories, names, strict=True)]
        written += _write_comparison(sections, folder=out or paths[0])
    _print_table(histories, names)
    return written


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


FILES = {
    "Loss, metric and learning rate over training": figures.curves,
    "Each task over training": figures.tasks,
}
"""Pictures of a run in a comparison, by caption."""


def _section(history: History, name: str) -> Section:
    drawn = {caption: draw(history) for caption, draw in FILES.items()}
    drawn["Validation of each phase, best and last"] = figures.phases([history], [name])
    return Section(history, name, {caption: png for caption, png in drawn.items() if png is not None})


def _write_run(
    history: History, name: str, *, network: OpenRun | None = None, seconds: float | None = None
) -> list[Path]:
    left = limit(history.number("wall_time_s")) if seconds is None else seconds
    more = f"tlx report {shlex.quote(str(history.path))} --full"
    opened = None if network is None else functools.partial(network, history.path)
    made = run_report(history, name, Parts(left, more), network=opened)
    return write_pages(history.path, made)


def write_pages(folder: Path, made: RunReport) -> list[Path]:
    """``figures/``, report.md and, last, report.html.

    Raises:
        UserError: they cannot be written.
    """
    files = {f"figures/{name}.png": figure.png for name, figure in made.figures.items()}
    return _write(folder, {**files, "report.md": markdown(made).encode(), "report.html": html(made).encode()})


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
