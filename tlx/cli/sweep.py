"""`tlx sweep`: many trainings, of which validation chooses the best."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from tlx.base.errors import TlxError, UserError, did_you_mean
from tlx.base.launcher import RESUMABLE, rank, ranked
from tlx.base.terminal import as_courtesy, say
from tlx.cli.help import examples
from tlx.cli.words import Overrides, config_path, path

if TYPE_CHECKING:
    from tlx.sweep.begin import Asked
    from tlx.sweep.spec import Spec
    from tlx.sweep.worker import Meeting

EXAMPLES = examples(
    "tlx sweep c.yaml phases.each.lr=1e-4..1e-2:log backbone.name=timm/resnet18,timm/vgg16 --trials 9",
    "tlx sweep c.yaml data.batch=16..64/16 seed=0,1 --sampler grid",
    "tlx sweep runs/c-sweep",
    "tlx sweep c.yaml phases.each.lr=1e-4..1e-2:log --trials 30 --wandb",
    more="Ranges: a..b, a..b:log, a..b/step; choices: a,b; everything else is set for all trials.",
)
_CONFIG = "A YAML file, see configs/; or a sweep's folder, to go on with it."
_TRIALS = "How many in all, whatever the number of workers; of a grid all by default."
_SEED = "Of what is drawn; the trainings' own is the configuration's."
_SAMPLER = "tpe, random or grid."
_PRUNER = "median, hyperband or none: which trials end early, at evaluations."
_TIME = "This worker stops then, such as 11h30m; its trial is saved, and goes on in the next one."
_OUT = "The sweep's folder; by default the configuration's run, and -sweep."
_WANDB = "Train nothing: write the sweep's YAML for `wandb sweep`."
_DRY = "Check and show all of it, and train nothing."


def sweep(
    config: Annotated[Path, typer.Argument(metavar="CONFIG|SWEEP", help=_CONFIG, parser=config_path)],
    overrides: Overrides = None,
    trials: Annotated[int | None, typer.Option(min=1, help=_TRIALS)] = None,
    seed: Annotated[int | None, typer.Option(min=0, help=_SEED)] = None,
    sampler: Annotated[str | None, typer.Option(help=_SAMPLER)] = None,
    pruner: Annotated[str | None, typer.Option(help=_PRUNER)] = None,
    limit: Annotated[str | None, typer.Option("--time", metavar="TIME", help=_TIME)] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help=_OUT, parser=path)] = None,
    wandb: Annotated[bool, typer.Option("--wandb", help=_WANDB)] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=_DRY)] = False,
) -> None:
    """Train many variations, prune the bad ones, and tell the best by validation data.

    Workers share the work: start the same command again, in any number, here or on other machines.
    """
    as_courtesy()
    from tlx.sweep import begin
    from tlx.sweep.spec import PRUNERS, SAMPLERS

    asked = begin.Asked(
        config, tuple(overrides or ()), out, trials, seed,
        cast(Any, _one_of("--sampler", sampler, SAMPLERS)), cast(Any, _one_of("--pruner", pruner, PRUNERS)),
    )  # fmt: skip
    until = time.time() + _seconds(limit) if limit is not None else None
    if not wandb:
        begin.check_installed()
    if wandb or dry_run:
        _show(asked, wandb=wandb)
        return
    code = _work(asked, until)
    from tlx.cli.main import _leave

    _leave(code)


def _one_of(option: str, word: str | None, choices: tuple[str, ...]) -> str | None:
    if word is not None and word not in choices:
        raise UserError(f'there is no "{word}"{did_you_mean(word, choices)}', where=option)
    return word


def _seconds(limit: str) -> int:
    from tlx.base.durations import seconds

    try:
        return seconds(int(limit) if limit.isdecimal() else limit)
    except ValueError as error:
        raise UserError(str(error), where="--time") from error


def _show(asked: Asked, *, wandb: bool) -> None:
    from tlx.base.files import write_whole
    from tlx.sweep import wandb_yaml
    from tlx.sweep.begin import checked, joined

    spec = joined(asked)
    if spec is None:
        spec, text = checked(asked)
        say(text)
    if wandb:
        spec.write()
        write_whole(spec.folder / wandb_yaml.FILE, wandb_yaml.wandb_yaml(spec))
        say(wandb_yaml.commands(spec))


def _work(asked: Asked, until: float | None) -> int:
    """The exit code."""
    from tlx.base import verdict
    from tlx.sweep.report import report
    from tlx.sweep.study import Study
    from tlx.sweep.worker import Meeting, Stopping, work_alone, work_ranked

    meeting, stopping = Meeting.join() if ranked() else None, Stopping(until)
    spec = _begun(asked) if meeting is None else _begun_together(asked, meeting)
    try:
        if meeting is None:
            ended = work_alone(spec, spec.trials, stopping)
        else:
            ended = work_ranked(spec, spec.trials, stopping, meeting)
    finally:
        if meeting is not None:
            meeting.leave()
        study = Study(spec) if rank() == 0 else None
        if study is not None and any(trial.state != "running" for trial in study.trials()):
            say(report(study))
    verdict.give("done" if ended else "resumable")
    if study is None:
        return 0 if ended else RESUMABLE
    running = [str(t.number) for t in study.trials() if t.state == "running"]
    if not ended:
        say(f"stopped by {stopping.reason}: the same command goes on, or tlx sweep {spec.folder}")
        return RESUMABLE
    if running:
        say(f"still running elsewhere: trial {', '.join(running)}; tlx sweep {spec.folder} takes up what stays")
    elif not any(trial.state == "done" for trial in study.trials()):
        raise TlxError(f"no trial has come to a value; see {spec.folder / 'logs'}")
    return 0


def _begun(asked: Asked) -> Spec:
    """The sweep, written into its folder by whoever comes first."""
    from tlx.sweep.begin import checked, joined
    from tlx.sweep.spec import Spec
    from tlx.sweep.study import turn

    spec = joined(asked)
    if spec is None:
        made, text = checked(asked)
        say(text + "\n")
        try:
            made.folder.mkdir(parents=True, exist_ok=True)
            with turn(made.folder):
                spec = joined(asked)  # another worker may have been quicker
                if spec is None:
                    made.write()
                    spec = made
        except OSError as error:
            todo = "name another folder by --out"
            raise UserError(
                f"cannot be written: {error.strerror or error}", where=str(made.folder), todo=todo
            ) from error
    else:
        from tlx.sweep.space import described

        say("\n".join([f"one more worker of the sweep {spec.folder}, {spec.trials} trials", *described(spec.space)]))
    known = Spec.read(spec.folder)
    if known is not None and known.trials != spec.trials:
        spec.write()
    return spec


def _begun_together(asked: Asked, meeting: Meeting) -> Spec:
    """The same of several ranks: rank 0 looks, for all."""
    from tlx.sweep.spec import Spec

    if meeting.rank:
        spec = Spec.read(Path(meeting.hear("begun")["folder"]))
        assert spec is not None
        return spec
    try:
        spec = _begun(asked)
    except BaseException as error:
        meeting.tell("begun", error=str(error))
        meeting.leave()
        raise
    meeting.tell("begun", folder=str(spec.folder))
    return spec


def sweep_trial(
    folder: Annotated[Path, typer.Argument(parser=path)],
    number: Annotated[int, typer.Argument()],
    until: Annotated[float | None, typer.Option()] = None,
) -> None:
    """One trial of a sweep, in the process that its worker has started for it."""
    as_courtesy()
    from tlx.cli.main import _leave
    from tlx.sweep.spec import Spec
    from tlx.sweep.trial import start_trial

    spec = Spec.read(folder)
    if spec is None:
        raise UserError("no sweep has begun there", where=str(folder))
    result = start_trial(spec, number, until=until, command=True)
    _leave(0 if result is not None else RESUMABLE)
