"""What SRC of ``tlx shards build SRC OUT`` may be: a folder per class, a CSV, parquet files, a data set of torchvision
or of Hugging Face's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tlx.base.errors import UserError
from tlx.data.build.datasets import read_torchvision
from tlx.data.build.row_tables import HUB, hub_tables, is_parquet, is_saved, parquet_tables, saved_tables
from tlx.data.build.rows import Table, read_tables
from tlx.data.build.sources import USUAL, Reading, Source, prepare, read_folder, read_unlabelled, without_labels
from tlx.data.shards.tables import read_csv


def _refuse_unread(spec: str, reading: Reading) -> None:
    """
    Raises:
        UserError: something is asked for that this kind of source does not have.
    """
    if not reading.labels and (reading.targets or reading.nested):
        what = "--target" if reading.targets else "--nested"
        raise UserError(
            f"{what} says what pictures are, and --no-labels that nothing does", todo="leave one of them out"
        )
    is_table = spec.startswith(HUB) or is_parquet(Path(spec)) or is_saved(Path(spec))
    is_folder = Path(spec).is_dir() and not is_table and not spec.startswith("torchvision:")
    if reading.targets and (is_folder or spec.startswith("torchvision:")):
        raise UserError("targets are columns of a CSV file", where=spec, todo="write one, with a row per picture")
    if reading.nested and not is_folder and (is_table or Path(spec).exists() or spec.startswith("torchvision:")):
        raise UserError("--nested is for folders of pictures", where=spec, todo="leave it out")


def read_source(
    spec: str,
    *,
    val: float | None = None,
    seed: int = 0,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    variant: str | None = None,
    reading: Reading = USUAL,
) -> Source:
    """The source that `spec` names (see `tlx.data.build.specs`), prepared.

    Args:
        val: the share of each class that is split off for validation, where the source has no validation split; 0 for
            a source that shall have none.
        seed: of that split.
        root, download, variant: of a torchvision data set (see `read_torchvision`).
        reading: how a folder or CSV file is read.

    Raises:
        UserError: whatever is wrong with the source: where it is and what to do.
    """
    _refuse_unread(spec, reading)
    if spec.startswith("torchvision:"):
        name = spec.removeprefix("torchvision:")
        source = read_torchvision(name, root=root, download=download, variant=variant)
    elif root or download or variant:
        raise UserError("--root, --download and --variant are for torchvision data sets", where=spec)
    else:
        source = read_plain(spec, reading)
    source = source if reading.labels else without_labels(source)
    return prepare(source, val=val, seed=seed, where=spec)


def read_plain(spec: str, reading: Reading) -> Source:
    """The source that `spec` names, where that is none of torchvision's, as it lies there.

    Raises:
        UserError: what is wrong with it.
    """
    path = Path(spec)
    if not reading.labels:
        reading = replace(reading, label_column="")
    if not spec.startswith(HUB) and not path.exists():
        hint = (
            "give a folder, a .csv or .parquet file, torchvision:Flowers102 for one of torchvision's data sets, "
            "or hf:OWNER/NAME for one of the Hugging Face hub"
        )
        raise UserError("there is no such file or folder", where=spec, todo=hint)
    if spec.startswith(HUB) or is_saved(path) or is_parquet(path):
        tables: Sequence[Table]
        if spec.startswith(HUB):
            tables, version = hub_tables(spec)
        else:
            there = Path(os.path.abspath(path))  # a row has no path of its own by which it would be known elsewhere
            tables, version = saved_tables(there) if is_saved(there) else parquet_tables(there)
        return read_tables(tables, reading, where=spec, version=version)
    if not path.is_dir():
        return read_csv(path, reading)
    return read_folder(path, reading) if reading.labels else read_unlabelled(path, reading)
