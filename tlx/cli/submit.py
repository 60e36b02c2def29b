"""`tlx submit`: a training as a Slurm job."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from tlx.base.terminal import hand_over, say
from tlx.cli.help import examples
from tlx.cli.words import ConfigFile, Overrides, path

EXAMPLES = examples(
    "tlx submit configs/flowers102/resnet50.yaml --nodes 2 --gpus 8 --time 12h",
    "tlx submit c.yaml --gpus 4 --time 1d seed=1 -- --partition=gpu --mail-type=END",
    "tlx submit c.yaml --nodes 2 --gpus 0 --ranks-per-node 4 --dry-run",
    more="What follows -- are options of sbatch: --partition, --account, --qos, --cpus-per-gpu=4 ...",
)
_TIME = "Limit of one start, such as 12h or 1-06:00:00; the job saves a checkpoint before it and goes on."
_SITE = "Defaults of the cluster; else $TLX_SITE, slurm/site.yaml, ~/.config/tlx/site.yaml."


class WithOptionsOfSbatch(TyperCommand):
    """A command line whose words after ``--`` are sbatch's; click would take them for KEY=VALUE."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        own = args[: args.index("--")] if "--" in args else args
        ctx.meta[__name__] = args[len(own) + 1 :]
        return super().parse_args(ctx, own)


def submit(
    context: typer.Context,
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="1, or as many as --gpus needs.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="Of the whole job; 0 for nodes without any.")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="With --gpus 0.")] = None,
    time: Annotated[str | None, typer.Option(help=_TIME)] = None,
    launcher: Annotated[str | None, typer.Option(help="torchrun, accelerate or srun.")] = None,
    site: Annotated[Path | None, typer.Option(help=_SITE, parser=path)] = None,
    stage: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="On the nodes' own disks, such as '$TMPDIR', for shards.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the whole script and submit nothing.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Move an earlier run folder aside and start anew.")] = False,
    extend: Annotated[bool, typer.Option("--extend", help="As for tlx train: go on by a longer plan.")] = False,
    rest: Annotated[bool, typer.Option("--rest", help="As for tlx train.")] = False,
) -> None:
    """Check a training on this machine, then queue it as a Slurm job that requeues itself until it is done."""
    from tlx.runs.run_folder import JOBS, Start
    from tlx.submit.job import SubmitOptions
    from tlx.submit.submission import follow, prepare, send

    asked = SubmitOptions(nodes, gpus, ranks_per_node, time, launcher, stage, _options(context.meta[__name__]))
    start = Start(fresh, extend, rest)
    made = prepare(config, overrides or (), asked, site=site, command=["tlx", *sys.argv[1:]], start=start, dry=dry_run)
    for line in [*made.about, *(f"warning: {warning}" for warning in made.findings.warnings)]:
        say(line)
    job = made.job
    if made.done and job is not None:
        say(f"{job.run} is done: nothing is submitted. tlx status {config} tells the result; --fresh begins anew")
        return
    if job is not None and made.text:
        sent = shlex.join(made.words(job.run / JOBS / "submitted-N.sbatch"))
        say(f"\n# sbatch {sent}" if dry_run else f"\n{made.head}")
        if dry_run:
            hand_over(made.text, end="")
    if dry_run or job is None:
        made.findings.refuse()
    else:
        number, file = send(made)
        say(f"script: {file}\nsubmitted: job {number}\n{follow(number, job.run)}")


def _options(words: Sequence[str]) -> tuple[str, ...]:
    """``--partition gpu`` as ``--partition=gpu``.

    Raises:
        UserError: a word that is no option of sbatch.
    """
    from tlx.base.errors import UserError
    from tlx.submit.site import option

    options: list[str] = []
    for word in words:
        if options and not word.startswith("-") and "=" not in options[-1] + word:
            options[-1] += f"={word}"
        else:
            options.append(word)
    try:
        return tuple(map(option, options))
    except ValueError as error:
        raise UserError(str(error), where="--") from error
