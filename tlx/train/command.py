"""One start of a training: to its end, to a stop that was asked for, or to a fault; status.json says which."""

from __future__ import annotations

import contextlib
import functools
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlx.base import verdict
from tlx.base.errors import TlxError, UserError
from tlx.base.launcher import ranked, relaunched
from tlx.base.terminal import say
from tlx.plan.config import Config
from tlx.runs.extend import Extend, earlier
from tlx.runs.run_folder import Claim, RunFolder, Start
from tlx.train.build import compose, plans_of, together
from tlx.train.components import backbone_of

if TYPE_CHECKING:
    from tlx.ranks.watch import Watch
    from tlx.runs.processes import Early
    from tlx.train.run import Run


def train(
    config: Config,
    *,
    fresh: bool = False,
    extend: bool = False,
    rest: bool = False,
    command: bool = False,
    early: Early | None = None,
) -> Mapping[str, Any] | None:
    """Trains, resumes, extends, or finds the run done; its result, or None after a stop request.

    Nothing is written into the run folder before the first step can be made; from then on its status.json says how it
    ends. What is said of a start that was refused, `tlx.base.verdict` tells. Any thread may call it; signals ask for a
    stop only where the main thread does.

    Args:
        fresh, extend, rest: see :class:`tlx.runs.run_folder.Start`.
        command: this process is a command's, started for this training alone. Then `stop_after` counts from the start
            of the process, and a training that hangs ends it; else both would hit whoever called.
        early: what this rank has seen and heard since its process was started.
    """
    from tlx.ranks.watch import Watch

    start, began = Start(fresh, extend, rest), time.time()
    folder = RunFolder(config.run)
    patience_s = 60 * config.world.timeout_minutes
    watch = Watch(folder, patience_s=patience_s, ends=command or ranked(), claimed=False, early=early)
    # a launcher that ends all ranks for the fault of one must not end the one that has yet to say whose it was
    with contextlib.ExitStack() as leaving:
        try:
            return _train(config, folder, watch, leaving, start, began=None if command else began)
        except BaseException as error:
            told = watch.explained(error)
            watch.say(_status_of(told), str(told) or type(told).__name__)
            if told is error:
                raise
            raise told from error
        finally:
            watch.close()
            folder.release()


def _status_of(error: BaseException) -> verdict.Status:
    if isinstance(error, UserError):
        return "user-error"
    return "resumable" if isinstance(error, KeyboardInterrupt) else "fault"


def _train(
    config: Config,
    folder: RunFolder,
    watch: Watch,
    leaving: contextlib.ExitStack,
    start: Start,
    *,
    began: float | None,
) -> Mapping[str, Any] | None:
    from tlx.ranks.rendezvous import join_ranks
    from tlx.runs.stop import StopRequest

    world = join_ranks(config, watch)
    leaving.callback(world.leave)
    claim: Claim = together(world, lambda: _look(config, folder, start, world.size) if world.main else None)
    claim = world.from_main(claim)
    config = _with_own_cache(claim.config, config)
    if claim.result is not None:
        if world.main:
            _show_done(config, folder, claim.result)
        return claim.result
    watch.beat("loading")
    stop = StopRequest(
        folder.path,
        launched=world.launched,
        after=config.stop_after,
        began=began,
        is_displaced=folder.is_displaced,
        early=watch.hand_over_signals(),
    )
    leaving.callback(stop.close)
    together(world, lambda: fetch(config) if world.local_main else None)
    run = compose(config, world, folder, stop, anew=claim.aside)
    together(world, lambda: _claim(run, folder, claim) if world.main else None)
    watch.claimed = True
    watch.beat("loading")
    watch.before_exit, watch.asks_to_stop = run.saver.settle, stop.fail
    result = train_and_record(run, folder)
    world.barrier()  # until here a fault of one rank is named by the others
    watch.close()
    stop.close()  # from here on a signal ends the process: there is nothing left to save
    if world.main and result["finished"] and config.track.report:
        draw(folder.path)  # the other ranks do not wait
    return result if result["finished"] else None


def _look(config: Config, folder: RunFolder, start: Start, ranks: int) -> Claim:
    wish = Extend(functools.partial(plans_of, ranks=ranks), rest=start.rest) if start.extends else None
    claim = folder.look(config, fresh=start.fresh and not relaunched(), extend=wish)
    if wish is not None and claim.extension is None:
        is_extended = claim.result is None and bool(earlier(folder.path))
        what = "the run is extended already; going on" if is_extended else "nothing is extended"
        say(f"note: --extend: this is the configuration of the run already; {what}", error=True)
    return claim


def _show_done(config: Config, folder: RunFolder, result: Mapping[str, Any]) -> None:
    """What a start that was killed at the very end had left to do."""
    from tlx.report.report import is_drawn

    folder.settle_done(result)
    if config.track.report and not is_drawn(folder.path):
        draw(folder.path)
    verdict.give("done", step=result["step"])


