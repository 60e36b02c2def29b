"""A start of a training, from top to bottom: read the configuration, join the ranks, look at the run folder, build and
plan, claim the folder, train, record how it ended (`status.json`, and :mod:`tlx.base.verdict`)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlx.base import verdict
from tlx.base.errors import TlxError, UserError
from tlx.base.files import json_text, write_whole
from tlx.base.invocation import commit
from tlx.base.launcher import rank, ranked, relaunched
from tlx.base.location import is_remote, shown
from tlx.base.terminal import remark, say
from tlx.data.stream.order import ORDER_VERSION
from tlx.plan.comparable import comparable
from tlx.plan.config import Config, load, plain
from tlx.plan.parts import Part
from tlx.plan.saved_config import essential
from tlx.plan.timetable import timetable
from tlx.ranks.together import by_main, together
from tlx.runs.extend import Extend, earlier, kept_for_good
from tlx.runs.run_files import mapping
from tlx.runs.run_folder import Claim, RunFolder, Start
from tlx.tasks import outputs_of, scale_of, views_of
from tlx.train.build import checked_plan, header, normalisation, plan_of, plans_of
from tlx.train.components import (
    backbone_of,
    output_check,
    parts_of,
    refuse_parts,
    seed_all,
    task_of,
    tracker_of,
    trial_of,
    try_network,
    unknown_outputs,
)
from tlx.train.data import Datasets, Samples, evaluation_view, open_sets, stream_of, warnings_of
from tlx.train.result import headline_of
from tlx.train.verification import FILE as SHARDS
from tlx.train.verification import record_of, verify
from tlx.use.description import FILE as MODEL

if TYPE_CHECKING:
    from tlx.base.inputs import InputSpec
    from tlx.data.shards.manifest import Manifest
    from tlx.models import Backbone
    from tlx.plan.plan import Plan
    from tlx.ranks.collectives import World
    from tlx.ranks.watch import Watch
    from tlx.runs.checkpoint import Saver
    from tlx.runs.processes import Early
    from tlx.runs.stop import Judge, StopRequest
    from tlx.tasks import Task
    from tlx.tracking.journal import Journal
    from tlx.train.evaluation import Validation
    from tlx.train.feature_probe import FeatureProbe
    from tlx.train.run import Run
    from tlx.train.step import Updater
    from tlx.use.description import ModelDescription


def train(
    config: Config | str | Path,
    overrides: Sequence[str] = (),
    *,
    fresh: bool = False,
    extend: bool = False,
    rest: bool = False,
    command: bool = False,
    early: Early | None = None,
    judge: Judge | None = None,
) -> Mapping[str, object] | None:
    """Trains, resumes, extends, or finds the run done.

    Nothing is written into the run folder before the first step can be made; from then on its status.json says how it
    ends. Any thread may call it; signals ask for a stop only where the main thread does.

    Args:
        config: a configuration, or its YAML file.
        overrides: of a file: ``["seed=1", "run=runs/other"]``.
        fresh, extend, rest: see :class:`tlx.runs.run_folder.Start`.
        command: this process is a command's, started for this training alone. Then `stop_after` counts from the start
            of the process, and a training that hangs ends it; else both would hit whoever called.
        early: what this rank has seen and heard since its process was started.
        judge: hears of each evaluation on rank 0, and may end the training there as pruned.

    Returns:
        What `result.json` holds, or would of a training that was `pruned`; None after a stop request, with everything
        saved.

    Raises:
        ConfigError: mistakes in the configuration, all of them.
        UserError: a start that cannot be: data, weights, devices, a folder of another training.
        TlxError: a training that could not go on.
    """
    from tlx.ranks.watch import Watch

    began = None if command else time.time()
    if not isinstance(config, Config):
        config = load(config, overrides)
    start, folder = Start(fresh, extend, rest), RunFolder(config.run)
    patience_s = 60 * config.world.timeout_minutes
    watch = Watch(folder, patience_s=patience_s, ends=command or ranked(), claimed=False, early=early)
    # a launcher that ends all ranks for the fault of one must not end the one that has yet to say whose it was
    with contextlib.ExitStack() as leaving:
        try:
            return _start(config, folder, watch, leaving, start, began=began, judge=judge)
        except BaseException as error:
            told = watch.explained(error)
            watch.say(_status_of(told), str(told) or type(told).__name__)
            if told is error:
                raise
            raise told from error
        finally:
            watch.close()
            folder.release()


def _start(
    config: Config,
    folder: RunFolder,
    watch: Watch,
    leaving: contextlib.ExitStack,
    start: Start,
    *,
    began: float | None,
    judge: Judge | None,
) -> Mapping[str, Any] | None:
    """Everything that a start does, in order; the same result on every rank."""
    from tlx.ranks.rendezvous import join_ranks
    from tlx.runs.stop import StopRequest

    # join the ranks
    world = join_ranks(config, watch)
    leaving.callback(world.leave)

    # look at the run folder: rank 0 does, and trains by its configuration
    claim = by_main(world, lambda: _look(config, folder, start, world.size))
    # but with the cache folder of this machine, which may be another one on each ($TMPDIR)
    cache = claim.config.data.cache.model_copy(update={"folder": config.data.cache.folder})
    config = claim.config.model_copy(update={"data": claim.config.data.model_copy(update={"cache": cache})})
    if claim.result is not None:
        if world.main:
            _show_done(config, folder, claim.result)
        return claim.result

    # build every part, and plan
    watch.beat("loading")
    stop = StopRequest(
        folder.path,
        launched=world.launched,
        after=config.stop_after,
        began=began,
        is_displaced=folder.is_displaced,
        early=watch.hand_over_signals(),
        judge=judge,
    )
    leaving.callback(stop.close)
    together(world, lambda: fetch(config) if world.local_main else None)
    run = compose(config, world, folder, stop, anew=claim.aside)

    # the first step can be made: claim the folder
    by_main(world, lambda: _claim(run, folder, claim))
    watch.claim()
    watch.beat("loading")
    watch.before_exit, watch.asks_to_stop = run.saver.settle, stop.fail

    # train, and record how it ended
    result = train_and_record(run, folder)
    world.barrier()  # until here a fault of one rank is named by the others
    watch.close()
    stop.close()  # from here on a signal ends the process: there is nothing left to save
    if world.main and result["finished"] and config.track.report:
        draw(folder.path)  # the other ranks do not wait
    return result if result["finished"] or result.get("pruned") else None


def _status_of(error: BaseException) -> verdict.Status:
    if isinstance(error, UserError):
        return "user-error"
    return "resumable" if isinstance(error, KeyboardInterrupt) else "fault"


def _look(config: Config, folder: RunFolder, start: Start, ranks: int) -> Claim:
    wish = Extend(functools.partial(plans_of, ranks=ranks), rest=start.rest) if start.extends else None
    claim = folder.look(config, fresh=start.fresh and not relaunched(), extend=wish)
    if wish is not None and claim.extension is None:
        is_extended = claim.result is None and bool(earlier(folder.path))
        what = "the run is extended already; going on" if is_extended else "nothing is extended"
        remark(f"note: --extend: this is the configuration of the run already; {what}")
    return claim


def _show_done(config: Config, folder: RunFolder, result: Mapping[str, Any]) -> None:
    """What a start that was killed at the very end had left to do."""
    from tlx.report.report import is_drawn

    folder.settle_done(result)
    if config.track.report and not is_drawn(folder.path):
        draw(folder.path)
    verdict.give("done", step=result["step"])
    judged = mapping(result.get("test")).get("data")
    if config.data.test is not None and (judged is None or not _is_same(config.data.test, judged)):
        from tlx.train.test_set import later

        todo = later(folder.path, shown(config.data.test))
        say(f"note: the training has not judged data.test, and is done\n  -> {todo}", error=True)


def _is_same(location: str, told: str) -> bool:
    """Whether data are those that a result tells of, however a folder is typed."""
    return shown(location) == told or (not is_remote(location) and os.path.realpath(location) == os.path.realpath(told))


def fetch(config: Config) -> None:
    """Brings weights that are not a file into the cache, once per machine, before every rank looks there."""
    from tlx.models.weights.files import location

    if config.backbone.weights != "none" and not location(config.backbone.weights).exists():
        # a projection has the width of class vectors, which are not known yet
        head = Part(name="linear") if config.keeps_projection else config.head
        backbone_of(config.model_copy(update={"head": head}), unknown_outputs(config))


def compose(
    config: Config,
    world: World,
    folder: RunFolder,
    stop: StopRequest | None = None,
    *,
    silent: bool = False,
    anew: bool = False,
) -> Run:
    """Builds every part of a training, every rank at once. Nothing is written into the folder.

    Args:
        stop: requests to stop, listened to from an earlier time on; by default from now on.
        silent: nothing is shown on the console.
        anew: what the folder holds now is another training's.

    Raises:
        UserError: what any rank finds, on all of them.
    """
    from tlx.ranks.same_inputs import check_parts
    from tlx.runs.stop import StopRequest
    from tlx.train.feature_probe import probe_of
    from tlx.train.micro_batch import FILE as MEMORY
    from tlx.train.micro_batch import Share, choose
    from tlx.train.run import Run

    # the data; every plan warns of what rank 0 has seen in them
    sets = together(world, lambda: open_sets(config))
    sets = dataclasses.replace(sets, warnings=by_main(world, lambda: warnings_of(sets)))
    samples, earlier_start = sets.samples, None if anew else folder.path
    verified = verify(config.data.verify, earlier_start, world, sets.manifests)

    # the network, what updates it, and the plan; whether they suit each other
    backbone, updater, plan, view = together(world, lambda: _build(config, world, samples))
    warning = check_parts(world, backbone.module, sets.manifests)

    # how many samples a rank takes at once
    share = Share.of(config, plan, ranks=world.size)
    trial = functools.partial(trial_of, config, backbone, updater, plan, ranks=world.size)
    choice = choose(config, plan, share, trial, world, earlier_start)

    files = {SHARDS: record_of(verified)} | ({MEMORY: choice.record} if choice.record else {})

    # what the loop works on
    def assemble(config: Config) -> Run:
        spec = config.input.over(backbone.input)
        remake = functools.partial(plan_of, config, backbone, samples, world.size)
        try:
            plan = remake({})
            refuse_parts(config, updater.task, samples, world.size)
            stream = stream_of(config, sets.train, spec, world, updater.task, view)
        except UserError as error:  # of a smaller micro-batch, which BatchNorm may not bear, or that splits an episode
            what = f"{choice.said}; {error.what}" if choice.said else error.what
            raise UserError(what, where=error.where, todo=error.todo) from error
        shown = headline_of(config, updater.task)
        journal = journal_of(config, world, folder, plan.steps, silent=silent, shown=shown)
        run = Run(
            config=config,
            world=world,
            net=backbone.module,
            remake_plan=remake,
            updater=updater,
            stream=stream,
            validation=validation_of(config, sets.val, spec, updater, probe_of(config, sets, spec, backbone, world)),
            identity=identity_of(config, sets, spec, updater.task),
            description=description_of(config, sets, spec, backbone, updater.task),
            saver=saver_of(config, folder, plan, journal),
            journal=journal,
            stop=stop or StopRequest(folder.path, launched=world.launched, after=config.stop_after),
            files=files | {"plan.json": json_text(plan.data())},
            sets=sets,
        )
        said = [str(backbone.loaded) if backbone.loaded else None, *normalisation(config, backbone), samples.note]
        said.append(getattr(updater.task, "about_vectors", None))
        lines = [header(config, updater.task), timetable(plan), *said, choice.said]
        journal.console.plan("\n".join(line for line in lines if line))
        return run

    run = together(world, lambda: assemble(choice.over(config)))
    for note in (*verified.notes, *([warning] if warning is not None else [])):
        run.journal.note(note)
    return run


def _build(config: Config, world: World, samples: Samples) -> tuple[Backbone, Updater, Plan, Any]:
    """The network, what updates it, the plan, and the view of a training picture."""
    from tlx.train.dry_run import DryRun

    seed_all(config)
    task = task_of(config, samples)
    backbone, updater = parts_of(config, world, task, task.outputs)
    plan, view = checked_plan(config, backbone, samples, task, world.size)
    assert plan is not None
    check, outputs = output_check(config, task), outputs_of(task).count
    try_network(DryRun(backbone, plan, config.input.over(backbone.input), outputs, check), world.device)
    return backbone, updater, plan, view


def validation_of(
    config: Config, shards: Manifest | None, spec: InputSpec, updater: Updater, probe: FeatureProbe | None = None
) -> Validation | None:
    """What an evaluation takes; None without validation shards."""
    from tlx.data.stream.stream import evaluation_batches
    from tlx.train.evaluation import Validation

    if shards is None:
        return None
    world = updater.world
    batches = functools.partial(
        evaluation_batches,
        shards,
        batch=config.evaluate.samples,
        transform=evaluation_view(config, updater.task, spec),
        channels=config.input.channels,
        rank=world.rank,
        world=world.size,
        workers=config.data.workers,
        skip_bad=True,
        upright=config.data.exif_orientation,
        pin=world.cuda,
        targets=tuple(updater.task.targets),
        views=views_of(updater.task),
    )
    return Validation(
        batches=batches,
        manifest=shards,
        batch=config.evaluate.samples,
        where=shown(config.data.val or ""),
        task=updater.task,
        normalise=updater.normalise,
        world=world,
        probe=probe,
    )


def identity_of(config: Config, sets: Datasets, spec: InputSpec, task: Task) -> dict[str, Any]:
    """What a checkpoint must agree with, and what a reader of its weights must know."""
    classes = list(sets.train.classes)
    return {
        "backbone": config.backbone.name,
        "classes": classes,
        **({"outputs": list(task.outputs)} if list(task.outputs) != classes else {}),
        **({"scale": scale} if (scale := scale_of(task)) else {}),
        "input": {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(spec).items()},
        "order_version": ORDER_VERSION,
        "train_shards": sets.train.digest,
        "val_shards": sets.val.digest if sets.val is not None else None,
        "train_content": sets.train.content,
        "val_content": sets.val.content if sets.val is not None else None,
        "config": essential(plain(config)),
    }


def description_of(config: Config, sets: Datasets, spec: InputSpec, backbone: Backbone, task: Task) -> ModelDescription:
    """What is trained, for whoever uses its weights."""
    from tlx import __version__
    from tlx.use.description import ModelDescription

    def part(part: Part) -> dict[str, Any]:
        return {"name": part.name, **part.args}

    plain_config = plain(config)
    return ModelDescription(
        backbone={"name": config.backbone.name, "args": plain_config["backbone"]["args"]},
        head={"name": config.head.name, **config.head_args},
        task={"name": config.task.name, **getattr(task, "described", config.task.args)},
        objective=part(config.objective),
        targets=sets.samples.targets,
        samples=sets.samples.train,
        top_k=config.evaluate.top_k,
        outputs=task.outputs,
        input=spec,
        batch=config.evaluate.samples,
        upright=config.data.exif_orientation,
        provenance={
            "run": Path(config.run).name,
            "weights": plain_config["backbone"]["weights"],
            "loaded": str(backbone.loaded) if backbone.loaded else None,
            "train_shards": sets.train.digest,
            "train_content": sets.train.content,
            "val_shards": sets.val.digest if sets.val is not None else None,
            "seed": config.seed,
            "tlx": __version__,
            "commit": commit() if rank() == 0 else None,
        },
    )


def saver_of(config: Config, folder: RunFolder, plan: Plan, journal: Journal) -> Saver:
    """Writes checkpoints after the metrics that they count, and only while the folder is this training's."""
    from tlx.runs.checkpoint import Checkpoints, Saver

    def place() -> Path:
        if folder.follow() is not None:
            with contextlib.suppress(OSError):  # a row that comes, or a checkpoint, tries once more
                journal.follow(folder.metrics)
        elif folder.lock is not None:
            folder.lock.check()
        return folder.checkpoints

    kept = config.checkpoint.keep
    every = plan.interval(kept.every) if kept.every else 0
    before = functools.cache(lambda: kept_for_good(folder.path))  # an extension is written after this
    checkpoints = Checkpoints(folder.checkpoints, keep=kept.last, every=every, earlier=before)
    return Saver(checkpoints, place, journal.sync, journal.note, background=config.checkpoint.background)


