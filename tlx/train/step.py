"""One step: the micro-batches of a global batch, backward, clip, optimizer, norm statistics, moving average, counts."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from tlx.base.errors import UserError
from tlx.data.pixels.normalise import Normalise, NormaliseViews
from tlx.data.stream.order import derive
from tlx.data.stream.stream import BadSample, Batch
from tlx.features.cut import Cut, Rest
from tlx.features.stored import unchanged
from tlx.plan.plan import Phase, Plan
from tlx.ranks.collectives import World
from tlx.tasks import Ranks, Task, Truth
from tlx.train.averaging import MovingAverage
from tlx.train.freeze import average_statistics, moved, moving_norms, take_back, unfreeze
from tlx.train.update_size import UpdateSize

# Statistics are averaged over ranks by us, which uses the data of all; torch has renamed the switch.
_OWN_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers": False
}


@dataclass(frozen=True)
class PhaseModel:
    """A network frozen, wrapped and compiled for one phase.

    Attributes:
        net: the network itself, with its own parameter names.
        forward: what to call for training: wrapped for DDP anew in each phase, compiled where asked.
        norms: those whose running statistics move.
        parameters: those that train.
        enters: what a batch's images go through before `forward`, in place of being normalised.
    """

    net: nn.Module
    forward: Any
    norms: Sequence[nn.Module]
    parameters: Sequence[nn.Parameter]
    enters: Callable[[torch.Tensor], torch.Tensor] | None = None

    def no_sync(self, *, when: bool) -> Any:
        """Without the all-reduce of gradients inside, `when` more micro-batches of the step follow."""
        ddp = getattr(self.forward, "_orig_mod", self.forward)
        return ddp.no_sync() if when and isinstance(ddp, DistributedDataParallel) else nullcontext()


def prepare_phase(
    net: nn.Module, phase: Phase, plan: Plan, *, world: World, compiled: bool, cut: Cut | None = None
) -> PhaseModel:
    """Unfreezes what the phase trains and wraps the network for it, or what of it follows a cut, where batches hold
    features.

    Wrapping anew is what makes unfreezing correct: a DDP wrapper reduces the gradients of those parameters that
    required one when it was made, and says nothing about others, so that ranks would drift apart.
    """
    unfreeze(net, phase, plan)
    forward: Any = net if cut is None else Rest(net, cut)
    if world.distributed:
        forward = DistributedDataParallel(
            forward,
            device_ids=[world.device] if world.cuda else None,
            init_sync=False,  # ranks are bit-equal at every step boundary
            gradient_as_bucket_view=True,
            **_OWN_BUFFERS,
        )
    if compiled and cut is None:
        torch._dynamo.reset()  # each set of trainable parameters is a graph of its own, and their number is limited
        torch._dynamo.config.suppress_errors = True  # a graph that does not compile runs eagerly, with a warning
        forward = torch.compile(forward)
    parameters = [p for p in net.parameters() if p.requires_grad]
    return PhaseModel(net, forward, moving_norms(net, phase, plan), parameters, unchanged if cut is not None else None)


def by_step(batches: Iterable[Batch]) -> Iterator[tuple[int, Iterator[Batch]]]:
    """Micro-batches grouped by the global step they belong to; a step ends with its last one, not with the next step's
    first, which may be long in coming."""
    remaining = iter(batches)
    for first in remaining:
        own = itertools.chain([first], itertools.islice(remaining, first.micros - 1 - first.micro))
        yield first.step, own
        for _ in own:  # drain unread micro-batches: the next one belongs to the next step
            pass


@dataclass(frozen=True)
class Updater:
    """Everything an update needs that does not change with the phase.

    Attributes:
        clip: the largest norm of the gradient; None for no limit.
        ema: the moving average of the weights.
        skips: training goes on after a step that is not finite, so buffers are restored too.
        ranks: how a loss that compares samples gets those of other ranks.
    """

    optimizer: Optimizer
    task: Task
    normalise: Normalise | NormaliseViews
    world: World
    seed: int
    clip: float | None = None
    ema: MovingAverage | None = None
    skips: bool = False
    ranks: Ranks = Ranks()  # noqa: RUF009  # frozen

    def update(
        self, phase_model: PhaseModel, step: int, batches: Iterable[Batch], *, size: UpdateSize | None = None
    ) -> tuple[torch.Tensor, list[BadSample], float]:
        """One step on this rank's micro-batches of a global batch.

        Args:
            size: measures the step.

        Returns:
            float64 [5] on the device: summed loss, hits, samples, 1 if a loss or the gradient was not finite (then
            nothing moved, on any rank), samples that hits tell of; the unreadable samples; the loss normaliser (samples
            of the global batch, or the sum of what they weigh).
        """
        # dropout depends on (seed, step, rank), not on what happened before: evaluations, resuming
        torch.manual_seed(derive(self.seed, "dropout", step, self.world.rank) >> 1)
        for parameter in phase_model.parameters:
            parameter.grad = None
        bad: list[BadSample] = []
        counts, own, total = [], 0, 0.0
        scaled = self.world.scaler is not None  # fp16: overflows happen
        returns = scaled or self.skips
        before = [b.clone() for b in moved(phase_model.norms)] if returns else []
        for batch in batches:
            bad += batch.bad
            own += 0 if batch.idle else len(batch.labels)
            total = batch.total
            counts.append(self.backward(phase_model, batch))
        finite = torch.isfinite(self._step(phase_model, size))
        if returns:
            take_back(moved(phase_model.norms), before, finite)
        average_statistics(phase_model.norms, self.world, samples=own)
        if self.ema is not None:
            self.ema.update(phase_model.net, taken=finite if returns else None)
        nonfinite = finite.logical_not().double().to(self.world.device)
        tally = torch.stack(counts).sum(0)
        return torch.cat([tally[:3], nonfinite[None], tally[3:]]), bad, total

    def backward(self, phase_model: PhaseModel, batch: Batch) -> torch.Tensor:
        """One micro-batch: accumulates gradients, all-reduced at the last of a step.

        Returns:
            float64 [4] on the device: summed loss, hits, samples, samples that hits tell of.
        """
        last = batch.micro == batch.micros - 1
        with phase_model.no_sync(when=not last):
            with self.world.autocast():
                images = (phase_model.enters or self.normalise)(batch.images)
                output = phase_model.forward(batch.mix.apply(images) if batch.mix else images)
                loss = self.task.loss(output, Truth.of(batch, self.ranks))
            # DDP averages gradients over ranks; the mean wanted is over the global batch's loss normaliser. A batch of
            # classes that weigh 0 has a gradient of zero, with which the optimizer steps: momentum and decay go on
            weight = self.world.size / batch.total if batch.counts else 0.0
            # 0 x inf is NaN: a loss that is not finite spoils the gradient, which all ranks share, whatever its own is
            self.world.backward(loss * (weight + 0 * loss.detach()))
        if batch.idle:
            return torch.zeros(4, dtype=torch.float64, device=self.world.device)
        logits = output[0] if isinstance(output, tuple) else output
        hits, told = self.task.hits(logits.detach(), batch.targets).double().unbind()
        samples = torch.full_like(hits, len(batch.labels))
        return torch.stack([batch.counts * loss.detach().double(), hits, samples, told])

    def _step(self, phase_model: PhaseModel, size: UpdateSize | None) -> torch.Tensor:
        """Clips and updates; the gradient's norm. Where that is not finite nothing moves, on any rank."""
        scaler = self.world.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        norm = get_total_norm([p.grad for p in phase_model.parameters if p.grad is not None])
        if size is not None:
            size.before(self.optimizer, norm)
        if self.clip is not None:
            clip_grads_with_norm_(phase_model.parameters, self.clip, norm)
        if scaler is not None:
            scaler.step(self.optimizer)  # leaves the weights alone after an overflow, and counts it
            scaler.update()
        elif getattr(self.optimizer, "_step_supports_amp_scaling", False):
            # the update itself looks at the flag: the host does not wait for the device
            self.optimizer.found_inf = torch.isfinite(norm).logical_not().float()  # type: ignore[attr-defined]
            self.optimizer.step()
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        elif torch.isfinite(norm):  # an optimizer of others
            self.optimizer.step()
        if size is not None:
            size.after()
        return norm


