"""Saving where a run stands, and going on from there."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tlx.base.differences import differences
from tlx.base.errors import ConfigError, TlxError, UserError
from tlx.data.pixels.jpeg_region import decoder
from tlx.plan.plan import Phase
from tlx.plan.written_config import changes, essential, meant
from tlx.runs.checkpoint import Snapshot, optimizer_state, read, read_state, restore_optimizer, understood, weights_of
from tlx.runs.extend import Extension, earlier, history, lasting_ends
from tlx.runs.progress import Progress
from tlx.runs.run_folder import threads
from tlx.train.run import Run


def resume(run: Run) -> None:
    """Goes on from the newest whole checkpoint; then every rank has rank 0's weights."""
    run.world.watch.beat("resuming")
    path = newest(run)
    if path is not None:
        load_checkpoint(run, path)
        run.journal.note(f"resumed from {path} at step {run.progress.step} of {run.plan.steps}")
    else:
        begin_journal(run, 0, resumed=False)
    run.world.broadcast([*run.net.parameters(), *run.net.buffers()])


def load_checkpoint(run: Run, path: Path) -> None:
    """A checkpoint becomes where the run stands.

    Raises:
        UserError: it is of another training.
        TlxError: it does not hold what a checkpoint does.
    """
    extensions = run.world.from_main(earlier(run.folder) if run.world.main else None)
    snapshot = read(path)
    state = snapshot.state
    with understood(path):
        check_identity(state["identity"], run, where=str(path), extensions=extensions)
        load_weights(run, snapshot.model)
        restore_optimizer(run.optimizer, snapshot.optimizer)
        if run.world.scaler is not None and state["scaler"]:
            run.world.scaler.load_state_dict(state["scaler"])
        run.progress = Progress.of(state["progress"])
        restore_average(run, snapshot)
        planned = run.remake_plan(run.progress.ends)
        run.progress.ends = lasting_ends(run.progress, planned, run.config.evaluate.patience)
        run.plan = run.remake_plan(run.progress.ends)
        run.progress.extended = history(extensions)
        for phase in run.plan.phases:
            if phase.name in run.progress.phases:  # an extension may have moved its end
                run.progress.phases[phase.name]["stop"] = phase.stop
        if not 0 <= run.progress.step <= run.plan.steps:
            raise ValueError(f"step {run.progress.step} of {run.plan.steps}")
        metrics_bytes, then, decoded = int(state["metrics_bytes"]), state["dealt"], state["decoder"]
        computed_with = state.get("threads")  # not in checkpoints of before
        if run.world.main:
            tidy(run, path)
    run.saved = run.saver.written = run.progress.step
    begin_journal(run, metrics_bytes, resumed=True)
    if decoder() != decoded:
        run.journal.note(f"pictures were decoded by {decoded}, now by {decoder()}: pixels differ by rounding")
    if computed_with is not None and threads() != computed_with:
        run.journal.note(
            f"ranks computed with {computed_with} CPU threads until here, now with {threads()} (OMP_NUM_THREADS): "
            "numbers differ by rounding"
        )
    if dealt(run) != then:
        run.journal.note(f"batches were dealt as {then}, now as {dealt(run)}: the same samples in order")


def begin_journal(run: Run, metrics_bytes: int, *, resumed: bool) -> None:
    """Rank 0's; its mistake, such as a tracker that lacks a method, is everybody's, so that none waits for it."""
    mistake: UserError | None = None
    try:
        run.journal.start(metrics_bytes, resumed=resumed)
    except UserError as error:
        mistake = error
    said = run.world.from_main(str(mistake) if mistake else None)
    if said is not None:
        raise mistake or UserError(said)


def tidy(run: Run, path: Path) -> None:
    """What a process that was killed had left to do after its newest checkpoint."""
    try:
        run.checkpoints.settle(path)
    except OSError as error:
        run.journal.note(f"WARNING: the links latest and best could not be set, or old checkpoints removed ({error})")


def dealt(run: Run) -> dict[str, Any]:
    return {"world": run.world.size, "micro_batch": run.config.loop.micro_batch}


def newest(run: Run) -> Path | None:
    """Rank 0's choice of a checkpoint, on every rank; its fault too, so that none waits for it.

    Raises:
        TlxError: every checkpoint is damaged.
    """
    path: Path | None = None
    fault: str | None = None
    try:
        if run.world.main:
            run.checkpoints.sweep()
            path = run.checkpoints.newest(run.journal.note)
    except (TlxError, OSError) as error:
        fault = str(error)
    path, fault = run.world.from_main((path, fault))
    if fault is not None:
        raise TlxError(fault)
    return path


