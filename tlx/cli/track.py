"""`tlx track`: what trackers lack of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tlx.base.terminal import as_courtesy, say
from tlx.cli.help import examples
from tlx.cli.words import path

track = typer.Typer(help="Bring trackers up to date with run folders.", no_args_is_help=True, rich_markup_mode=None)


@track.callback()
def _group() -> None:
    """So that `sync` is a command of its own, although it is the only one."""


@track.command(
    epilog=examples(
        "tlx track sync runs/*",
        "tlx track sync runs/a --offline",
        "tlx track sync runs/b --project flowers",
    )
)
def sync(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders.", parser=path)],
    project: Annotated[str | None, typer.Option(help="By default the one that the run has.")] = None,
    entity: Annotated[str | None, typer.Option(help="User or team; by default the one that the run has.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Write a folder to upload elsewhere: wandb sync.")] = False,
) -> None:
    """Send to Weights & Biases what it lacks of these runs, from their metrics.jsonl.

    It asks the server which step it has come to, so that no step is sent twice, and a second call sends nothing.
    """
    from tlx.tracking.sync import sync as synced

    as_courtesy()  # a reader that has enough is no reason to leave runs out
    for run in runs:
        say(synced(run, project=project, entity=entity, offline=offline).text)
