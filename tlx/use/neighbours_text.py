"""What a search for neighbours has found, for people and for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tlx.base.terminal import drawn, tables, width
from tlx.use.neighbours import Neighbours, Pair, Search, groups_of


@dataclass(frozen=True)
class Told:
    """A search and what it has found."""

    search: Search
    found: Neighbours

    @property
    def across(self) -> bool:
        return self.search.base is not None

    def picture(self, which: int, place: int) -> tuple[str, str | None]:
        """Name and label.

        Args:
            which: 0 of those whose neighbours are searched, 1 of those that are searched.
        """
        one = self.search.base if which and self.search.base is not None else self.search.x
        return one.files[place], one.labels[place]

    def data(self) -> dict[str, Any]:
        """As JSON has it."""
        search, groups = self.search, groups_of(self.found.pairs, across=self.across)
        return {
            "pictures": len(search.x.files),
            "against": len(search.base.files) if search.base is not None else None,
            "left_out": self.found.left_out,
            "threshold": search.threshold,
            "k": search.k,
            "pairs": [self._pair(pair) for pair in self.found.pairs],
            "groups": [[self._of(which, place) for which, place in group] for group in groups],
            "outliers": [
                {**self._of(0, one.place), "distance": one.distance, "ratio": one.ratio, "neighbours": one.others}
                for one in self.found.outliers
            ],
        }

    def _of(self, which: int, place: int) -> dict[str, Any]:
        file, label = self.picture(which, place)
        return {"file": file, "label": label, **({"set": ("own", "against")[which]} if self.across else {})}

    def _pair(self, pair: Pair) -> dict[str, Any]:
        (a, label_a), (b, label_b) = self.picture(0, pair.a), self.picture(int(self.across), pair.b)
        return {"cosine": pair.cosine, "file_a": a, "label_a": label_a, "file_b": b, "label_b": label_b}


def as_csv(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def table(said: dict[str, Any], most: int) -> str:
    """For people: the closest pairs, the farthest pictures.

    Args:
        said: :meth:`Told.data`.
        most: rows of each table.
    """
    pairs, groups, outliers = said["pairs"], said["groups"], said["outliers"]
    odd = sum(len({one["label"] for one in group} - {None}) > 1 for group in groups)
    against = f" against {said['against']:,}" if said["against"] is not None else ""
    left_out = f"; {said['left_out']:,} without a vector are left out" if said["left_out"] else ""
    lines = [f"{said['pictures']:,} pictures{against}{left_out}"]
    lines += [
        f"near-duplicates, cosine at least {said['threshold']:g}: {len(pairs):,} pairs in {len(groups):,} groups"
        + (f", {odd:,} of them with different labels" if odd else "")
    ]
    if pairs:
        columns = {"cosine": [f"{pair['cosine']:.4f}" for pair in pairs[:most]]}
        columns |= {name: [_with_label(pair, name) for pair in pairs[:most]] for name in ("a", "b")}
        lines += [_drawn("", columns), *_more(len(pairs), most)]
    if outliers:
        shown, k = outliers[:most], said["k"]
        whose = "its class" if any(one["label"] is not None for one in outliers) else "all"
        columns = {
            "distance": [f"{one['distance']:.3f}" for one in shown],
            "times the median": [f"{one['ratio']:.2f}" for one in shown],
            "file": [one["file"] for one in shown],
            "label": [one["label"] or "-" for one in shown],
            "neighbours": [one["neighbours"] or "-" for one in shown],
        }
        lines += [f"farthest from their {k}-th neighbour of {whose} (1 - cosine)", _drawn("", columns)]
        lines += _more(len(outliers), most)
    return "\n".join(lines)


def _drawn(title: str, columns: dict[str, list[str]]) -> str:
    return drawn(*tables(title, {}, columns, 10_000, more=""), columns=max(width(), 100))


def _more(count: int, most: int) -> Iterable[str]:
    return [f"... and {count - most:,} more: --out FOLDER, --json, --most"] if count > most else []


def _with_label(pair: dict[str, Any], which: str) -> str:
    label = pair[f"label_{which}"]
    return f"{pair[f'file_{which}']}" + (f" ({label})" if label is not None else "")
