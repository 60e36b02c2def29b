"""What a search for neighbours has found, in files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tlx.base.files import json_text, write_whole
from tlx.report.contact_sheet import SheetRow, contact_sheet
from tlx.use.named_pictures import pictures_by_name
from tlx.use.neighbours_text import as_csv
from tlx.use.row_text import written


def write(out: Path, said: Mapping[str, Any], drawn: int) -> None:
    """A new folder.

    Args:
        said: :meth:`tlx.use.neighbours_text.Told.data`.
        drawn: rows of a sheet; 0 for none.

    Raises:
        UserError: the disk.
    """
    pairs, outliers = said["pairs"], said["outliers"]
    with written(out):
        out.mkdir()
        write_whole(out / "pairs.csv", as_csv(pairs, ["cosine", "file_a", "label_a", "file_b", "label_b"]))
        write_whole(out / "outliers.csv", as_csv(outliers, ["distance", "ratio", "file", "label", "neighbours"]))
        write_whole(out / "neighbours.json", json_text(said))
        if drawn and pairs:
            both = [[pair["file_a"], pair["file_b"]] for pair in pairs[:drawn]]
            texts = [f"{pair['cosine']:.4f}" for pair in pairs[:drawn]]
            write_whole(out / "pairs.png", _sheet(both, texts, "near-duplicates, by cosine"))
        if drawn and outliers:
            alone = [[one["file"]] for one in outliers[:drawn]]
            texts = [f"{one['ratio']:.2f} x\n{one['label'] or ''}" for one in outliers[:drawn]]
            write_whole(out / "outliers.png", _sheet(alone, texts, "far from their class"))


def _sheet(names: list[list[str]], texts: list[str], title: str) -> bytes:
    here = pictures_by_name({name for row in names for name in row})
    rows = [SheetRow([(name, here.get(name)) for name in row], text) for row, text in zip(names, texts, strict=True)]
    return contact_sheet(rows, title)
