"""Runs compared as one HTML file that needs no other, and the same as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tlx.base.terminal import escaped
from tlx.report.comparison import COSTS, Comparable
from tlx.report.comparison_figures import MOST_ROWS
from tlx.report.comparison_text import difference_table, group_table, methods, notes, verdict
from tlx.report.groups import Run
from tlx.report.rendering import render
from tlx.report.run_text import COLUMNS, cells

CAPTIONS: Mapping[str, str] = {
    "": "Validation of each run over training, a colour for each group.",
    "-phases": "After feature extraction and after fine-tuning: mean, 95 % interval, and each run as a dot.",
    "-differences": "Differences between groups with 95 % intervals: right of 0 the first is better.",
    "-cost": "Value against cost: large circles are means of groups, filled on the front, dots their runs.",
}
"""Of pictures, by the ending of their files' names."""


@dataclass(frozen=True)
class Table:
    """Heads, and rows of cells whose lines are separated by line breaks."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Shown:
    """What a page shows of runs that can be compared; `pictures`: PNG by the ending of the file's name."""

    of: Comparable
    pictures: Mapping[str, bytes]

    @property
    def heading(self) -> str:
        return f"{self.of.metric} on validation data {escaped(self.of.validation)[:12]}"

    @property
    def differs(self) -> Table:
        rows = [[key, *by_letter.values()] for key, by_letter in self.of.differs.items()]
        return Table(["key", *(group.letter for group in self.of.groups)], rows if len(self.of.groups) <= _WIDE else [])

    @property
    def deciding(self) -> str:
        adjusted = " p-values are adjusted for all pairs (Holm), intervals are not." if len(self.of.ranked) > 2 else ""
        return f"Seeds decide where there are two of each at least; p below 0.05 is a difference.{adjusted}"

    def caption(self, name: str) -> str:
        drawn = {"-phases": len(self.of.ranked), "-differences": len(self.of.differences)}
        few = f" The first {MOST_ROWS} of {drawn[name]}." if drawn.get(name, 0) > MOST_ROWS else ""
        return CAPTIONS[name] + few + (f" {' '.join(self._fronts())}" if name == "-cost" else "")

    def _fronts(self) -> Iterator[str]:
        for cost, letters in self.of.fronts.items():
            yield f"By {COSTS[cost]} {', '.join(letters)} {'is' if len(letters) == 1 else 'are'} on the front."


_WIDE = 12  # columns of groups that a table of keys has; of more each group's name tells


def title(runs: Sequence[Run]) -> str:
    return f"Comparison of {len(runs)} run{'s' if len(runs) > 1 else ''}"


def page(sets: Sequence[Shown], runs: Sequence[Run]) -> str:
    """The page; everything that comes from files is escaped."""
    own = [shown.of for shown in sets]
    return render(
        "comparison.html",
        title=title(runs),
        sets=[_content(shown) for shown in sets],
        runs=run_table(sets),
        notes=notes(own),
        methods=methods(own),
    )


def _content(shown: Shown) -> dict[str, Any]:
    return {
        "heading": shown.heading,
        "verdict": verdict(shown.of),
        "groups": Table(*group_table(shown.of)),
        "differs": shown.differs,
        "differences": Table(*difference_table(shown.of)),
        "deciding": shown.deciding,
        "pictures": [{"png": png, "caption": shown.caption(name)} for name, png in shown.pictures.items()],
    }


def run_table(sets: Sequence[Shown]) -> Table:
    """Every run with its group and seed."""
    rows = [
        [group.letter, "-" if run.seed is None else str(run.seed), *cells(run.history, run.name)]
        for shown in sets
        for group in shown.of.groups
        for run in group.runs
    ]
    return Table(["group", "seed", *COLUMNS], rows)


def markdown(sets: Sequence[Shown], runs: Sequence[Run], files: Mapping[tuple[int, str], str]) -> str:
    """What the page tells, for a pull request or a wiki.

    Args:
        files: of the pictures, beside the Markdown file, by place of the set and ending of the name.
    """
    parts = [f"# {title(runs)}"]
    for place, shown in enumerate(sets):
        content = _content(shown)
        parts += [f"## {_plain(shown.heading)}"] if len(sets) > 1 else []
        parts.append(_plain(content["verdict"]))
        parts += [text for name in ("groups", "differs", "differences") if (text := _table(content[name]))]
        parts += [f"![{shown.caption(name)}]({files[place, name]})" for name in shown.pictures]
    parts += ["## Runs", _table(run_table(sets))]
    own = [shown.of for shown in sets]
    for heading, lines in (("To mind", notes(own)), ("Methods", [f"{k}: {v}" for k, v in methods(own).items()])):
        parts += [f"## {heading}", "\n".join(f"- {_plain(line)}" for line in lines)] if lines else []
    return "\n\n".join(parts) + "\n"


def _table(of: Table) -> str:
    if not of.rows:
        return ""
    lines = [of.heads, ["---"] * len(of.heads), *of.rows]
    return "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines)


def _plain(text: str) -> str:
    """Text in which nothing is markup, on one line."""
    said = "".join(f"\\{c}" if c in "\\`*_{}[]<>#|~" else c for c in escaped(text, lines=True))
    return said.replace("\n", "<br>")
