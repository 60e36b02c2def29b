"""What a phase needs while it trains, found by doing it before the first step; nothing of that is left behind.

A trial does what a step does with the largest micro-batch of a rank: the network prepared for the phase, DDP's
buckets with it, pixels, mixing, autocast, forward, loss, backward; then an evaluation batch. All else that training
keeps in memory is there too: the optimizer's state of all phases so far, gradients of earlier micro-batches, the next
batch on its way. Ranks do not communicate in a trial: one that is out of memory would leave the others waiting.

Not tried: what compiling changes (the network is tried as it is, which as a rule needs no less), and NCCL's buffers.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tlx.data.stream.mix import Mix
from tlx.data.stream.randomness import own_randomness
from tlx.data.stream.stream import Batch
from tlx.plan.plan import Phase, Plan
from tlx.tasks import Ranks, all_targets
from tlx.tasks.made_up import made_up
from tlx.train.step import PhaseModel, Updater, prepare_phase

MARGIN = 0.03
"""The share of a GPU's memory that must stay free: for NCCL, and for pieces between tensors that are of no use."""

_FULL = (
    "out of memory",
    "can't allocate memory",  # torch's allocator for CPUs
    "STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN
    "ALLOCATION_FAILED",  # cuDNN 9: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",  # no room for its handle
)
"""How those who raise no OutOfMemoryError say that there is no memory."""

_NO_ALGORITHM = ("unable to find an engine to execute this computation", "Unable to find a valid cuDNN algorithm")
"""Of a convolution: torch tries all algorithms, and passes over what each says. There may have been no room."""

Stage = Literal["training", "evaluation"]


@dataclass(frozen=True)
class Attempt:
    """How a trial of one phase went on one rank.

    Attributes:
        failed: what there was no memory for; None where all of it fits.
        peak: bytes that tensors took at most; None where the device does not tell.
        fault: what went wrong that has nothing to do with memory; training will say it in its own words.
    """

    failed: Stage | None = None
    peak: int | None = None
    fault: str | None = None


@dataclass(frozen=True)
class Load:
    """What goes through the network at once on a rank.

    Attributes:
        samples: of a training micro-batch.
        accumulates: a step takes several of them.
        evaluation: samples of an evaluation batch; 0 without validation.
    """

    samples: int
    accumulates: bool
    evaluation: int