def set_rates(optimizer: Optimizer, phase: Phase, step: int) -> None:
    """The only place that writes a learning rate: from the plan, as Python floats."""
    rates = phase.rates(step)
    for group in optimizer.param_groups:
        group["lr"] = rates[group["layer"]]


FIELDS = ("loss", "correct", "seen", "bad", "stop", "nonfinite", "told")
"""Of one step, summed over ranks: weighted loss, hits, samples, unreadable samples, ranks asked to stop, ranks whose
loss or gradient was not finite, samples that hits tell of."""


class Exchange:
    """All-reduces the counts of each step in one packed tensor.

    On a GPU a step's reading is taken one step late, from a copy in pinned memory that an event says has arrived: the
    host does not wait for the step that is being computed.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._waiting: list[tuple[int, torch.Tensor, Any, float]] = []

    def post(self, values: torch.Tensor, *, step: int, total: float) -> None:
        """Sends a step's values.

        Args:
            values: float64 [len(FIELDS)], this rank's.
            total: the loss normaliser, the same on every rank.
        """
        if self.world.distributed:
            dist.all_reduce(values)
        arrived = None
        if values.is_cuda:
            values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()  # type: ignore[no-untyped-call]
        self._waiting.append((step, values, arrived, total))

    def readings(self, *, settle: bool) -> list[dict[str, float]]:
        """Steps that have arrived, in order: all but the newest on a GPU, unless `settle`; the same on every rank."""
        late = 1 if self.world.cuda and not settle else 0
        ready = self._waiting[: len(self._waiting) - late]
        del self._waiting[: len(ready)]
        readings = []
        for step, values, arrived, total in ready:
            if arrived is not None:
                arrived.synchronize()
            readings.append({**dict(zip(FIELDS, values.tolist(), strict=True)), "total": total, "step": step})
        return readings


def share_unreadable(bad: dict[str, str], quota: Callable[[], int], world: World) -> None:
    """Adds the unreadable samples of all other ranks to this rank's (place -> reason). All ranks at once.

    Args:
        quota: how many are allowed.

    Raises:
        UserError: there are more.
    """
    for part in world.gather(dict(bad)):
        bad.update(part)
    allowed = quota()
    if len(bad) > allowed:
        names = [f"{where}: {why}" for where, why in sorted(bad.items())]
        raise UserError(
            f"{len(names)} unreadable samples, {allowed} allowed:\n    " + "\n    ".join(names[:10]),
            where="data.bad_samples",
            todo="`tlx shards check` names all of them; mend the shards, or allow some: data.bad_samples=1%",
        )
