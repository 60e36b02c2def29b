"""`tlx lr-find`: which learning rate, by a ramp."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tlx.base.errors import UserError, did_you_mean
from tlx.base.launcher import rank
from tlx.base.terminal import hand_over, remark, say
from tlx.cli.words import ConfigFile, Overrides, Quiet, announce, path

_RULES = ("valley", "steepest", "minimum/10")
_RULE = (
    "Whose suggestion is printed to paste: minimum/10 (a tenth of the rate of the lowest loss), valley (half-way down "
    "the longest fall of the loss; fastai's default), steepest (where it falls fastest; Lightning's)."
)
_OUT = "A new FOLDER for lr-find.png and lr-find.json."
_LEAD_IN = "Steps of each earlier phase before a phase's ramp, or its own where these are fewer; 0 for none."


def lr_find(
    config: ConfigFile,
    overrides: Overrides = None,
    phase: Annotated[str | None, typer.Option(help="Of this phase alone; by default of each.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many, from the configuration's on: how far they differ.")] = 1,
    steps: Annotated[int, typer.Option(min=20, help="Of the ramp.")] = 100,
    low: Annotated[float, typer.Option(help="The rate that it begins with.")] = 1e-7,
    high: Annotated[float, typer.Option(help="The rate that it ends with, unless the loss diverges before.")] = 10.0,
    rule: Annotated[str, typer.Option(help=_RULE)] = "minimum/10",
    lead_in: Annotated[int, typer.Option(min=0, help=_LEAD_IN)] = 100,
    out: Annotated[
        Path | None, typer.Option(help="A new FOLDER for lr-find.png and lr-find.json.", parser=path)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All of it as one JSON object, not a table.")] = False,
    quiet: Quiet = False,
) -> None:
    """Find a learning rate for each phase by a ramp in its own steps (Smith 2017). Nothing of the run is touched.

    Layers keep their ratios; the rate is the head's. Under torchrun, accelerate launch or srun, on all ranks.
    """
    if rule not in _RULES:
        raise UserError(f'there is no rule "{rule}"{did_you_mean(rule, _RULES)}', where="--rule")
    if not 0 < low < high:
        raise UserError("a ramp goes up, from above 0", where=f"--low {low:g} --high {high:g}")
    if out is not None and out.exists():
        raise UserError("it is there already", where=str(out), todo="remove it, or name another one")
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError("there is no such folder", where=str(out.parent), todo="make it, or another --out")
    from tlx.plan import config as configs

    wanted = configs.load(config, overrides or ())
    announce(f"{wanted.backbone.name}: importing torch ...")
    from tlx.base.files import json_text
    from tlx.train.lr_curve import Ramp
    from tlx.train.lr_find import LrFindOptions
    from tlx.train.lr_find import lr_find as find
    from tlx.train.lr_find_text import data, table

    found = find(wanted, LrFindOptions(Ramp(low, high, steps), phase, seeds, lead_in))
    if found is None or rank():
        return
    hand_over(json_text(data(found, rule))) if as_json else say(table(found, rule))
    if out is not None:
        from tlx.train.lr_find_text import write

        write(out, found, rule)
        remark(out)