def save_when_due(run: Run, phase: Phase, *, now: bool) -> None:
    """Saves at its interval, at the end of a phase, at an evaluation that is among the best, and when `now`."""
    step = run.progress.step
    leads = any(leader["step"] == step for leader in run.progress.leaders)
    if step == run.saved or not (now or leads or step == phase.stop or run.due_to_save()):
        return
    run.saved = step
    if run.world.main:
        run.world.watch.beat("saving")
        run.saver.settle()  # before there is a second copy in memory
        run.saver.save(step, snapshot(run))
        run.world.watch.beat("batch")


def settle(run: Run) -> None:
    """The last checkpoint is on the disk; where it went with a folder that was removed since, it is written again.

    Raises:
        UserError: it could not be written.
    """
    if run.world.main:
        run.saver.settle()
        run.saver.follow()
        if run.saved >= 0 and not run.checkpoints.path(run.saved).is_dir():
            run.saver.save(run.saved, snapshot(run))
            run.saver.settle()
    written = run.world.from_main(run.saver.written)
    if written < run.saved:
        raise UserError(
            f"training has come to step {run.progress.step}, and the checkpoint of it could not be written",
            where=str(run.checkpoints.folder),
            todo=f"make room; the same command goes on from step {written}",
        )


def snapshot(run: Run) -> Snapshot:
    """Everything needed to go on from here."""
    scaler = run.world.scaler
    return Snapshot(
        model=weights_of(run.net),
        optimizer=optimizer_state(run.optimizer),
        ema=weights_of(run.ema.module) if run.ema else None,
        state={
            "step": run.progress.step,
            "best": run.progress.best,
            "progress": run.progress.data(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "ema_updates": run.ema.updates if run.ema else None,
            "metrics_bytes": run.journal.position(),
            "identity": dict(run.identity),
            "dealt": dealt(run),
            "decoder": decoder(),
            "threads": threads(),
        },
    )


def load_weights(run: Run, weights: Mapping[str, torch.Tensor]) -> None:
    """Into the network; a moving average begins anew, with these weights as its first."""
    run.net.load_state_dict(weights, strict=True)
    if run.ema is not None:
        run.ema.module.load_state_dict(weights, strict=True)
        run.ema.updates = 1


def restore_average(run: Run, snapshot: Snapshot) -> None:
    """The moving average of a checkpoint, after its progress. Those of before do not say how many updates it holds:
    they were as many as steps that updated something."""
    if run.ema is None or snapshot.ema is None:
        return
    run.ema.module.load_state_dict(snapshot.ema, strict=True)
    progress = run.progress
    steps = progress.step - progress.unfinite - progress.overflows
    if "ema_updates" not in snapshot.state and any(layer.moving for layer in run.plan.layers):
        run.journal.note(
            "the moving average's norm statistics were the network's so far; from here on they are averaged"
        )
    run.ema.updates = int(snapshot.state.get("ema_updates", steps))
    if not 0 <= run.ema.updates <= progress.step + 1:
        raise ValueError(f"a moving average of {run.ema.updates} updates at step {progress.step}")


def check_resumable(run: Run, extension: Extension | None) -> None:
    """Whether the run's newest checkpoint is of this training, by what it says; changes nothing. Whether it is whole,
    :func:`resume` tells.

    Args:
        extension: by which the run would go on.

    Raises:
        UserError: other classes, shards or preprocessing; another format.
    """
    former = [*earlier(run.folder), *([{"before": {"config": extension.former}}] if extension is not None else [])]
    path = run.checkpoints.newest_stated()
    if path is not None:
        with understood(path):
            check_identity(read_state(path)["identity"], run, where=str(path), extensions=former)


def _meant(saved: Mapping[str, Any], former: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was trained by a configuration of before, which a later tlx may have written anew."""
    if saved == essential(former):
        return True
    with contextlib.suppress(ConfigError):
        return not changes(saved, meant(former))
    return False


def check_identity(
    saved: Mapping[str, Any], run: Run, *, where: str, extensions: Sequence[Mapping[str, Any]] = ()
) -> None:
    """A checkpoint goes on only with the same configuration, classes, shards and preprocessing.

    Args:
        extensions: of the run, whose configuration before them counts as the present one.

    Raises:
        UserError: with the differences.
    """
    # hashes of shards, which indexes of before lack: adding them makes no other training
    hashes = ("train_content", "val_content")
    apart = {"config", *(key for key in hashes if not (saved.get(key) and run.identity.get(key)))}
    others = ({k: v for k, v in identity.items() if k not in apart} for identity in (saved, run.identity))
    differ = differences(*others)
    if not any(_meant(saved["config"], entry["before"]["config"]) for entry in extensions):
        differ += [f"config.{line}" for line in changes(saved["config"], run.config)]
    if differ:
        raise UserError(
            "the checkpoint belongs to another training:\n    " + "\n    ".join(differ),
            where=where,
            todo="use the same shards and settings, another run folder, or --fresh",
        )
