"""How much memory a phase needs: an estimate from one training pass on tensors without storage.

What is counted: the weights, their gradients, the optimizer's state, a moving average, and what the forward pass of one
micro-batch keeps for the backward pass, in the precision that the loop uses, and the largest layer's input and output
on top (in a frozen network that is nearly all there is). What is not: the context of the GPU's driver (about half a
GiB), the allocator's unused pieces, and what kernels need while they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from tlx.base.errors import UserError
from tlx.models.layers.trace import needs_values
from tlx.plan.memory import Memory
from tlx.plan.plan import Plan
from tlx.train.freeze import unfreeze
from tlx.train.memory_trial import ran_out


@dataclass(frozen=True)
class Images:
    """What goes through the network at once: how many, their shape, and the precision of the arithmetic."""

    count: int
    shape: tuple[int, int, int]
    precision: str


def memory_by_phase(
    plan: Plan,
    net: nn.Module,
    images: Images,
    optimizer: Callable[[list[dict[str, Any]]], Optimizer],
    *,
    averaged: bool,
    recomputed: Sequence[str] = (),
) -> Mapping[str, Memory]:
    """The memory of every phase, by name.

    Args:
        net: the plan's network; its parameters may be on the meta device. Left in the last phase's mode.
        optimizer: makes it from parameter groups.
        averaged: whether a moving average of the weights is kept.
        recomputed: blocks whose activations are computed again in the backward pass.

    Raises:
        UserError: the network does not run on these images.
    """
    held = sum(t.numel() * t.element_size() for t in [*net.parameters(), *net.buffers()])
    per_weight = optimizer_bytes(optimizer)
    known: dict[frozenset[str], int | None] = {}
    stateful: set[str] = set()
    sizes = {p.name: p.size for layer in plan.layers for p in layer.parameters}
    found = {}
    for phase in plan.phases:
        unfreeze(net, phase, plan)
        trained = frozenset(name for name, p in net.named_parameters() if p.requires_grad)
        stateful = set(trained) if phase.settings.optimizer_state == "reset" else stateful | trained
        key = trained | {f"{phase.settings.norm} {phase.settings.stochastic}"}
        if key not in known:
            try:
                known[key] = activation_bytes(net, images, recomputed=recomputed)
            except Exception as error:
                of = f"{images.count} images of {' x '.join(map(str, images.shape[1:]))}"
                what = f"the network does not train on {of}: {(str(error).splitlines() or [''])[0]}"
                raise UserError(
                    what, where=f"phase {phase.name}", todo="see input.size and loop.micro_batch"
                ) from error
        found[phase.name] = Memory(
            weights=held * (2 if averaged else 1),
            gradients=4 * sum(sizes[name] for name in trained),
            optimizer=round(per_weight * sum(sizes[name] for name in stateful)),
            activations=known[key],
        )
    return found


def optimizer_bytes(optimizer: Callable[[list[dict[str, Any]]], Optimizer], count: int = 1024) -> float:
    """Bytes of state per weight, found by one step of the optimizer itself."""
    weights = nn.Parameter(torch.zeros(count // 32, 32))
    made = optimizer([{"params": [weights], "names": ["weights"], "layer": "any", "lr": 0.1}])
    weights.grad = torch.ones_like(weights)
    made.step()
    state = [t for t in tree_leaves(made.state[weights]) if isinstance(t, torch.Tensor) and t.numel() > 1]
    return sum(t.numel() * t.element_size() for t in state) / count


def activation_bytes(net: nn.Module, images: Images, *, recomputed: Sequence[str] = ()) -> int | None:
    """Bytes that one forward pass needs and keeps for the backward pass, as the network stands (what trains, norms).

    What is kept equals what the same pass with values keeps on a CPU. A GPU's kernels may keep a little more or less.

    Returns:
        None where the network does not run without values.

    Raises:
        Exception: of other people's code: it does not run with values either.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        own = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in _tensors(net)}
        for name, parameter in net.named_parameters():
            own[name].requires_grad_(parameter.requires_grad)
        batch = torch.empty(images.count, *images.shape)
        ledger = _Ledger(tuple(own.values()))
        try:
            with ledger.watching(net, recomputed), _autocast(images.precision):
                torch.func.functional_call(net, own, (batch,))
        except Exception as error:
            # a CPU's autocast casts fewer operations than a GPU's
            if needs_values(error) or ran_out(error) or images.precision != "fp32":
                return None
            raise
        return ledger.kept + ledger.working + batch.numel()  # and the bytes that came from the loader


def _tensors(net: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*net.named_parameters(), *net.named_buffers()]


def _autocast(precision: str) -> torch.autocast:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)


class _Ledger:
    """Adds up storages that the backward pass will want, the network's own left out."""

    def __init__(self, own: Sequence[torch.Tensor]) -> None:
        self.working = 0
        """The most that one module without children takes and returns."""
        self._own = own
        self._seen = {t.untyped_storage()._cdata for t in own}
        self._alive: list[Any] = []  # so that no address is used twice
        self._outside = 0
        self._inside: dict[str, int] = {}
        self._inputs = 0
        self._block = ""

    @property
    def kept(self) -> int:
        """Recomputed blocks keep their inputs, and one block at a time all of its own."""
        return self._outside + self._inputs + max(self._inside.values(), default=0)

    @contextmanager
    def watching(self, net: nn.Module, recomputed: Sequence[str]) -> Iterator[None]:
        modules = dict(net.named_modules())
        handles = []
        for path in recomputed:
            handles.append(modules[path].register_forward_pre_hook(self._enter(path)))
            handles.append(modules[path].register_forward_hook(self._leave))
        handles += [
            m.register_forward_hook(self._work) for m in modules.values() if not any(True for _ in m.children())
        ]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda packed: packed):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            inputs = _in(args)
            if any(t.requires_grad for t in [*inputs, *module.parameters()]):
                self._block = path
                self._inputs += sum(self._new(t) for t in inputs)

        return hook

    def _leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._block = ""

    def _work(self, _module: nn.Module, args: Any, output: Any) -> None:
        self.working = max(self.working, sum(t.numel() * t.element_size() for t in _in((args, output))))

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._block:
            self._inside[self._block] = self._inside.get(self._block, 0) + self._new(tensor)
        else:
            self._outside += self._new(tensor)
        return tensor

    def _new(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata in self._seen:
            return 0
        self._seen.add(storage._cdata)
        self._alive.append(storage)
        return storage.nbytes()


def _in(values: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]
