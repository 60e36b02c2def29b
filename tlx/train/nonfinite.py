"""A loss or gradient that is not finite: nothing was updated; stop and say where it was made, or skip up to a limit."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.utils._pytree import tree_leaves

from tlx.base.errors import TlxError
from tlx.base.files import json_text, write_whole
from tlx.data.stream.order import derive
from tlx.data.stream.stream import Batch
from tlx.data.stream.transfer import on_device
from tlx.train.freeze import moving_norms, statistics, unfreeze
from tlx.train.memory_trial import lone_norms
from tlx.train.run import Run


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


def meet_nonfinite(run: Run, reading: Mapping[str, float]) -> None:
    """After a step whose loss or gradient was not finite, as all ranks know.

    Args:
        reading: of the step, already absorbed.

    Raises:
        TlxError: the policy is to stop, or the limit is reached.
    """
    wanted, progress, step = run.config.loop.nonfinite, run.progress, int(reading["step"])
    overflow = run.world.scaler is not None and math.isfinite(reading["loss"])
    if overflow and progress.overflows_in_a_row <= wanted.overflows:
        return
    if not overflow and wanted.policy == "skip" and progress.unfinite <= wanted.limit:
        run.journal.note(
            f"WARNING: the loss or gradient of step {step} is not finite: nothing was updated, the step is skipped; "
            f"{progress.unfinite} of {wanted.limit} allowed (loop.nonfinite)"
        )
        return
    findings = run.world.gather(examine(run, step - 1))
    raise TlxError(run.world.from_main(report_on(run, step, findings) if run.world.main else None))


def examine(run: Run, step: int) -> Finding:
    """This rank's micro-batches of a step once more, looked at module by module; the network is of no use after it."""
    phase = run.plan.phase(step)
    unfreeze(run.net, phase, run.plan)
    torch.manual_seed(derive(run.config.seed, "dropout", step, run.world.rank) >> 1)
    with suppress(RuntimeError), lone_norms():  # of a network that does not run again, nothing is known
        for batch in on_device(run.stream.batches(step, step + 1), run.world.device):
            place = first_nonfinite(run, batch)
            if place is not None:
                names = [run.stream.manifest.describe(int(i)) for i in batch.ids]
                return Finding(run.world.rank, place, names, _keep(run, step + 1, batch))
    return Finding(run.world.rank)


def first_nonfinite(run: Run, batch: Batch) -> str | None:
    """What is first not finite in the forward and backward pass of a micro-batch, in words."""
    moving = moving_norms(run.net, run.plan.phase(batch.step), run.plan)
    spoilt = {id(b) for b in statistics(moving)}  # by the step itself, which does not read them
    name = broken_tensor(run.net, without=spoilt)
    if name is not None:
        return f"{name} itself, before the step"
    images = run.normalise(batch.images)
    seen: list[str] = []
    with _watched(run.net, seen):
        with run.world.autocast():
            output = run.net(batch.mix.apply(images) if batch.mix else images)
            loss = run.objective.loss(output, batch.labels, batch.mix)
        if seen:
            return seen[0]
        if _broken(loss):
            return f"the loss, {loss.item()}, of logits that are finite (the objective)"
        (loss / batch.total if batch.counts else 0 * loss).backward()
    return seen[0] if seen else None


@contextmanager
def _watched(net: nn.Module, seen: list[str]) -> Iterator[None]:
    """Notes what is not finite as it comes: outputs of modules, children before what holds them, then gradients from
    the head down."""

    def gradient_of(what: str) -> Any:
        def look(gradient: torch.Tensor) -> None:
            if _broken(gradient):
                seen.append(f"the gradient of {what}")

        return look

    def leave(name: str) -> Any:
        def look(module: nn.Module, _args: Any, output: Any) -> None:
            what = f"the output of {name or 'the network'} ({type(module).__name__})"
            for tensor in tree_leaves(output):
                if not isinstance(tensor, torch.Tensor):
                    continue
                if _broken(tensor):
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


def broken_tensor(net: nn.Module, *, without: Collection[int] = ()) -> str | None:
    """The first parameter or buffer that is not finite, by name; `without`: ids of tensors to pass over."""
    named = [*net.named_parameters(), *net.named_buffers()]
    return next((name for name, tensor in named if id(tensor) not in without and _broken(tensor)), None)


def _broken(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())


def _keep(run: Run, step: int, batch: Batch) -> str | None:
    """Saves a micro-batch for looking; a full disk is no second fault."""
    folder = run.folder / "nonfinite"
    file = folder / f"step-{step:08d}-rank-{run.world.rank}.safetensors"
    tensors = {"images": batch.images, "labels": batch.labels, "ids": batch.ids}
    with suppress(OSError, RuntimeError, SafetensorError):  # safetensors has an error of its own for a full disk
        folder.mkdir(exist_ok=True)
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, file)
        return str(file)
    return None


def report_on(run: Run, step: int, findings: list[Finding]) -> str:
    """The fault in words, for rank 0 to say; all samples are written to ``nonfinite/step-N.json``."""
    run.saver.settle()
    phase = run.plan.phase(step - 1).name
    found = [f for f in findings if f.place is not None]
    lines = [f"the loss or gradient is not finite at step {step} of phase {phase}; nothing was updated"]
    for finding in found[:4]:
        shown = ", ".join(finding.samples[:4]) + (", ..." if len(finding.samples) > 4 else "")
        lines += [
            f"  first on rank {finding.rank}: {finding.place}; in a micro-batch of {len(finding.samples)}: {shown}"
        ]
    if not found:
        lines.append("  computed once more, everything is finite: see whether it comes at the same step again")
    file = run.folder / "nonfinite" / f"step-{step:08d}.json"
    content = {"step": step, "phase": phase, "findings": [asdict(f) for f in findings]}
    with suppress(OSError):
        file.parent.mkdir(exist_ok=True)
        write_whole(file, json_text(content))
        lines.append(f"  all samples, and where the pictures are: {file}")
    lines.append(f"  the last checkpoint is of step {run.saver.written}")
    lines.append("  -> leave such steps out: loop.nonfinite=skip; or, in a new run, a lower rate, a warm-up, loop.clip")
    return "\n".join(lines)
