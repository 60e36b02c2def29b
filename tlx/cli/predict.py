"""`tlx predict`: what a trained model says of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tlx.base.errors import UserError
from tlx.cli.words import Quiet, announce, path

Run = Annotated[
    Path, typer.Argument(metavar="RUN|FILE", help="A run's folder, a checkpoint, a model.safetensors.", parser=path)
]
Batch = Annotated[
    int | None, typer.Option(min=1, help="Pictures at once, always as many; by default as in training's evaluations.")
]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes that decode, on each rank; 2 where it pays.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:1; by default a GPU for each rank.")]
Which = Annotated[str, typer.Option(help="Of a run: its best checkpoint, or the last.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="A picture that cannot be read gets a row with its error.")]
Trusted = Annotated[bool, typer.Option("--trusted", help="A file from elsewhere may name code that is then called.")]

PICTURES = (
    "Files, folders, 'patterns*', @LIST (a path a line), - (the same on standard input), folders or URLs of shards."
)
_OUT = "FILE.csv, .jsonl or .parquet; written in parts, so that the same command goes on after a kill."


def predict(
    run: Run,
    pictures: Annotated[list[str], typer.Argument(metavar="PICTURES", help=PICTURES)],
    out: Annotated[Path | None, typer.Option(help=_OUT, parser=path)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Without --out: a JSON object a line, not CSV.")] = False,
    top: Annotated[int | None, typer.Option(min=1, help="Classes to tell of each picture.")] = None,
    none_below: Annotated[
        float | None, typer.Option(min=0, max=1, help="No label where the probability is below this.")
    ] = None,
    skip_bad: SkipBad = False,
    batch: Batch = None,
    workers: Workers = None,
    which: Which = "best",
    device: Device = None,
    trusted: Trusted = False,
    quiet: Quiet = False,
) -> None:
    """Tell what a trained model says of pictures: a row for each, in their order, as CSV, JSON lines or parquet.

    Sizes, mean and crop are those of training. Under torchrun, accelerate launch or srun, ranks share the work.
    """
    if out is not None and as_json:
        raise UserError("--json is for standard output", todo=f"--out {out.with_suffix('.jsonl')}")
    checkpoint = chosen(which)
    announce(f"{run}: importing torch ...")
    from tlx.use.predict import Options
    from tlx.use.predict import predict as predicted

    options = Options(
        out, "jsonl" if as_json else "csv", batch, workers, skip_bad=skip_bad, top=top, none_below=none_below
    )
    predicted(run, pictures, options, which=checkpoint, device=device, trusted=trusted)


def chosen(which: str) -> Literal["best", "last"]:
    """
    Raises:
        UserError: another word.
    """
    if which == "last":
        return "last"
    if which != "best":
        raise UserError(f'"{which}" is no checkpoint', where="--which", todo="best or last")
    return "best"
