"""`tlx doctor`: whether a machine, a job and its ranks are fit to train."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tlx.base.errors import UserError
from tlx.base.launcher import environment
from tlx.base.terminal import flush
from tlx.cli.words import Overrides, config_path

if TYPE_CHECKING:
    from tlx.doctor.findings import Section

_CONFIG = "A YAML file: its folders, shards and weights are looked at, too."


def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help=_CONFIG, parser=config_path)] = None,
    overrides: Overrides = None,
    quick: Annotated[bool, typer.Option("--quick", help="No two processes on the loopback.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All findings as one JSON object.")] = False,
    wait: Annotated[float, typer.Option(metavar="SECONDS", min=1, help="For other ranks.")] = 60.0,
) -> None:
    """Look for what would stop or slow a training: on this machine, in this job, between these ranks.

    Every line is ok, a warning or a fault, with the remedy; the exit code is 1 if there is a fault.
    """
    from tlx.doctor import examine
    from tlx.doctor.place import of_environment
    from tlx.doctor.shown import Output
    from tlx.plan import config as configs

    if config is not None and "=" in config.name and not config.exists():
        raise UserError(f'"{config}" changes a configuration, and none is named', todo="tlx doctor CONFIG key=value")
    wanted = configs.load(config, overrides or ()) if config is not None else None
    here = environment()
    output = Output(as_json=as_json, silent=not of_environment(here.variables, here.accelerate).speaks)

    def give_up(last: Section) -> None:
        output.add(last)
        output.end()
        flush()
        os._exit(1)

    for section in examine(wanted, quick=quick, wait_s=wait, give_up=give_up):
        output.add(section)
    output.end()
    raise typer.Exit(int(output.verdict == "fault"))
