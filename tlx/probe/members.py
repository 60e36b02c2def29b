"""Heads that train together: those of one kind have their parameters in one tensor [members, ...], and a step of all of
them is one pass. Each is what it would be alone, within rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from tlx.base import plug
from tlx.base.errors import UserError, did_you_mean
from tlx.models.layers.kinds import kind
from tlx.plan.parts import Part


@dataclass(frozen=True)
class Member:
    """One head of a grid."""

    head: Part
    lr: float
    weight_decay: float

    def __str__(self) -> str:
        usual = plug.defaults(plug.find("head", self.head.name))
        said = {name: value for name, value in self.head.args.items() if value != _plain(usual.get(name))}
        args = ", ".join(f"{name}={value}" for name, value in said.items())
        name = f"{self.head.name}({args})" if args else self.head.name
        return f"{name} lr={self.lr:.3g} weight_decay={self.weight_decay:.3g}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class Stack:
    """Members of one kind of head, which begin with the same weights.

    Args:
        make: gives the head, with the weights that each of them begins with.
    """

    def __init__(self, members: Sequence[Member], make: Callable[[], nn.Module]) -> None:
        self.members = tuple(members)
        self.net = make()
        many = len(self.members)
        self.parameters = {name: _repeated(p, many).requires_grad_() for name, p in self.net.named_parameters()}
        self._buffers = {name: _repeated(b, many) for name, b in self.net.named_buffers()}

    def __call__(self, features: Tensor) -> Tensor:
        """Logits [members, n, classes] of features [n, width]; dropout draws for one as for all."""

        def one(parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Any:
            return functional_call(self.net, (dict(parameters), dict(buffers)), (features,))

        logits: Tensor = vmap(one, randomness="same")(self.parameters, self._buffers)
        return logits

    def kinds(self) -> dict[str, str]:
        """Of parameters, by name; see :mod:`tlx.models.layers.kinds`."""
        owners = dict(self.net.named_modules())
        return {name: kind(owners[name.rpartition(".")[0]], name, ()) for name in self.parameters}

    def state(self, number: int) -> dict[str, Tensor]:
        """Of one member, as its head alone has it."""
        return {name: t[number].detach().clone() for name, t in {**self.parameters, **self._buffers}.items()}


def _repeated(tensor: Tensor, many: int) -> Tensor:
    return tensor.detach()[None].repeat(many, *[1] * tensor.ndim)


@dataclass(frozen=True)
class Optimizer:
    """A configuration's optimizer, with a rate and a decay for each member: torch's own take one number.

    AdamW (Loshchilov and Hutter 2019), Adam (Kingma and Ba 2015) and SGD with momentum, in the order of operations that
    torch has.
    """

    name: str
    args: Mapping[str, Any]
    no_decay: Sequence[str]
    clip: float | None

    @classmethod
    def of(cls, part: Part, no_decay: Sequence[str], clip: float | None) -> Optimizer:
        """
        Raises:
            UserError: another one.
        """
        if part.name not in _UPDATES:
            what = f"a grid trains with {', '.join(_UPDATES)}{did_you_mean(part.name, _UPDATES)}"
            raise UserError(what, where=f"optimizer {part.name}", todo="optimizer=adamw")
        function = plug.find("optimizer", part.name)
        given = plug.arguments(function, part.args, label=f"optimizer {part.name}")
        return cls(part.name, {**plug.defaults(function), **given}, tuple(no_decay), clip)

    def updater(self, stack: Stack) -> Callable[[int, float], None]:
        """What makes a step of all members, from their gradients: called with the number of the step, from 1, and the
        factor that the curve gives rates there."""
        kinds, states = stack.kinds(), dict[str, dict[str, Tensor]]()
        rates = torch.tensor([member.lr for member in stack.members])
        decays = torch.tensor([member.weight_decay for member in stack.members])

        @torch.no_grad()
        def update(step: int, factor: float) -> None:
            gradients = {name: p.grad for name, p in stack.parameters.items() if p.grad is not None}
            if self.clip is not None:
                _clip(list(gradients.values()), self.clip)
            for name, gradient in gradients.items():
                parameter = stack.parameters[name]
                shape = (-1, *[1] * (parameter.ndim - 1))
                decay = torch.zeros_like(decays) if kinds[name] in self.no_decay else decays
                lr = factor * rates.view(shape)
                _UPDATES[self.name](parameter, gradient, states.setdefault(name, {}), lr, decay.view(shape), step, self)
                parameter.grad = None

        return update


def _clip(gradients: Sequence[Tensor], most: float) -> None:
    """Each member's gradient to this norm, where it is larger: as torch's clip_grad_norm_ has it."""
    norms = torch.stack([g.reshape(len(g), -1).square().sum(1) for g in gradients]).sum(0).sqrt()
    scale = (most / (norms + 1e-6)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))


def _adamw(
    p: Tensor, g: Tensor, state: dict[str, Tensor], lr: Tensor, decay: Tensor, step: int, own: Optimizer
) -> None:
    p.mul_(1 - lr * decay)
    _moments(p, g, state, lr, step, own)


def _adam(p: Tensor, g: Tensor, state: dict[str, Tensor], lr: Tensor, decay: Tensor, step: int, own: Optimizer) -> None:
    _moments(p, g + decay * p, state, lr, step, own)


def _moments(p: Tensor, g: Tensor, state: dict[str, Tensor], lr: Tensor, step: int, own: Optimizer) -> None:
    first, second = own.args["betas"]
    mean = state.setdefault("mean", torch.zeros_like(p)).lerp_(g, 1 - first)
    square = state.setdefault("square", torch.zeros_like(p)).mul_(second).addcmul_(g, g, value=1 - second)
    below = (square.sqrt() / (1 - second**step) ** 0.5).add_(own.args["eps"])
    p.sub_(lr / (1 - first**step) * (mean / below))


def _sgd(p: Tensor, g: Tensor, state: dict[str, Tensor], lr: Tensor, decay: Tensor, step: int, own: Optimizer) -> None:
    g, momentum = g + decay * p, own.args["momentum"]
    if momentum:
        moving = state.setdefault("momentum", torch.zeros_like(p)).mul_(momentum).add_(g)
        g = g + momentum * moving if own.args["nesterov"] else moving
    p.sub_(lr * g)


_UPDATES: Mapping[str, Callable[..., None]] = {"adamw": _adamw, "adam": _adam, "sgd": _sgd}