def journal_of(
    config: Config,
    world: World,
    folder: RunFolder,
    steps: int,
    *,
    silent: bool = False,
    shown: Sequence[str] | None = None,
) -> Journal:
    """Where rank 0 tells what happens: metrics.jsonl, trackers, console.

    Args:
        shown: metrics on the console; None for all.
    """
    from tlx.base.console import Console
    from tlx.runs.metrics_file import MetricsFile
    from tlx.tracking import RunInfo, guarded
    from tlx.tracking.journal import Journal

    def trackers(resumed: bool) -> list[Any]:
        said = comparable(plain(config))
        about = RunInfo(folder.path, name=folder.path.name, run_id=folder.id, config=said, resumed=resumed)
        return [guarded(t.name, functools.partial(tracker_of, t, about)) for t in config.track.trackers]

    console = Console(steps, world.main and not silent, metrics=shown)
    metrics = MetricsFile(folder.metrics, console.note, folder.is_displaced)
    return Journal(metrics if world.main else None, console, trackers)


def _claim(run: Run, folder: RunFolder, claim: Claim) -> None:
    """From here on the folder is this training's, of the longer run where it is extended.

    Raises:
        UserError: it is of another training, or cannot be written; nothing in it has changed.
    """
    from tlx.train.resume import check_resumable

    if not claim.aside:
        check_resumable(run, claim.extension)
    folder.claim(claim, run.files)
    run.world.watch.claim()
    run.journal.console.keep_in(folder.path / "console.txt")
    run.journal.console.log_to(folder.path / "log.txt", folder.is_displaced)
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
    from tlx.train.run import settle
    from tlx.train.test_set import judge_test

    world, finished, pruned = run.world, False, None
    try:
        ended = fit(run)
        world.watch.beat("saving")
        settle(run)
        # why it could not go on, in the words of the first rank that knows; the same on every rank
        own = run.stop.trouble or (folder.follow() if world.main else None)
        trouble = next((why for why in world.gather(own) if why), None)
        finished = ended and (trouble is not None or judge_test(run, folder.path))
        world.watch.beat("result")
        pruned = None if ended else world.from_main(_why_pruned(run) if world.main else None)
        result = result_of(run, finished=finished, pruned=pruned)
        by_main(world, lambda: conclude(run, folder, result, trouble=trouble))
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
        result = result_of(run, finished=finished, pruned=pruned)
        try:
            run.saver.close()
        finally:
            if world.main and result["unreadable"] and not finished:  # their names, however it ended
                with contextlib.suppress(OSError):
                    folder.write_result(result)
            run.journal.finish(result)
    return result


