"""Objectives, optimizers and trackers, checked when they are made: they may come from anybody's package.

One that lacks a method, raises, or gives the wrong thing is its user's mistake, told with the part's name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from tlx.base import plug
from tlx.base.errors import UserError
from tlx.plan.returned_values import number

SAMPLES = 4


def check_methods(part: Any, methods: Sequence[str], *, label: str) -> None:
    """
    Raises:
        UserError: it lacks one of these methods.
    """
    missing = [name for name in methods if not callable(getattr(part, name, None))]
    if missing:
        raise UserError(f"{label} returned {type(part).__name__}, which has no method {' and no '.join(missing)}")


def check_objective(objective: Any, classes: int, *, mixed: bool, label: str) -> None:
    """Tries a :class:`tlx.tasks.objectives.Objective` on a few made-up logits.

    Args:
        mixed: samples are mixed (mixup, cutmix).

    Raises:
        UserError: class weights that are not one number, 0 or more, for each class; losses that are no sum over samples
            in a scalar tensor, not finite, or that no gradient comes from; an exception.
    """
    import torch

    from tlx.data.stream.randomness import own_randomness

    check_methods(objective, ("loss", "evaluation_loss"), label=label)
    _check_weights(getattr(objective, "class_weights", ...), classes, label=label)
    count = SAMPLES * classes
    logits = torch.linspace(-1, 1, count).reshape(SAMPLES, classes).requires_grad_()
    labels = torch.arange(SAMPLES) % classes
    mix = SimpleNamespace(partner_labels=labels.flip(0), lam=torch.full((SAMPLES,), 0.75)) if mixed else None
    twice_mix = mix and SimpleNamespace(partner_labels=mix.partner_labels.repeat(2), lam=mix.lam.repeat(2))
    twice = logits.repeat(2, 1), labels.repeat(2)
    with own_randomness():
        for name, given, doubled in (
            ("loss", (logits, labels, mix), (*twice, twice_mix)),
            ("evaluation_loss", (logits, labels), twice),
        ):
            act, what = getattr(objective, name), f"{label}: {name}"
            once = _scalar(plug.call(what, act, *given), label=what)
            if name == "loss" and not once.requires_grad:
                raise UserError(f"{what} does not depend on the network's output by a gradient: nothing would learn")
            again = _scalar(plug.call(what, act, *doubled), label=what)
            one, two = float(once.detach()), float(again.detach())
            if abs(one) > 1e-6 and math.isclose(one, two, rel_tol=1e-4):
                raise UserError(
                    f"{what} is the same for samples given once and twice, so it is a mean over samples",
                    todo="return the sum over samples; the loop divides by the loss normaliser",
                )


def check_training_output(objective: Any, output: Any, *, mixed: bool, label: str) -> None:
    """Tries an objective on what the network returns in training mode, where that is more than logits.

    Args:
        output: a tuple of logits [N, classes] and auxiliary logits of that shape, None for those of a frozen
            classifier; of any device, since only shapes are read.
        mixed: samples are mixed (mixup, cutmix).

    Raises:
        UserError: it does not take the tuple, or leaves some of the auxiliary logits out, so that their classifier
            would get no gradient, for which DistributedDataParallel waits.
    """
    import torch

    from tlx.data.stream.randomness import own_randomness

    if not isinstance(output, tuple):
        return
    samples, classes = output[0].shape
    made: list[Any] = [
        None if o is None else torch.linspace(-1, 1, o.numel()).reshape(o.shape).requires_grad_() for o in output
    ]
    given = type(output)(*made) if hasattr(output, "_fields") else tuple(made)
    words = ", ".join("logits" if not n else "None" if o is None else "auxiliary logits" for n, o in enumerate(output))
    what = f"{label}: loss of ({words}), as the network returns it in training mode,"
    labels = torch.arange(samples) % classes
    mix = SimpleNamespace(partner_labels=labels.flip(0), lam=torch.full((samples,), 0.75)) if mixed else None
    with own_randomness():
        loss = _scalar(plug.call(what, objective.loss, given, labels, mix), label=what)
    places = [n for n, o in enumerate(made) if o is not None]
    gradients = torch.autograd.grad(loss, [made[n] for n in places], allow_unused=True)
    unused = [str(n) for n, gradient in zip(places, gradients, strict=True) if gradient is None]
    if unused:
        raise UserError(
            f"{what} has no gradient for output {' and '.join(unused)}, so its classifier would not learn",
            todo="add the loss of each output that is not None, as cross_entropy does with `aux_weight`; or make the "
            "network without auxiliary classifiers (backbone.args: {aux_logits: false} in torchvision's)",
        )


def _check_weights(weights: Any, classes: int, *, label: str) -> None:
    if weights is None:
        return
    todo = "its attribute `class_weights` is None, or one finite number for each class, 0 or more, not all 0"
    if weights is ... or isinstance(weights, str) or not hasattr(weights, "__len__"):
        raise UserError(f"{label} has no class weights that can be used", todo=todo)
    if len(weights) != classes:
        raise UserError(f"{label} has {len(weights)} class weights for {classes} classes", todo=todo)
    numbers = [number(w) for w in weights]
    odd = next((w for w, n in zip(weights, numbers, strict=True) if n is None or not 0 <= n < math.inf), None)
    if odd is not None or not any(numbers):
        what = "only class weights of 0" if odd is None else f"a class weight of {odd!r:.100}"
        raise UserError(f"{label} has {what}", todo=todo)


def _scalar(loss: Any, *, label: str) -> Any:
    import torch

    if not isinstance(loss, torch.Tensor) or loss.ndim or not loss.is_floating_point():
        shape = f" of shape {tuple(loss.shape)} and type {loss.dtype}" if isinstance(loss, torch.Tensor) else ""
        raise UserError(
            f"{label} returned {type(loss).__name__}{shape}",
            todo="it must return a scalar tensor: the sum over samples",
        )
    if not torch.isfinite(loss):
        raise UserError(f"{label} is {float(loss.detach())} for logits between -1 and 1")
    return loss


def check_optimizer(optimizer: Any, groups: Sequence[dict[str, Any]], *, label: str) -> None:
    """
    Raises:
        UserError: no torch optimizer, or not one over all the parameter groups that it was given.
    """
    from torch.optim import Optimizer

    if not isinstance(optimizer, Optimizer):
        raise UserError(f"{label} returned {type(optimizer).__name__}", todo="it must return a torch.optim.Optimizer")
    given = {id(p) for group in groups for p in group["params"]}
    taken = [id(p) for group in optimizer.param_groups for p in group["params"]]
    if set(taken) != given or len(taken) != len(given):
        raise UserError(
            f"{label} has {len(set(taken))} parameters in its groups, and was given {len(given)}",
            todo="it must take every group that it is given, each parameter once",
        )
    lost = [key for key in ("names", "layer") if any(key not in group for group in optimizer.param_groups)]
    if lost:
        raise UserError(
            f"{label} has parameter groups without {' and '.join(lost)}",
            todo="hand the groups to the optimizer as they are: by these keys rates are set and states are saved",
        )
