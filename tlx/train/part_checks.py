"""Objectives, optimizers and trackers, checked when they are made: they may come from anybody's package.

One that lacks a method, raises, or gives the wrong thing is its user's mistake, told with the part's name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from tlx.base import plug
from tlx.base.errors import UserError, did_you_mean
from tlx.base.metrics import Metric
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


_WORDS = ("targets", "heads", "outputs", "constants", "metrics", "metric", "shown", "parts", "lists")


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
            what = f"{label}: {name}"
            act = functools.partial(plug.call, what, getattr(objective, name))
            _check_sum(lambda times: act(*(doubled if times > 1 else given)), label=what, learns=name == "loss")  # noqa: B023


def check_task(task: Any, *, mixed: bool, label: str, metric: str | None = None) -> None:
    """Tries a :class:`tlx.tasks.Task` on made-up outputs and targets.

    Args:
        mixed: samples are mixed (mixup, cutmix).
        metric: what its function says that chooses the best checkpoint; None: it is not asked.

    Raises:
        UserError: something that a task has is not there or of another kind; a metric whose name and direction do not
            agree; one that chooses and is none of its metrics, or not what the function says; a loss that is no sum
            over samples in a scalar tensor, not finite, that no gradient comes from, or that partners of mixed samples
            have no part in; a meter that does not give what the task says; an exception.
    """
    import torch

    from tlx.data.stream.randomness import own_randomness
    from tlx.tasks import Truth, all_targets, columns_of
    from tlx.tasks.made_up import made_up

    check_methods(task, ("weights", "loss", "hits", "meter", "rows"), label=label)
    if lacking := [name for name in _WORDS if not hasattr(task, name)]:
        raise UserError(f"{label} returned {type(task).__name__}, which has no {' and no '.join(lacking)}")
    _check_words(task, label=label)
    if metric is not None and metric != task.metric:
        what = f'{label} chooses by "{task.metric}", and its function says "{metric}"'
        raise UserError(what, todo=f'write FUNCTION.metric = "{task.metric}" below the function')
    count = columns_of(task)

    def truth(times: int) -> Truth:
        own = {name: values.repeat(times, *[1] * (values.ndim - 1)) for name, values in values_of.items()}
        others = {name: values.flip(0) for name, values in own.items()} if mixed else None
        scales = torch.ones(task.parts) if task.parts > 1 else None
        return Truth(own, others, torch.full((times * SAMPLES,), 0.75) if mixed else None, scales)

    with own_randomness():
        values_of = made_up(all_targets(task), SAMPLES)
        outputs = torch.linspace(-1, 1, SAMPLES * count).reshape(SAMPLES, count)
        outputs[:, count - len(task.constants) :] = 0.5  # the same in every row
        outputs.requires_grad_()
        _check_sum(
            lambda times: plug.call(f"{label}: loss", task.loss, outputs.repeat(times, 1), truth(times)),
            label=f"{label}: loss",
            learns=True,
        )
        if mixed:
            _check_mixing(task, values_of, label=label)
        weights = plug.call(f"{label}: weights", task.weights, {n: v.numpy() for n, v in values_of.items()})
        if weights is None and task.parts > 1:
            raise UserError(f"{label}: weights are None, of {task.parts} parts", todo="an array [n, parts]")
        if weights is not None and getattr(weights, "shape", None) != (SAMPLES, task.parts):
            what = f"{label}: weights have the shape {getattr(weights, 'shape', None)}"
            raise UserError(what, todo=f"[n, parts], here {(SAMPLES, task.parts)}")
        hits = plug.call(f"{label}: hits", task.hits, outputs.detach(), values_of)
        if getattr(hits, "shape", None) != (2,):
            raise UserError(f"{label}: hits are no tensor of a sum, and how many samples it is of")
        _check_meter(task, outputs.detach(), values_of, label=label)


def _check_mixing(task: Any, values: Mapping[str, Any], *, label: str) -> None:
    """Where the loss of a plain sample changes with a target, that of a sample which is all its partner's must change
    with the partner's."""
    import torch

    from tlx.tasks import Truth
    from tlx.tasks.made_up import made_up

    constants = torch.full((SAMPLES, len(task.constants)), 0.5)
    drawn = torch.arange(float(SAMPLES * len(task.outputs))).cos().reshape(SAMPLES, -1)
    scales = torch.ones(task.parts) if task.parts > 1 else None
    others = {name: of[1:] for name, of in made_up(task.targets, SAMPLES + 1).items()}

    def loss(own: Any, partner: Any, lam: float) -> float:
        truth = Truth(own, partner, torch.full((SAMPLES,), lam), scales)
        return float(plug.call(f"{label}: loss", task.loss, torch.hstack([drawn, constants]), truth))

    for name in task.targets:
        changed = {**values, name: others[name]}
        before, after = loss(values, values, 1.0), loss(changed, values, 1.0)
        if not math.isclose(before, after, rel_tol=1e-5, abs_tol=1e-6) and math.isclose(
            loss(values, values, 0.0), loss(values, changed, 0.0), rel_tol=1e-6
        ):
            raise UserError(
                f'{label} does not mix: its loss is the same whatever "{name}" is of the samples that are mixed in',
                where="mix",
                todo="let its loss use truth.partner and truth.lam, as tlx.tasks.mixing.summed does; or leave out mix",
            )