def _why_pruned(run: Run) -> str | None:
    """Why whoever chooses among trainings wanted no more of this one. W&B sends a signal, and says so if asked."""
    if run.stop.pruned is None and run.stop.reason in ("SIGTERM", "SIGINT"):
        return run.journal.pruned()
    return run.stop.pruned


def conclude(run: Run, folder: RunFolder, result: Mapping[str, Any], *, trouble: str | None = None) -> None:
    """Writes how the training ended into the run's folder.

    Args:
        trouble: why it ends with a fault all the same.

    Raises:
        UserError: it cannot be written.
    """
    step, steps = run.progress.step, run.plan.steps
    why, pruned = run.stop.reason or "a signal to another rank", result.get("pruned")
    if pruned is not None and trouble is None:
        run.journal.note(
            f"pruned at step {step} of {steps} ({pruned}) and saved: the same command would go on from there"
        )
    elif not result["finished"] and trouble is None:
        run.journal.note(f"stopped at step {step} of {steps} ({why}) and saved: the same command goes on from there")
    try:
        run.stop.clear()
        if result["finished"]:
            write_whole(folder.path / MODEL, json_text(described(run, result).data()))
            folder.write_result(result)
            folder.say("done", step=step, steps=steps)
        elif trouble is not None:
            # a batch script must not start again by itself where a folder was taken away: it would begin anew
            folder.say("user-error" if folder.displaced else "fault", step=step, steps=steps, message=trouble)
        elif pruned is not None:
            folder.say("pruned", step=step, steps=steps, why=pruned)
        else:
            folder.say("resumable", step=step, steps=steps, why=f"stopped by {why}")
    except OSError as error:
        raise UserError(
            f"training has come to step {step} and is saved, but its result cannot be written: {error}",
            where=str(folder.path),
            todo="make room, or mend that; the same command writes it",
        ) from error


def described(run: Run, result: Mapping[str, Any]) -> ModelDescription:
    """The run's model, with the evaluation that chose it, and that of data.test."""
    best = result["best"] or {}
    phase = (result["phases"].get(best.get("phase")) or {}).get("best") or {}
    row = phase if phase.get("step") == best.get("step") else {best["metric"]: best["value"]} if best else {}
    step = int(best.get("step", run.progress.step))
    judged = run.description.at(step).judged({name: value for name, value in row.items() if name.startswith("val/")})
    test = result.get("test") or {}
    return dataclasses.replace(judged, test=test, temperature=test.get("temperature"))


def draw(folder: Path) -> None:
    """The report of a training that is done. It is a courtesy: whatever fails here is told, and nothing else."""
    try:
        from tlx.report.report import report_run
        from tlx.use.report import opened

        report_run(folder, network=opened)
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        say(f"warning: no report was drawn ({why})\n  -> tlx report {shlex.quote(str(folder))}", error=True)
