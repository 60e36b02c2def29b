"""`tlx export`: a trained model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from tlx.base.errors import UserError
from tlx.base.terminal import hand_over, say
from tlx.cli.predict import Run, Trusted, Which, chosen
from tlx.cli.words import Quiet, announce, path, place

_TO = "timm, torchvision: weights and load.py; hub: a folder for the Hugging Face Hub; onnx, torch.export, openvino."
_DATA = "Pictures to compare on; by default the run's validation data."
_CALIBRATE = "Pictures, of the run's training shards where these are there, that int8 is calibrated on."
_DROP = "Points of top-1 that int8 may cost, as measured; the upper end of its interval is told."
_LICENCE = "Of the weights, for the card (hub, onnx): apache-2.0 ..."
_PREPROCESS = "Graphs take uint8 pixels and normalise them (onnx, torch.export, openvino)."


def export(
    run: Run,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A file or folder that is not there yet.", parser=path)],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help=_TO)],
    data: Annotated[str | None, typer.Option(metavar="SHARDS|FOLDER", help=_DATA, parser=place)] = None,
    precision: Annotated[str, typer.Option(help="fp32; fp16 (onnx, openvino); int8 (onnx).")] = "fp32",
    preprocess: Annotated[bool, typer.Option("--preprocess", help=_PREPROCESS)] = False,
    calibrate: Annotated[int, typer.Option(min=1, help=_CALIBRATE)] = 128,
    max_drop: Annotated[float, typer.Option(min=0, help=_DROP)] = 1.0,
    license: Annotated[str | None, typer.Option("--license", "--licence", help=_LICENCE)] = None,
    data_license: Annotated[str | None, typer.Option("--data-license", "--data-licence", help="Of the data.")] = None,
    push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Upload the folder to the Hub.")] = None,
    weights: Annotated[str | None, typer.Option(help="raw or ema; by default whichever was the best.")] = None,
    which: Which = "best",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, not text.")] = False,
    trusted: Trusted = False,
    quiet: Quiet = False,
) -> None:
    """Export a trained model, and compare the export with it on real pictures before it gets its name.

    An export that says something else than the model is refused, and nothing is left of it.
    """
    checkpoint = chosen(which)
    if weights not in (None, "raw", "ema"):
        raise UserError(f'"{weights}" are no weights', where="--weights", todo="raw or ema")
    announce(f"{run}: importing torch ...")
    from tlx.ship.card import Licences
    from tlx.ship.export import Options, table
    from tlx.ship.export import export as exported

    options = Options(
        to, data, cast(Literal["raw", "ema"] | None, weights), precision, preprocess, calibrate, max_drop,
        Licences(license, data_license), push,
    )  # fmt: skip
    found = exported(run, out, options, which=checkpoint, trusted=trusted)
    absent = [f"--{name}" for name, of in (("license", license), ("data-license", data_license)) if of is None]
    if to == "hub" and absent:
        say(f"note: the card says of some licences that they were not given: {', '.join(absent)}", error=True)
    if as_json:
        from tlx.base.files import json_text

        hand_over(json_text(found))
    else:
        say(table(found))
