"""What SRC of ``tlx shards build SRC OUT`` may be: a folder per class, a CSV, or a data set of torchvision."""

from __future__ import annotations

import os
from pathlib import Path

from tlx.base.errors import UserError
from tlx.data.build.datasets import read_torchvision
from tlx.data.build.sources import USUAL, Reading, Source, prepare, read_folder
from tlx.data.shards.tables import read_csv


def _refuse_unread(spec: str, reading: Reading) -> None:
    """
    Raises:
        UserError: something is asked for that this kind of source does not have.
    """
    is_folder = Path(spec).is_dir() and not spec.startswith("torchvision:")
    if reading.targets and (is_folder or spec.startswith("torchvision:")):
        raise UserError("targets are columns of a CSV file", where=spec, todo="write one, with a row per picture")
    if reading.nested and not is_folder:
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
    """The source that `spec` names: ``torchvision:NAME``, a ``.csv`` file or a folder.

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
    elif not Path(spec).exists():
        hint = "give a folder, a .csv file, or torchvision:Flowers102 for one of torchvision's data sets"
        raise UserError("there is no such file or folder", where=spec, todo=hint)
    else:
        source = read_folder(Path(spec), reading) if Path(spec).is_dir() else read_csv(Path(spec), reading)
    return prepare(source, val=val, seed=seed, where=spec)
