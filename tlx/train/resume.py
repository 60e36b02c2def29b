"""Going on from the newest checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tlx.base.differences import differences
from tlx.base.errors import ConfigError, TlxError, UserError
from tlx.data.pixels.jpeg_region import decoder
from tlx.plan.config import Config
from tlx.plan.saved_config import changes, essential, meant
from tlx.ranks.together import by_main
from tlx.runs.checkpoint import Checkpoints, Snapshot, read, read_state, restore_optimizer, understood
from tlx.runs.extend import Extension, earlier, history, lasting_ends
from tlx.runs.progress import Progress
from tlx.runs.run_folder import threads
from tlx.train.averaging import MovingAverage
from tlx.train.run import Run


def resume(run: Run) -> None:
    """Goes on from the newest whole checkpoint; then every rank has rank 0's weights."""
    run.world.watch.beat("resuming")
    path = by_main(run.world, lambda: newest(run.checkpoints, run.journal.note))
    if path is not None:
        load_checkpoint(run, path)
        run.journal.note(f"resumed from {path} at step {run.progress.step} of {run.plan.steps}")
    else:
        by_main(run.world, lambda: run.journal.start(0, resumed=False))
    run.world.broadcast([*run.net.parameters(), *run.net.buffers()])


def load_checkpoint(run: Run, path: Path) -> None:
    """Puts weights, optimizer, progress and plan back to where a checkpoint was written.

    Raises:
        UserError: it is of another training.
        TlxError: it does not hold what a checkpoint does.
    """
    extensions = by_main(run.world, lambda: earlier(run.folder))
    snapshot = read(path)
    state = snapshot.state
    with understood(path):
        check_identity(state["identity"], run.identity, run.config, where=str(path), extensions=extensions)
        load_weights(run.net, run.ema, snapshot.model)
        restore_optimizer(run.optimizer, snapshot.optimizer)
        if run.world.scaler is not None and state["scaler"]:
            run.world.scaler.load_state_dict(state["scaler"])
        run.progress = Progress.of(state["progress"])
        if run.ema is not None and snapshot.ema is not None:
            restore_average(run.ema, snapshot, run.progress)
            if "ema_updates" not in state and any(layer.moving for layer in run.plan.layers):
                run.journal.note(
                    "the moving average's norm statistics were the network's so far; from here on they are averaged"
                )
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
            try:  # what a process that was killed had left to do after its newest checkpoint
                run.checkpoints.settle(path)
            except OSError as error:
                run.journal.note(
                    f"WARNING: the links latest and best could not be set, or old checkpoints removed ({error})"
                )
    run.saved = run.saver.written = run.progress.step
    by_main(run.world, lambda: run.journal.start(metrics_bytes, resumed=True))
    if decoder() != decoded:
        run.journal.note(f"pictures were decoded by {decoded}, now by {decoder()}: pixels differ by rounding")
    if computed_with is not None and threads() != computed_with:
        run.journal.note(
            f"ranks computed with {computed_with} CPU threads until here, now with {threads()} (OMP_NUM_THREADS): "
            "numbers differ by rounding"
        )
    if run.dealt() != then:
        run.journal.note(f"batches were dealt as {then}, now as {run.dealt()}: the same samples in order")


def newest(checkpoints: Checkpoints, note: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint; what a process that was killed was writing is removed.

    Raises:
        TlxError: every checkpoint is damaged, or they cannot be read.
    """
    try:
        checkpoints.sweep()
        return checkpoints.newest(note)
    except OSError as error:
        raise TlxError(str(error)) from error


def load_weights(net: nn.Module, ema: MovingAverage | None, weights: Mapping[str, torch.Tensor]) -> None:
    """Into the network; a moving average begins anew, with these weights as its first."""
    net.load_state_dict(weights, strict=True)
    if ema is not None:
        ema.module.load_state_dict(weights, strict=True)
        ema.updates = 1


def restore_average(ema: MovingAverage, snapshot: Snapshot, progress: Progress) -> None:
    """The moving average of a checkpoint. Those of before do not say how many updates it holds: they were as many as
    steps that updated something."""
    ema.module.load_state_dict(snapshot.ema or {}, strict=True)
    steps = progress.step - progress.nonfinite - progress.overflows
    ema.updates = int(snapshot.state.get("ema_updates", steps))
    if not 0 <= ema.updates <= progress.step + 1:
        raise ValueError(f"a moving average of {ema.updates} updates at step {progress.step}")


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
            saved = read_state(path)["identity"]
            check_identity(saved, run.identity, run.config, where=str(path), extensions=former)


def _meant(saved: Mapping[str, Any], former: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was trained by a configuration of before, which a later tlx may have written anew."""
    if saved == essential(former):
        return True
    with contextlib.suppress(ConfigError):
        return not changes(saved, meant(former))
    return False


def check_identity(
    saved: Mapping[str, Any],
    own: Mapping[str, Any],
    config: Config,
    *,
    where: str,
    extensions: Sequence[Mapping[str, Any]] = (),
) -> None:
    """A checkpoint goes on only with the same configuration, classes, shards and preprocessing.

    Args:
        extensions: of the run, whose configuration before them counts as the present one.

    Raises:
        UserError: with the differences.
    """
    # hashes of shards, which indexes of before lack: adding them makes no other training
    hashes = ("train_content", "val_content")
    apart = {"config", *(key for key in hashes if not (saved.get(key) and own.get(key)))}
    others = ({k: v for k, v in identity.items() if k not in apart} for identity in (saved, own))
    differ = differences(*others)
    if not any(_meant(saved["config"], entry["before"]["config"]) for entry in extensions):
        differ += [f"config.{line}" for line in changes(saved["config"], config)]
    if differ:
        raise UserError(
            "the checkpoint belongs to another training:\n    " + "\n    ".join(differ),
            where=where,
            todo="use the same shards and settings, another run folder, or --fresh",
        )
