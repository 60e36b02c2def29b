"""Auxiliary classifiers: what a network returns beside its logits, to train the layers below (Szegedy et al. 2015).

One is a classifier that the logits are not made of: it runs in training mode only (GoogLeNet and Inception of
torchvision), or its output is returned behind the logits (Inception of timm). Two classifiers whose answers the network
puts together, as in distilled transformers, are both the head.

Its branch **hangs on** the last module that both the branch and the logits are made of. It belongs to that module's
layer and trains where the whole layer does. While its classifier is frozen, None stands for its logits, and where the
branch is a module of its own it is not computed either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from tlx.models.layers.groups import within
from tlx.models.layers.trace import Trace, needs_values, trace
from tlx.models.layers.units import Unit

Branches = Mapping[str, Sequence[str]]
"""Path of a module that only auxiliary logits are made of -> the modules that its branch and the logits are made of,
the last one first; none where that is not known."""


@dataclass(frozen=True)
class Auxiliary:
    """The auxiliary classifiers of a network.

    Attributes:
        heads: their paths.
        branches: all modules that only auxiliary logits are made of.
        outputs: place in what the network returns in training mode -> path of the classifier that made it.
        modules: likewise, the module whose output that is; "" where the network goes on computing with it.
    """

    heads: tuple[str, ...]
    branches: Branches
    outputs: Mapping[int, str]
    modules: Mapping[int, str]


def is_auxiliary(path: str, seen: Trace) -> bool:
    """Whether a classifier that runs in evaluation mode has a part in later outputs alone."""
    return path not in seen.made_of[0] and any(path in made_of for made_of in seen.made_of[1:])


def auxiliary(net: nn.Module, heads: Sequence[str], size: tuple[int, int], channels: int) -> Auxiliary:
    """Follows the data to the auxiliary classifiers `heads`, in training mode.

    Where the network does not run on shapes alone in that mode, the classifiers are known and nothing else.

    Raises:
        Exception: of other people's code: the network does not run at all.
    """
    branches: dict[str, Sequence[str]] = dict.fromkeys(heads, ())
    outputs: dict[int, str] = {}
    modules: dict[int, str] = {}
    found = Auxiliary(tuple(heads), branches, outputs, modules)
    try:
        seen = trace(net, size, channels, training=True) if heads else Trace()
    except Exception as error:
        if not needs_values(error):
            raise
        return found
    for place, made_of in list(enumerate(seen.made_of))[1:]:
        own = made_of - seen.made_of[0]
        head = next((path for path in heads if path in own), None)
        if head is not None:
            shared = sorted((p for p in made_of - own if p), key=lambda p: seen.ended[p], reverse=True)
            branches |= dict.fromkeys((path for path in own if path), shared)
            outputs[place] = head
            modules[place] = seen.returned_by[place] if seen.returned_by[place] in own else ""
    return found


def branch_units(units: Sequence[Unit], branches: Branches, seen: Trace) -> dict[str, Sequence[str]]:
    """Paths of units that belong to a branch, each with what the branch hangs on; `seen` is the evaluation's."""
    main = seen.made_of[0]
    found = {}
    for unit in units:
        hangs_on = next((of for path, of in branches.items() if within(path, unit.path)), None)
        if hangs_on is not None and not any(within(path, unit.path) for path in main):
            found[unit.path] = hangs_on
    return found


def leave_out_frozen(net: nn.Module, found: Auxiliary) -> None:
    """From now on the logits of a frozen auxiliary classifier are None."""
    for place, head in found.outputs.items():
        module = net.get_submodule(found.modules[place]) if found.modules[place] else None
        if module is not None:
            module.forward = partial(_forward, net.get_submodule(head), module.forward)  # type: ignore[method-assign]
        else:
            net.register_forward_hook(partial(_leave_out, place=place, head=head))


def _forward(head: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs) if _trains(head) else None


def _leave_out(net: nn.Module, _args: Any, output: Any, *, place: int, head: str) -> Any:
    if not isinstance(output, tuple) or len(output) <= place or _trains(net.get_submodule(head)):
        return None  # as it is
    rest = (*output[:place], None, *output[place + 1 :])
    return type(output)(*rest) if hasattr(output, "_fields") else rest


def _trains(head: nn.Module) -> bool:
    return any(p.requires_grad for p in head.parameters())