def _check_words(task: Any, *, label: str) -> None:
    if sum(task.heads.values()) != len(task.outputs):
        raise UserError(f"{label} names {len(task.outputs)} outputs, and its heads give {sum(task.heads.values())}")
    if len(task.heads) > 1 and "" in task.heads:
        raise UserError(f"{label} has several heads, one without a name")
    if "loss" not in task.metrics:
        raise UserError(f"{label} has no metric loss", todo="every task has one: ties are broken by it")
    if task.metric not in task.metrics:
        near = did_you_mean(task.metric, task.metrics)
        raise UserError(f'{label} chooses by "{task.metric}", which is none of its metrics{near}')
    for name, higher in task.metrics.items():
        if Metric(f"val/{name}").higher_is_better != higher:
            way = "higher" if higher else "lower"
            raise UserError(
                f"{label}: {name} is better when it is {way}, which its name does not say",
                todo="the last word of a metric's name is loss, error, mae, mse, rmse or distance where lower is "
                "better, and none of these where higher is",
            )


def _check_meter(task: Any, outputs: Any, values: Any, *, label: str) -> None:
    import torch

    meter = plug.call(f"{label}: meter", task.meter, torch.device("cpu"))
    check_methods(meter, ("update", "result"), label=f"{label}: meter")
    plug.call(f"{label}: update of its meter", meter.update, outputs, values, torch.arange(SAMPLES))
    result = plug.call(f"{label}: result of its meter", meter.result)
    missing = [name for name in (*task.metrics, "samples", *task.lists) if name not in result]
    if missing:
        raise UserError(f"{label}: its meter gives no {', '.join(missing)}")
    rows = plug.call(f"{label}: rows", task.rows, outputs[:, : len(task.outputs)], result)
    if not isinstance(rows, list) or len(rows) != SAMPLES:
        raise UserError(f"{label}: rows of {SAMPLES} samples are no list of as many")


def unmeasured(task: Any, absent: Sequence[str]) -> set[str]:
    """Metrics of a task that are not a number where no sample has these targets, and are one where samples do."""
    import torch

    from tlx.tasks import all_targets, columns_of
    from tlx.tasks.made_up import made_up, missing

    count = columns_of(task)
    outputs = torch.linspace(-1, 1, SAMPLES * count).reshape(SAMPLES, count)
    there = made_up(all_targets(task), SAMPLES)
    lacking = {name: missing(values) if name in absent else values for name, values in there.items()}

    def numbers(values: Any) -> set[str]:
        meter = task.meter(torch.device("cpu"))
        meter.update(outputs, values, torch.arange(SAMPLES))
        result = meter.result()
        return {name for name in task.metrics if math.isfinite(result[name])}

    return numbers(there) - numbers(lacking)


def _check_sum(loss_of: Callable[[int], Any], *, label: str, learns: bool) -> None:
    """
    Args:
        loss_of: of the same samples so many times.
        learns: a gradient must come from it.
    """
    once, again = _scalar(loss_of(1), label=label), _scalar(loss_of(2), label=label)
    if learns and not once.requires_grad:
        raise UserError(f"{label} does not depend on the network's output by a gradient: nothing would learn")
    one, two = float(once.detach()), float(again.detach())
    if abs(one) > 1e-6 and math.isclose(one, two, rel_tol=1e-4):
        raise UserError(
            f"{label} is the same for samples given once and twice, so it is a mean over samples",
            todo="return the sum over samples; the loop divides by the loss normaliser",
        )


def check_training_output(task: Any, output: Any, *, mixed: bool, label: str) -> None:
    """Tries a task on what the network returns in training mode, where that is more than logits.

    Args:
        output: a tuple of logits [N, outputs] and auxiliary logits of that shape, None for those of a frozen
            classifier; of any device, since only shapes are read.
        mixed: samples are mixed (mixup, cutmix).

    Raises:
        UserError: it does not take the tuple, or leaves some of the auxiliary logits out, so that their classifier
            would get no gradient, for which DistributedDataParallel waits.
    """
    import torch

    from tlx.data.stream.randomness import own_randomness
    from tlx.tasks import Truth, all_targets
    from tlx.tasks.made_up import made_up

    if not isinstance(output, tuple):
        return
    samples = len(output[0])
    made: list[Any] = [
        None if o is None else torch.linspace(-1, 1, o.numel()).reshape(o.shape).requires_grad_() for o in output
    ]
    given = type(output)(*made) if hasattr(output, "_fields") else tuple(made)
    words = ", ".join("logits" if not n else "None" if o is None else "auxiliary logits" for n, o in enumerate(output))
    what = f"{label}: loss of ({words}), as the network returns it in training mode,"
    own = made_up(all_targets(task), samples)
    others = {name: values.flip(0) for name, values in own.items()} if mixed else None
    scales = torch.ones(task.parts) if task.parts > 1 else None
    truth = Truth(own, others, torch.full((samples,), 0.75) if mixed else None, scales)
    with own_randomness():
        loss = _scalar(plug.call(what, task.loss, given, truth), label=what)
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