@dataclass(frozen=True)
class Trial:
    """Tries phases of a plan on this rank's device.

    Attributes:
        net: on the device, as the loop gets it.
        shape: of an image: channels, height, width.
        state: bytes of the optimizer's state in each phase, by name; see :func:`optimizer_states`.
        ranks: of the training, where that is not the number of ranks here (``tlx plan --measure``).
        mixed: mixup or cutmix is on.
    """

    updater: Updater
    net: nn.Module
    plan: Plan
    shape: tuple[int, int, int]
    state: Mapping[str, int]
    ranks: int
    mixed: bool = False

    def attempt(self, phase: Phase, load: Load) -> Attempt:
        """Trains and evaluates once; afterwards everything is bit for bit what it was, and the memory is given back."""
        world = self.updater.world
        try:
            with unchanged(self.net, world.device), lone_norms():
                found = self._attempt(phase, load)
        except Exception as error:
            found = Attempt(failed="training")
            if not ran_out(error):
                found = Attempt(fault=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        if world.distributed or (world.cuda and found.failed):
            gc.collect()  # DDP's wrapper, or an exception's frames, may be in cycles
        _release(world.device)
        return found

    def _attempt(self, phase: Phase, load: Load) -> Attempt:
        device = self.updater.world.device
        margin = _margin(device)
        _release(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        beside: list[object] = [_bytes(n, device) for n in (margin, self.state[phase.name])]
        beside += self._train(phase, load)
        if load.evaluation:
            try:
                self._evaluate(load.evaluation)
            except RuntimeError as error:
                if ran_out(error):
                    return Attempt(failed="evaluation")
                raise
        if device.type != "cuda":
            return Attempt()
        torch.cuda.synchronize(device)
        return Attempt(peak=torch.cuda.max_memory_allocated(device) - margin)

    def _train(self, phase: Phase, load: Load) -> list[object]:
        """One micro-batch; what it leaves on the device until the next one."""
        world = self.updater.world
        phase_model = prepare_phase(self.net, phase, self.plan, world=world, compiled=False)
        gradients = sum(p.numel() * p.element_size() for p in phase_model.parameters)
        buckets = world.distributed or self.ranks > 1  # they hold the gradients once more until ranks have shared them
        left = [] if world.distributed or not buckets else [_bytes(gradients, world.device)]
        if load.accumulates:
            for parameter in phase_model.parameters:
                parameter.grad = torch.zeros_like(parameter)
        with _gone_into_buckets(phase_model, when=buckets and not load.accumulates):
            batch = self._batch(load.samples)
            coming = torch.empty_like(batch.images)
            replace(self.updater, ranks=Ranks()).backward(phase_model, batch)  # a rank may run out of memory alone
        del batch
        if not self.updater.optimizer.defaults.get("fused"):  # else an update is one kernel, and makes nothing
            _bytes(max(gradients, 3 * self._largest_group()), world.device)
        return [*left, coming, phase_model]  # DDP's buckets live as long as its wrapper

    def _largest_group(self) -> int:
        """Bytes of what trains in one of the optimizer's groups, which it updates one after the other."""
        groups: list[list[torch.Tensor]] = [group["params"] for group in self.updater.optimizer.param_groups]
        return max((sum(p.numel() * p.element_size() for p in g if p.requires_grad) for g in groups), default=0)

    @torch.no_grad()
    def _evaluate(self, samples: int) -> None:
        self.net.train()
        self.net.eval()
        batch = self._batch(samples)
        with self.updater.world.autocast():
            output = self.net(self.updater.normalise(batch.images[:samples]))
        logits = output[0] if isinstance(output, tuple) else output
        self.updater.task.meter(self.updater.world.device).update(logits, batch.targets, batch.ids)

    def _batch(self, samples: int) -> Batch:
        """Noise as a loader would bring it: the first of several micro-batches, so that no gradient is shared."""
        device, guests = self.updater.world.device, 2 if self.mixed else 0
        images = torch.randint(0, 256, (samples + guests, *self.shape), dtype=torch.uint8, device=device)
        targets = made_up(all_targets(self.updater.task), samples, device)
        labels, ids = torch.zeros(samples, dtype=torch.int64, device=device), torch.arange(samples)
        mix = _mix(labels, targets, self.shape) if self.mixed else None
        parts = self.updater.task.parts
        scales = torch.ones(parts, device=device) if parts > 1 else None
        images = images.contiguous(memory_format=torch.channels_last)
        total = float(samples)
        return Batch(0, 0, 2, images, labels, ids, total=total, mix=mix, targets=targets, scales=scales)


def optimizer_states(plan: Plan, per_weight: float) -> dict[str, int]:
    """Bytes of an optimizer's state at the end of each phase, by name: of all that has trained since it was reset.

    Args:
        per_weight: bytes; see :func:`tlx.train.memory_estimate.optimizer_bytes`.
    """
    found: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for phase in plan.phases:
        own = {p.name: p.size for layer in plan.layers for p in phase.trained(layer)}
        sizes = own if phase.settings.optimizer_state == "reset" else sizes | own
        found[phase.name] = round(per_weight * sum(sizes.values()))
    return found


def distinct(plan: Plan, state: Mapping[str, int]) -> dict[str, Phase]:
    """For every phase, by name, the one that is tried for it: phases in which the same happens to the network are tried
    once, with the most that the optimizer keeps in any of them."""
    tried: dict[Any, Phase] = {}
    keys = {}
    for phase in plan.phases:
        learns = frozenset(p.name for layer in plan.layers for p in phase.trained(layer))
        frozen = frozenset(name for name, mode in phase.trains.items() if mode == "frozen")
        keys[phase.name] = key = (learns, frozen, phase.norm, phase.settings.stochastic)
        if key not in tried or state[phase.name] > state[tried[key].name]:
            tried[key] = phase
    return {name: tried[key] for name, key in keys.items()}


def ran_out(error: BaseException) -> bool:
    """Whether this is for want of memory, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    said = str(error)
    return any(words in said for words in _FULL) or (any(words in said for words in _NO_ALGORITHM) and _is_short())


def _is_short() -> bool:
    """Whether hardly anything of the GPU's memory is free."""
    if not torch.cuda.is_available():
        return False
    free, total = torch.cuda.mem_get_info()
    return free < 0.1 * total


def _mix(labels: torch.Tensor, targets: Mapping[str, torch.Tensor], shape: tuple[int, int, int]) -> Mix:
    """Each picture with the one two places on, cut and blended alike: the arithmetic is done for both anyway."""
    count, device = len(labels), labels.device
    box = torch.tensor([0, shape[1] // 2, 0, shape[2] // 2], device=device).repeat(count, 1)
    partner, cut = torch.arange(count, device=device) + 2, torch.ones(count, dtype=torch.bool, device=device)
    others = {name: values.flip(0) for name, values in targets.items()}
    return Mix(partner, labels, torch.full((count,), 0.75, device=device), box, cut, others)


def _bytes(count: int, device: torch.device) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8, device=device)


def _margin(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    allowed = torch.cuda.get_per_process_memory_fraction(device)
    return int(MARGIN * allowed * torch.cuda.get_device_properties(device).total_memory)


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


@contextmanager
def _gone_into_buckets(phase_model: PhaseModel, *, when: bool) -> Iterator[None]:
    """Each gradient goes as soon as it is there, as it does where a step has one micro-batch and DDP takes it over."""

    def forget(parameter: torch.Tensor) -> None:
        parameter.grad = None

    handles: list[Any] = []
    if when:
        handles += [p.register_post_accumulate_grad_hook(forget) for p in phase_model.parameters]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def lone_norms() -> Iterator[None]:
    """A synchronised BatchNorm computes alone meanwhile: its forward pass is a collective, and keeps as much."""
    forward = nn.SyncBatchNorm.forward
    nn.SyncBatchNorm.forward = _BatchNorm.forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.SyncBatchNorm.forward = forward  # type: ignore[method-assign]


@contextmanager
def unchanged(net: nn.Module, device: torch.device) -> Iterator[None]:
    """Afterwards modes, gradients, buffers and random states are what they were; weights nobody moves."""
    modes = [(module, module.training) for module in net.modules()]
    gradients = [(p, p.requires_grad, p.grad) for p in net.parameters()]
    buffers = [
        (module, name, buffer, buffer.detach().to("cpu", copy=True))  # not beside what is measured
        for module in net.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and 0 not in buffer.stride()  # into an expanded one nobody can write
    ]
    drawn = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    with own_randomness():
        try:
            yield
        finally:
            if drawn is not None:
                torch.cuda.set_rng_state(drawn, device)
            for module, training in modes:
                module.training = training
            for parameter, requires_grad, gradient in gradients:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    module._buffers[name] = buffer
                    buffer.copy_(value)
