"""Compares runs and writes it down: ``comparison.html``, ``comparison.md`` and ``figures/comparison*.png``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlx.report.comparison import Comparable, compared
from tlx.report.comparison_figures import pictures
from tlx.report.comparison_page import Shown, markdown, page
from tlx.report.comparison_text import group_table, methods, notes, verdict
from tlx.report.groups import located, read_run
from tlx.report.writing import write
from tlx.runs.history import History, named, read_history


@dataclass(frozen=True)
class Comparison:
    """What was found, and the files that tell it.

    Attributes:
        sets: of runs that can be compared, one for each metric and validation data; the most runs first.
        files: written.
    """

    sets: tuple[Comparable, ...]
    files: tuple[Path, ...]

    @property
    def verdicts(self) -> list[str]:
        """Two sentences for each of `sets`."""
        return [verdict(of) for of in self.sets]

    def data(self) -> dict[str, Any]:
        """Plain data; numbers that are not known are None."""
        return {
            "verdicts": self.verdicts,
            "notes": notes(self.sets),
            "sets": [of.data() for of in self.sets],
            "methods": methods(self.sets),
            "files": [str(file) for file in self.files],
        }

    def tables(self) -> Iterator[tuple[list[str], list[list[str]]]]:
        """Heads and rows of groups, for a terminal."""
        return (group_table(of) for of in self.sets)


def compare(folders: Sequence[Path], *, out: Path) -> Comparison:
    """Compares runs by group, those of one configuration whatever their seed, and writes that into a folder.

    Runs may be unfinished, torn or of an older version: they are shown with what they have, and only those that are
    done count. It says nothing on the terminal.

    Args:
        folders: of runs, at least one; one given twice counts once.
        out: where ``comparison.html``, ``comparison.md`` and ``figures/`` go; made where it is not there. They replace
            those of an earlier comparison.

    Raises:
        UserError: a folder is not a run's, or `out` cannot be written.
    """
    return compare_histories([read_history(path) for path in {p.resolve(): p for p in folders}.values()], out=out)


def compare_histories(histories: Sequence[History], *, out: Path | None) -> Comparison:
    """The same of runs that were read; nothing is drawn or written without an `out`."""
    runs = located([read_run(history, name) for history, name in zip(histories, named(histories), strict=True)])
    sets = compared(runs)
    if out is None:
        return Comparison(tuple(sets), ())
    shown = [Shown(of, pictures(of)) for of in sets]
    places = {
        (place, name): f"figures/comparison{'' if not place else f'-{place + 1}'}{name}.png"
        for place, one in enumerate(shown)
        for name in one.pictures
    }
    files = {file: shown[place].pictures[name] for (place, name), file in places.items()}
    files["comparison.md"] = markdown(shown, runs, places).encode()
    files["comparison.html"] = page(shown, runs).encode()
    return Comparison(tuple(sets), tuple(write(out, files)))
