"""`tlx submit`: a training as a Slurm job."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from tlx.base.terminal import hand_over, say
from tlx.cli.words import ConfigFile, Overrides, path

EXAMPLES = (
    "Examples: tlx submit configs/flowers102/resnet50.yaml --nodes 2 --gpus 8 --time 12h; "
    'tlx submit c.yaml --gpus 4 --time 1d seed=1 --option "--mail-type=END"; '
    "tlx submit c.yaml --nodes 2 --gpus 0 --ranks-per-node 4 --dry-run"
)
_TIME = "Limit of one start, such as 12h or 1-06:00:00; the job saves a checkpoint before it and goes on."


def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="1, or as many as --gpus needs.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="Of the whole job; 0 for nodes without any.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="In place of --gpus.")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="With --gpus 0.")] = None,
    cpus_per_gpu: Annotated[int | None, typer.Option(min=1, help="Or, with --gpus 0, per rank.")] = None,
    time: Annotated[str | None, typer.Option(help=_TIME)] = None,
    launcher: Annotated[str | None, typer.Option(help="torchrun, accelerate or srun.")] = None,
    partition: Annotated[str | None, typer.Option(help="As sbatch has it.")] = None,
    account: Annotated[str | None, typer.Option(help="As sbatch has it.")] = None,
    qos: Annotated[str | None, typer.Option(help="As sbatch has it.")] = None,
    constraint: Annotated[str | None, typer.Option(help="As sbatch has it.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the job; by default that of the run's folder.")] = None,
    site: Annotated[
        Path | None,
        typer.Option(
            help="Defaults of the cluster; else $TLX_SITE, slurm/site.yaml, ~/.config/tlx/site.yaml.", parser=path
        ),
    ] = None,
    stage: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="On the nodes' own disks, such as '$TMPDIR', for shards.")
    ] = None,
    warn: Annotated[int, typer.Option(min=1, help="Seconds before the limit, for the checkpoint.")] = 180,
    option: Annotated[list[str] | None, typer.Option(help='Any of sbatch: "--mail-type=END". Repeatable.')] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the whole script and submit nothing.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Move an earlier run folder aside and start anew.")] = False,
    extend: Annotated[bool, typer.Option("--extend", help="As for tlx train: go on by a longer plan.")] = False,
    rest: Annotated[bool, typer.Option("--rest", help="As for tlx train.")] = False,
) -> None:
    """Check a training on this machine, then queue it as a Slurm job that requeues itself until it is done."""
    from tlx.base.errors import UserError, did_you_mean
    from tlx.runs.run_folder import JOBS, Start
    from tlx.submit import site as sites
    from tlx.submit.job import Wish
    from tlx.submit.submission import follow, prepare, send

    if launcher not in (None, "torchrun", "accelerate", "srun"):
        near = did_you_mean(launcher, ("torchrun", "accelerate", "srun"))
        raise UserError(f'there is no launcher "{launcher}"{near}', where="--launcher")
    for said in option or ():
        try:
            sites.option(said)
        except ValueError as error:
            raise UserError(str(error), where="--option") from error
    wish = Wish(
        nodes=nodes,
        gpus=gpus,
        gpus_per_node=gpus_per_node,
        ranks_per_node=ranks_per_node,
        cpus_per_gpu=cpus_per_gpu,
        time=time,
        launcher=launcher,  # type: ignore[arg-type]  # looked at above
        partition=partition,
        account=account,
        qos=qos,
        constraint=constraint,
        name=name,
        stage=stage,
        warn=warn,
        options=tuple(option or ()),
    )
    start = Start(fresh, extend, rest)
    made = prepare(config, overrides or (), wish, site=site, command=["tlx", *sys.argv[1:]], start=start, dry=dry_run)
    for line in [*made.about, *(f"warning: {warning}" for warning in made.findings.warnings)]:
        say(line)
    if made.job is not None and made.text and not made.done:
        if dry_run:
            sent = shlex.join(made.words(made.job.run / JOBS / "submitted-N.sbatch"))
            say(f"\n# sbatch {sent}")
            hand_over(made.text, end="")
        else:
            say(f"\n{made.head}")
    if made.done and made.job is not None:
        say(f"{made.job.run} is done: nothing is submitted. tlx status {config} tells the result; --fresh begins anew")
    elif dry_run:
        made.findings.refuse()
    elif made.job is not None:
        number, file = send(made)
        say(f"script: {file}\nsubmitted: job {number}\n{follow(number, made.job.run)}")
    else:
        made.findings.refuse()
