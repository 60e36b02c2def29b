"""A loss or gradient that is not finite: nothing was updated; stop and say where it was made, or skip up to a limit."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.utils._pytree import tree_leaves

from tlx.base.files import json_text, write_whole
from tlx.data.shards.targets import LABEL
from tlx.data.stream.order import derive
from tlx.data.stream.stream import Batch
from tlx.data.stream.transfer import on_device
from tlx.plan.loop_config import NonFinite
from tlx.runs.progress import Progress
from tlx.tasks import Truth
from tlx.train.evaluation import broken_tensor, is_broken
from tlx.train.freeze import moving_norms, statistics, unfreeze
from tlx.train.memory_trial import lone_norms
from tlx.train.run import Run
from tlx.train.step import Updater


@dataclass(frozen=True)
class Finding:
    """What one rank has found in its micro-batches of a step.

    Attributes:
        place: the first thing that was not finite, in words; None where all was finite this time.
        samples: of the micro-batch, by name.
        file: its pictures, labels and ids, saved in the run folder.
    """

    rank: int
    place: str | None = None
    samples: list[str] = field(default_factory=list)
    file: str | None = None


def tolerated(reading: Mapping[str, float], progress: Progress, wanted: NonFinite, *, scaled: bool) -> str | None:
    """Whether training goes on after a step whose loss or gradient was not finite, as all ranks know: what to tell
    ("" for nothing), or None where it must stop.

    Args:
        reading: of the step, already counted in `progress`.
        scaled: gradients are scaled (fp16), so that overflows happen, which the scaler mends.
    """
    if scaled and math.isfinite(reading["loss"]):
        return "" if progress.overflows_in_a_row <= wanted.overflows else None
    if wanted.policy != "skip" or progress.nonfinite > wanted.limit:
        return None
    return (
        f"WARNING: the loss or gradient of step {int(reading['step'])} is not finite: nothing was updated, the step is "
        f"skipped; {progress.nonfinite} of {wanted.limit} allowed (loop.nonfinite)"
    )


def explain(run: Run, step: int) -> str:
    """Where a step became not finite: every rank computes its micro-batches once more, looked at module by module. The
    network is of no use after it. On every rank the fault in words.

    Args:
        step: that was made, counted from 1.
    """
    phase, world, place, kept = run.plan.phase(step - 1), run.world, None, None
    names: list[str] = []
    unfreeze(run.net, phase, run.plan)
    torch.manual_seed(derive(run.config.seed, "dropout", step - 1, world.rank) >> 1)
    moving = {
        id(b) for b in statistics(moving_norms(run.net, phase, run.plan))
    }  # by the step, which does not read them
    with suppress(RuntimeError), lone_norms():  # of a network that does not run again, nothing is known
        for batch in on_device(run.stream.batches(step - 1, step), world.device):
            place = first_nonfinite(run.net, run.updater, batch, ignored=moving)
            if place is not None:
                names = [run.stream.manifest.describe(int(i)) for i in batch.ids]
                kept = _keep(run.folder / "nonfinite" / f"step-{step:08d}-rank-{world.rank}.safetensors", batch)
                break
    findings, report = world.gather(Finding(world.rank, place, names, kept)), ""
    if world.main:
        run.saver.settle()
        report = report_on(step, phase.name, findings, run.folder, saved=run.saver.written)
    return str(world.from_main(report))


def first_nonfinite(net: nn.Module, updater: Updater, batch: Batch, *, ignored: Collection[int]) -> str | None:
    """What is first not finite in the forward and backward pass of a micro-batch, in words.

    Args:
        ignored: ids of tensors that may be not finite before.
    """
    name = broken_tensor(net, without=ignored)
    if name is not None:
        return f"{name} itself, before the step"
    images = updater.normalise(batch.images)
    seen: list[str] = []
    with _watched(net, seen):
        with updater.world.autocast():
            output = net(batch.mix.apply(images) if batch.mix else images)
            loss = updater.task.loss(output, Truth.of(batch))
        if seen:
            return seen[0]
        if is_broken(loss):
            return f"the loss, {loss.item()}, of logits that are finite (the objective)"
        torch.autograd.backward(loss / batch.total if batch.counts else 0 * loss)
    return seen[0] if seen else None


@contextmanager
def _watched(net: nn.Module, seen: list[str]) -> Iterator[None]:
    """Notes what is not finite as it comes: outputs of modules, children before what holds them, then gradients from
    the head down."""

    def gradient_of(what: str) -> Any:
        def look(gradient: torch.Tensor) -> None:
            if is_broken(gradient):
                seen.append(f"the gradient of {what}")

        return look

    def leave(name: str) -> Any:
        def look(module: nn.Module, _args: Any, output: Any) -> None:
            what = f"the output of {name or 'the network'} ({type(module).__name__})"
            for tensor in tree_leaves(output):
                if not isinstance(tensor, torch.Tensor):
                    continue
                if is_broken(tensor):
                    seen.append(what)
                if tensor.requires_grad:
                    handles.append(tensor.register_hook(gradient_of(what)))  # type: ignore[no-untyped-call]

        return look

    handles: list[Any] = [m.register_forward_hook(leave(name)) for name, m in net.named_modules()]
    learned = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    handles += [p.register_hook(gradient_of(name)) for name, p in learned]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep(file: Path, batch: Batch) -> str | None:
    """Saves a micro-batch for looking; a full disk is no second fault."""
    others = {f"target/{name}": values for name, values in batch.targets.items() if name != LABEL}
    tensors = {"images": batch.images, "ids": batch.ids, "labels": batch.labels, **others}
    with suppress(OSError, RuntimeError, SafetensorError):  # safetensors has an error of its own for a full disk
        file.parent.mkdir(exist_ok=True)
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, file)
        return str(file)
    return None


def report_on(step: int, phase: str, findings: Sequence[Finding], folder: Path, *, saved: int) -> str:
    """The fault in words; all samples are written to ``nonfinite/step-N.json``.

    Args:
        folder: of the run.
        saved: the step of the last checkpoint.
    """
    found = [f for f in findings if f.place is not None]
    lines = [f"the loss or gradient is not finite at step {step} of phase {phase}; nothing was updated"]
    for finding in found[:4]:
        shown = ", ".join(finding.samples[:4]) + (", ..." if len(finding.samples) > 4 else "")
        lines += [
            f"  first on rank {finding.rank}: {finding.place}; in a micro-batch of {len(finding.samples)}: {shown}"
        ]
    if not found:
        lines.append("  computed once more, everything is finite: see whether it comes at the same step again")
    file = folder / "nonfinite" / f"step-{step:08d}.json"
    content = {"step": step, "phase": phase, "findings": [asdict(f) for f in findings]}
    with suppress(OSError):
        file.parent.mkdir(exist_ok=True)
        write_whole(file, json_text(content))
        lines.append(f"  all samples, and where the pictures are: {file}")
    lines.append(f"  the last checkpoint is of step {saved}")
    lines.append("  -> leave such steps out: loop.nonfinite=skip; or, in a new run, a lower rate, a warm-up, loop.clip")
    return "\n".join(lines)
