"""`tlx soup`: one model from the weights of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from tlx.base.errors import UserError
from tlx.base.terminal import hand_over, say
from tlx.cli.predict import Batch, Device, Trusted, Which, Workers, chosen
from tlx.cli.words import Quiet, announce, path, place

_RUNS = "Two or more: run folders, checkpoints, model.safetensors."
_OUT = "The result: a run's folder that is not there yet."
_METHOD = (
    "greedy: the best first, each one if the average does not get worse; uniform: all; wise-ft: between two, the "
    "zero-shot network first, then the one that was fine-tuned from it."
)
_ALPHA = "Of wise-ft: the share of the fine-tuned network, 0 to 1; by default the best of 0, 0.1 ... 1."
_DATA = "Shards or a folder to choose on; by default the validation data that all runs name."
_METRIC = "To choose by; by default what the runs chose their best by."


def soup(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN|FILE...", help=_RUNS, parser=path)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help=_OUT, parser=path)],
    method: Annotated[str, typer.Option(help=_METHOD)] = "greedy",
    data: Annotated[str | None, typer.Option(metavar="SHARDS|FOLDER", help=_DATA, parser=place)] = None,
    metric: Annotated[str | None, typer.Option(help=_METRIC)] = None,
    alpha: Annotated[float | None, typer.Option(help=_ALPHA)] = None,
    weights: Annotated[str | None, typer.Option(help="raw or ema; by default whichever was the best.")] = None,
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamples for the interval; 0 for none.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, not a table.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out pictures that cannot be read.")] = False,
    batch: Batch = None,
    workers: Workers = None,
    which: Which = "best",
    device: Device = None,
    trusted: Trusted = False,
    quiet: Quiet = False,
) -> None:
    """Average the weights of trained models, chosen on validation data, into a run like any other.

    They are of one network, for the same classes, trained from the same weights.
    """
    checkpoint = chosen(which)
    if method not in ("greedy", "uniform", "wise-ft"):
        raise UserError(f'"{method}" is no way to average', where="--method", todo="greedy, uniform or wise-ft")
    if weights not in (None, "raw", "ema"):
        raise UserError(f'"{weights}" are no weights', where="--weights", todo="raw or ema")
    announce(f"{out}: importing torch ...")
    from tlx.ship.soup import Options
    from tlx.ship.soup import soup as averaged
    from tlx.ship.soup_text import table
    from tlx.use.judged_data import Reading

    options = Options(
        cast(Literal["greedy", "uniform", "wise-ft"], method), data, metric, cast(Literal["raw", "ema"] | None,
        weights), bootstrap, Reading(batch, 2 if workers is None else workers, skip_bad=skip_bad), alpha,
    )  # fmt: skip
    found = averaged(runs, out, options, which=checkpoint, device=device, trusted=trusted)
    if as_json:
        from tlx.base.files import json_text

        hand_over(json_text(found))
    else:
        say(table(found))