def _with_own_cache(config: Config, own: Config) -> Config:
    """Rank 0's configuration, with the folder of this machine's cache, which may be another one on each ($TMPDIR)."""
    cache = config.data.cache.model_copy(update={"folder": own.data.cache.folder})
    return config.model_copy(update={"data": config.data.model_copy(update={"cache": cache})})


def _claim(run: Run, folder: RunFolder, claim: Claim) -> None:
    """The first step can be made: from here on the folder is this training's, of the longer run where it is extended.

    Raises:
        UserError: it is of another training, or cannot be written; nothing in it has changed.
    """
    from tlx.train.resume import check_resumable

    if not claim.aside:
        check_resumable(run, claim.extension)
    folder.claim(claim, run.files)
    run.world.watch.claimed = True
    run.journal.console.keep_in(folder.path / "console.txt")
    if not relaunched():  # what was asked before a launcher started the ranks again was not yet heard
        with contextlib.suppress(OSError):
            run.stop.clear_older()
    if claim.extension is not None:
        before, now = claim.extension.steps
        run.journal.note(f"extended at step {claim.extension.step}: the plan had {before} steps and has {now}")


def train_and_record(run: Run, folder: RunFolder) -> Mapping[str, Any]:
    """Trains, and writes how it ended before trackers are waited for: who asked for a stop may not wait long."""
    from tlx.train.loop import fit
    from tlx.train.memory_trial import ran_out
    from tlx.train.micro_batch import out_of_memory
    from tlx.train.result import result_of
    from tlx.train.resume import settle

    world, finished = run.world, False
    try:
        ended = fit(run)
        world.watch.beat("saving")
        settle(run)
        finished = ended
        trouble = _trouble(run, folder)
        world.watch.beat("result")
        result = result_of(run, finished=finished)
        together(world, lambda: conclude(run, folder, result, trouble=trouble) if world.main else None)
        if trouble is not None:
            raise TlxError(f"{trouble}\n  (step {run.progress.step} of {run.plan.steps} is saved)")
    except RuntimeError as error:
        if ran_out(error):
            fault = out_of_memory(run.config, run.plan, world, run.progress.step)
            with contextlib.suppress(OSError):  # by whatever rank it is: the others do not know
                folder.say("user-error" if isinstance(fault, UserError) else "fault", message=str(fault))
            raise fault from error
        if "deterministic" not in str(error):
            raise
        raise UserError(str(error).splitlines()[0], where="loop.deterministic", todo="set it to false") from error
    finally:
        world.watch.beat("finishing")
        result = result_of(run, finished=finished)
        try:
            run.saver.close()
        finally:
            if world.main and result["unreadable"] and not finished:  # their names, however it ended
                with contextlib.suppress(OSError):
                    folder.write_result(result)
            run.journal.finish(result)
    return result


def _trouble(run: Run, folder: RunFolder) -> str | None:
    """Why the training could not go on, in the words of the first rank that knows; the same on every rank."""
    own = run.stop.trouble or (folder.follow() if run.world.main else None)
    return next((why for why in run.world.gather(own) if why), None)


def conclude(run: Run, folder: RunFolder, result: Mapping[str, Any], *, trouble: str | None = None) -> None:
    """The verdict, in the run's folder.

    Args:
        trouble: why the training ends with a fault all the same.

    Raises:
        UserError: it cannot be written.
    """
    step, steps = run.progress.step, run.plan.steps
    why = run.stop.reason or "a signal to another rank"
    if not result["finished"] and trouble is None:
        run.journal.note(f"stopped at step {step} of {steps} ({why}) and saved: the same command goes on from there")
    try:
        run.stop.clear()
        if result["finished"]:
            folder.write_result(result)
            folder.say("done", step=step, steps=steps)
        elif trouble is not None:
            # a batch script must not start again by itself where a folder was taken away: it would begin anew
            folder.say("user-error" if folder.displaced else "fault", step=step, steps=steps, message=trouble)
        else:
            folder.say("resumable", step=step, steps=steps, why=f"stopped by {why}")
    except OSError as error:
        raise UserError(
            f"training has come to step {step} and is saved, but its result cannot be written: {error}",
            where=str(folder.path),
            todo="make room, or mend that; the same command writes it",
        ) from error


def draw(folder: Path) -> None:
    """The report of a training that is done. It is a courtesy: whatever fails here is told, and nothing else."""
    try:
        from tlx.report.report import report_run

        report_run(folder)
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        say(f"warning: no report was drawn ({why})\n  -> tlx report {shlex.quote(str(folder))}", error=True)


def fetch(config: Config) -> None:
    """Brings weights that are not a file into the cache, once per machine, before every rank looks there."""
    from tlx.models.weights.files import location

    if config.backbone.weights != "none" and not location(config.backbone.weights).exists():
        backbone_of(config, 2)
