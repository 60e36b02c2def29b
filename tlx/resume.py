"""Saving where a run stands, and going on from there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tlx.checkpoint import Snapshot, optimizer_state, read, restore_optimizer, weights_of
from tlx.data.regions import decoder
from tlx.errors import TlxError, UserError
from tlx.plan import Phase
from tlx.progress import Progress
from tlx.run import Run


def resume(run: Run) -> None:
    """Goes on from the newest whole checkpoint; then every rank has rank 0's weights."""
    path = newest(run)
    if path is not None:
        snapshot = read(path)
        check_identity(snapshot.state["identity"], run.identity, where=str(path))
        load_weights(run, snapshot.model, snapshot.ema)
        restore_optimizer(run.optimizer, snapshot.optimizer)
        if run.world.scaler is not None and snapshot.state["scaler"]:
            run.world.scaler.load_state_dict(snapshot.state["scaler"])
        run.progress = Progress.of(snapshot.state["progress"])
        run.plan = run.remake_plan(run.progress.ends)
        run.journal.start(snapshot.state["metrics_bytes"], resumed=True)
        run.saved = run.progress.step
        if decoder() != snapshot.state.get("decoder", decoder()):
            run.journal.note(
                f"pictures were decoded by {snapshot.state['decoder']}, now by {decoder()}: pixels differ by rounding"
            )
        dealt = {"world": run.world.size, "micro_batch": run.config.loop.micro_batch}
        if dealt != snapshot.state["dealt"]:
            run.journal.note(
                f"batches were dealt as {snapshot.state['dealt']}, now as {dealt}: the same samples in order"
            )
        run.journal.note(f"resumed from {path} at step {run.progress.step} of {run.plan.steps}")
    else:
        run.journal.start(0, resumed=False)
    run.world.broadcast([*run.net.parameters(), *run.net.buffers()])


def newest(run: Run) -> Path | None:
    """Rank 0's choice of a checkpoint, on every rank; its fault too, so that none waits for it.

    Raises:
        TlxError: every checkpoint is damaged.
    """
    path: Path | None = None
    fault: str | None = None
    try:
        path = run.checkpoints.newest(run.journal.note) if run.world.main else None
    except TlxError as error:
        fault = str(error)
    path, fault = run.world.from_main((path, fault))
    if fault is not None:
        raise TlxError(fault)
    return path


def save_when_due(run: Run, phase: Phase, *, now: bool) -> None:
    """Saves at its interval, at the end of a phase, at a new best, and when `now`."""
    step, best = run.progress.step, run.progress.best
    new_best = best is not None and best["step"] == step
    due = now or new_best or step == phase.stop or run.due(run.config.checkpoint.every)
    if not due or step == run.saved:
        return
    run.journal.sync()
    if run.world.main:
        try:
            run.checkpoints.save(step, snapshot(run))
        except OSError as error:
            run.journal.note(f"WARNING: checkpoint at step {step} could not be written ({error}); training goes on, "
                             "earlier checkpoints are untouched. Make room or mend permissions")  # fmt: skip
    run.saved = step
    run.world.barrier()


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
            "metrics_bytes": run.journal.position(),
            "identity": dict(run.identity),
            "dealt": {"world": run.world.size, "micro_batch": run.config.loop.micro_batch},
            "decoder": decoder(),
        },
    )


def load_weights(run: Run, weights: Mapping[str, torch.Tensor], ema: Mapping[str, torch.Tensor] | None) -> None:
    """Into the network, and into the moving average: its own, or anew from the network."""
    run.net.load_state_dict(weights, strict=True)
    if run.ema is not None:
        run.ema.module.load_state_dict(ema if ema is not None else weights, strict=True)
        run.ema.n_averaged.fill_(1)


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any], *, where: str) -> None:
    """A checkpoint goes on only with the same classes, shards and preprocessing.

    Raises:
        UserError: with the differences.
    """
    differ = [f"{k}: {saved.get(k)!r} there, {now[k]!r} now" for k in now if saved.get(k) != now[k]]
    if differ:
        raise UserError(
            "the checkpoint belongs to another training:\n    " + "\n    ".join(d[:300] for d in differ),
            where=where,
            todo="use the same shards and settings, another run folder, or --fresh",
        )
