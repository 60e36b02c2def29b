"""What `tlx shards show` prints of targets beside the class: a table for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from tlx.base.terminal import drawn, escaped

if TYPE_CHECKING:
    from rich.table import Table

    from tlx.data.shards.check import SplitCounts
    from tlx.data.shards.target_summary import TargetSummary

    Splits = Mapping[str, TargetSummary | None]

_CLASSES = 20  # rows of a table
_PAIRS = 5
_NAME, _OF_PAIR = 30, 22  # characters


def target_lines(splits: Mapping[str, SplitCounts]) -> Iterator[str]:
    """A table for each target, its values by split."""
    by_split = {split: {t.name: t for t in said.targets} for split, said in splits.items()}
    for name in dict.fromkeys(n for targets in by_split.values() for n in targets):
        of_splits = {split: targets.get(name) for split, targets in by_split.items()}
        yield drawn(_table(name, of_splits))
        yield from _pairs(name, of_splits)


def _table(name: str, splits: Splits) -> Table:
    from rich import box
    from rich.table import Table

    kinds = dict.fromkeys(t.kind for t in splits.values() if t is not None)
    table = Table(f"{escaped(name)} ({', '.join(kinds)})", *splits, box=box.SIMPLE)
    for label, cells in (*_counts(splits), *_columns(splits)):
        table.add_row(label, *cells)
    table.add_row("missing", *("" if t is None else f"{t.missing:,} of {t.samples:,}" for t in splits.values()))
    if any(t is not None and t.kind == "labels" for t in splits.values()):
        table.add_row("labels per sample", *(_cardinality(t) for t in splits.values()))
    return table


def _cardinality(target: TargetSummary | None) -> str:
    return "" if target is None or target.cardinality is None else f"{target.cardinality:.2f}"


def _counts(splits: Splits) -> Iterator[tuple[str, list[str]]]:
    """Classes with the most samples over all splits, in the order of the index."""
    total: dict[str, int] = {}
    for target in splits.values():
        for name, count in target.counts.items() if target else ():
            total[name] = total.get(name, 0) + count
    most = set(sorted(total, key=lambda name: -total[name])[:_CLASSES])
    for name in total:
        if name in most:
            yield _short(name, _NAME), [_count(t, name) for t in splits.values()]
    if len(total) > _CLASSES:
        yield f"... and {len(total) - _CLASSES:,} more", [""] * len(splits)


def _count(target: TargetSummary | None, name: str) -> str:
    if target is None or name not in target.counts:
        return ""
    known = target.known.get(name, target.samples - target.missing)
    unknown = target.samples - target.missing - known
    return f"{target.counts[name]:,}" + (f", {unknown:,} unknown" if unknown > 0 else "")


def _columns(splits: Splits) -> Iterator[tuple[str, list[str]]]:
    """Least, mean and greatest value of each number, and their standard deviation."""
    width = max((len(t.columns) for t in splits.values() if t is not None), default=0)
    for i in range(min(width, _CLASSES)):
        place = f"{i + 1}: " if width > 1 else ""
        yield f"{place}least, mean, most", [_column(t, i) for t in splits.values()]
        yield f"{place}standard deviation", [_std(t, i) for t in splits.values()]
    if width > _CLASSES:
        yield f"... and {width - _CLASSES:,} more", [""] * len(splits)


def _column(target: TargetSummary | None, place: int) -> str:
    if target is None or place >= len(target.columns):
        return ""
    column = target.columns[place]
    return f"{column.least:.4g} {column.mean:.4g} {column.most:.4g}"


def _std(target: TargetSummary | None, place: int) -> str:
    return "" if target is None or place >= len(target.columns) else f"{target.columns[place].std:.4g}"


def _pairs(name: str, splits: Splits) -> Iterator[str]:
    for split, target in splits.items():
        if target is not None and target.pairs:
            yield f"{escaped(name)}, labels that come together in {escaped(split)}:"
            for pair in target.pairs[:_PAIRS]:
                one, other = (_short(label, _OF_PAIR) for label in pair.labels)
                yield f"  {one} and {other}: {pair.samples:,}, {pair.share:.0%} of the rarer"


def _short(name: str, most: int) -> str:
    text = escaped(name)
    return text if len(text) <= most else f"{text[: most - 3]}..."
