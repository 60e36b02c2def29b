"""`tlx neighbours`: near-duplicates and outliers among pictures, by their vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tlx.base.errors import UserError
from tlx.base.terminal import hand_over, remark, say
from tlx.cli.words import Quiet, path

_OUT = "A new FOLDER for pairs.csv, outliers.csv, neighbours.json and, with --sheet, pairs.png and outliers.png."
_AGAINST = "Vectors of other pictures: which of X are in Y (a test set in a training set), and which are far from all."


def neighbours(
    vectors: Annotated[Path, typer.Argument(metavar="X", help="A file that tlx embed wrote.", parser=path)],
    against: Annotated[Path | None, typer.Option(metavar="Y", help=_AGAINST, parser=path)] = None,
    threshold: Annotated[float, typer.Option(min=-1, max=1, help="The least cosine of near-duplicates.")] = 0.95,
    k: Annotated[int, typer.Option(min=1, help="Outliers: whose distance counts, the k-th neighbour's.")] = 5,
    most: Annotated[int, typer.Option(min=1, help="Rows of each table, and of a sheet.")] = 20,
    out: Annotated[Path | None, typer.Option(help=_OUT, parser=path)] = None,
    sheet: Annotated[bool, typer.Option("--sheet", help="Draw the pictures, where they are here.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All of it as one JSON object, not tables.")] = False,
    quiet: Quiet = False,
) -> None:
    """Find near-duplicates (pairs and groups) and outliers (far from their class). Nothing is deleted."""
    if sheet and out is None:
        raise UserError("--sheet draws into a folder", todo="--out FOLDER")
    if out is not None and out.exists():
        raise UserError("it is there already", where=str(out), todo="remove it, or name another one")
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError("there is no such folder", where=str(out.parent), todo="make it, or another --out")
    from tlx.base.files import json_text
    from tlx.use.neighbours import Search
    from tlx.use.neighbours_text import Told, table
    from tlx.use.vector_file import Embeddings

    base = Embeddings.read(against) if against is not None else None
    search = Search(Embeddings.read(vectors), base, threshold, k)
    said = Told(search, search.run()).data()
    hand_over(json_text(said)) if as_json else say(table(said, most))
    if out is not None:
        from tlx.use.neighbours_folder import write

        write(out, said, most if sheet else 0)
        remark(out)
