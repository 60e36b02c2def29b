"""`tlx embed`: vectors of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tlx.base.errors import UserError, did_you_mean
from tlx.cli.predict import PICTURES, Batch, Device, SkipBad, Trusted, Which, Workers, chosen
from tlx.cli.words import Quiet, announce, path

_OUT = (
    "FILE.parquet, .npy (for a memory map; names in FILE.npy.rows.jsonl), .npz or .csv; written in parts, so that the "
    "same command goes on after a kill."
)
_NETWORK = "A run's folder, a checkpoint, a model.safetensors; or a backbone, such as timm/resnet50."


def embed(
    network: Annotated[str, typer.Argument(metavar="RUN|BACKBONE", help=_NETWORK)],
    pictures: Annotated[list[str], typer.Argument(metavar="PICTURES", help=PICTURES)],
    out: Annotated[Path, typer.Option(help=_OUT, parser=path)],
    layer: Annotated[str | None, typer.Option(help="A module's output; by default what the head takes.")] = None,
    weights: Annotated[str | None, typer.Option(help="Of a backbone: a file, a tag, none; by default its own.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    normalise: Annotated[bool, typer.Option("--normalise", help="Vectors get length 1.")] = False,
    by_folder: Annotated[
        bool, typer.Option("--label-by-folder", help="A file's label is the name of its folder; shards know theirs.")
    ] = False,
    skip_bad: SkipBad = False,
    batch: Batch = None,
    workers: Workers = None,
    which: Which = "best",
    device: Device = None,
    trusted: Trusted = False,
    quiet: Quiet = False,
) -> None:
    """Write a vector for each picture: what the network's head takes, with the picture's name and label.

    Maps and tokens are averaged over their positions. Under torchrun, accelerate launch or srun, ranks share the work.
    """
    checkpoint, known = chosen(which), ("float32", "float16")
    if dtype not in known:
        raise UserError(f'"{dtype}" is none{did_you_mean(dtype, known)}', where="--dtype", todo=" or ".join(known))
    announce(f"{network}: importing torch ...")
    from tlx.use.embed import Options
    from tlx.use.embed import embed as embedded
    from tlx.use.embedder import EmbedderOptions

    kind: Any = dtype
    options = Options(out, kind, normalise, by_folder, batch, workers, skip_bad)
    embedded(network, pictures, options, EmbedderOptions(checkpoint, weights, layer, device, trusted))
