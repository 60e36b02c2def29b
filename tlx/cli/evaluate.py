"""`tlx evaluate`: how good a trained model is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tlx.base.errors import UserError
from tlx.base.launcher import rank
from tlx.base.terminal import hand_over, say
from tlx.cli.predict import Batch, Device, Run, Trusted, Which, Workers, chosen
from tlx.cli.words import Quiet, announce, path, place

_DATA = "Shards, or a folder with a folder per class; by default the run's own validation data."
_OUT = "FILE.csv, .jsonl or .parquet: for each picture its class, the one predicted, all probabilities."


def evaluate(
    run: Run,
    data: Annotated[str | None, typer.Option(metavar="SHARDS|FOLDER", help=_DATA, parser=place)] = None,
    out: Annotated[Path | None, typer.Option(help=_OUT, parser=path)] = None,
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamples for 95 % intervals; 0 for none.")] = 1000,
    tta: Annotated[str | None, typer.Option(metavar="flip", help="Mirrored pictures are asked, too; the mean.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, not a table.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out pictures that cannot be read.")] = False,
    batch: Batch = None,
    workers: Workers = None,
    which: Which = "best",
    device: Device = None,
    trusted: Trusted = False,
    quiet: Quiet = False,
) -> None:
    """Judge a trained model: exact metrics on any number of ranks, with intervals; calibration, confusions.

    Each look is recorded in RUN/evaluations, with its data, time and command.
    """
    checkpoint = chosen(which)
    if tta not in (None, "flip"):
        raise UserError(f'"{tta}" is no way to ask again', where="--tta", todo="--tta flip")
    announce(f"{run}: importing torch ...")
    from tlx.use.evaluate import Options
    from tlx.use.evaluate import evaluate as evaluated
    from tlx.use.evaluation_text import table
    from tlx.use.judged_data import Reading

    reading = Reading(batch, 2 if workers is None else workers, skip_bad=skip_bad, flip=tta is not None)
    options = Options(data, out, bootstrap, reading)
    look = evaluated(run, options, which=checkpoint, device=device, trusted=trusted)
    if look is not None and rank() == 0:
        from tlx.base.files import json_text

        hand_over(json_text(look)) if as_json else say(table(look))
