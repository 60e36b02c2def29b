"""The table of every backbone: what the program makes of each network of torchvision and timm.

    python tests/backbones.py            # writes tests/backbones.csv anew, some minutes on two cores
    python tests/backbones.py resnet     # prints the rows of names that contain the word
    python tests/backbones.py --names    # writes the lists of names in tlx/models/libraries/ for the installed versions

The table is a regression test: with a new torchvision or timm it shows what changed. Nothing reads it but tests.
"""

from __future__ import annotations

import csv
import hashlib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

TABLE = Path(__file__).with_name("backbones.csv")
COLUMNS = ("name", "stages", "blocks", "modules", "depths", "head", "auxiliary", "features", "parameters")
COLUMNS += ("input", "layers", "refused")


def names() -> list[str]:
    from tlx.models.libraries import from_timm, from_torchvision

    return [f"torchvision/{n}" for n in from_torchvision.names()] + [f"timm/{n}" for n in from_timm.names()]


def row(name: str) -> dict[str, str]:
    """What the program computes for one network; `layers` is a hash of every parameter's layer at each granularity."""
    import torch

    from tlx import models
    from tlx.base.errors import UserError

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    empty = dict.fromkeys(COLUMNS, "")
    try:
        found = models.describe(name, measured=False)
    except UserError as error:
        return empty | {"name": name, "refused": error.what}
    except Exception as error:  # the table shows it, and the test fails
        return empty | {"name": name, "refused": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    about, layers = found.row, found.layers
    assert about.input is not None
    placed = "\n".join(f"{y.depth} {y.name} {p.name}" for m in layers.values() for y in m for p in y.parameters)
    return {
        "name": name,
        **{f"{granularity}s": str(len(m)) for granularity, m in layers.items()},
        "depths": str(layers["block"].depths),
        "head": about.head or "",
        "auxiliary": " ".join(about.auxiliary),
        "features": str(about.features),
        "parameters": str(about.parameters),
        "input": "x".join(map(str, about.input.size)),
        "layers": hashlib.sha256(placed.encode()).hexdigest()[:12],
        "refused": "",
    }


def rows(wanted: Iterable[str], *, processes: int | None = None) -> Iterator[dict[str, str]]:
    """Rows in order; on all cores, unless `processes` says otherwise."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(processes or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield from pool.map(row, wanted, chunksize=4)


def stored() -> dict[str, dict[str, str]]:
    with TABLE.open(newline="") as file:
        return {line["name"]: line for line in csv.DictReader(file)}


def write_names() -> None:
    from tlx.models.libraries import names as lists

    for library in lists.LIBRARIES:
        lines = [" ".join([name, *tags]) for name, tags in lists.imported(library).items()]
        lists.list_of(library).write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(word: str = "") -> None:
    if word == "--names":
        write_names()
        return
    wanted = [name for name in names() if word in name]
    if word:
        for line in rows(wanted):
            print(",".join(line.values()))
        return
    with TABLE.with_suffix(".new").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for line in rows(wanted):
            writer.writerow(line)
            file.flush()
    TABLE.with_suffix(".new").replace(TABLE)


if __name__ == "__main__":
    main(*sys.argv[1:])
