"""One forward pass of a network in each mode before anything trains: does it take the images, and what does it return?

Evaluation mode, and training mode as the plan's phases mean it: some of a network runs in training mode only, an
auxiliary classifier for one, and only while its layer trains. The pass is on shapes alone, with no weights and hardly
any memory, so `tlx plan` makes the same one as a training. Where the network needs values for it, a training makes it
on its device, and the plan says that it could not be tried.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tlx.base.errors import UserError
from tlx.base.inputs import InputSpec
from tlx.base.plug import raised
from tlx.data.stream.randomness import own_randomness
from tlx.models import Backbone, source
from tlx.models.layers.trace import needs_values
from tlx.models.weights.provenance import SIZE_ARGUMENTS
from tlx.plan.plan import Phase, Plan
from tlx.train.freeze import unfreeze
from tlx.train.memory_trial import lone_norms, ran_out, unchanged


@dataclass(frozen=True)
class DryRun:
    """What is tried.

    Attributes:
        spec: of the images, as the configuration wants them.
        classes: what the logits must be for.
        check: is given what the network returns in training mode: whether the objective takes it.
    """

    backbone: Backbone
    plan: Plan
    spec: InputSpec
    classes: int
    check: Callable[[Any], None] | None = None

    def on_shapes(self) -> str | None:
        """Tries every mode on shapes alone.

        Returns:
            Why that was not possible; None where it was.

        Raises:
            UserError: the network does not take the images, or returns something else than logits.
        """
        try:
            net = empty_copy(self.backbone.module)
        except Exception as error:  # of other people's modules
            return f"it cannot be copied: {_first_line(error)}"
        for phase in (None, *largest(self.plan)):
            try:
                with own_randomness():
                    self._try(net, phase, torch.device("meta"))
            except UserError:
                raise
            except Exception as error:
                if not needs_values(error) and not ran_out(error):
                    raise self._refusal(error, phase) from error
                return f"{_mode(phase)}: {_first_line(error)}"
        return None

    def on_device(self, device: torch.device) -> None:
        """Tries every mode with values, and leaves the network as it was.

        Raises:
            UserError: as :meth:`on_shapes`.
            RuntimeError: the device's memory does not suffice.
        """
        for phase in (None, *largest(self.plan)):
            try:
                with unchanged(self.backbone.module, device):
                    self._try(self.backbone.module, phase, device)
            except UserError:
                raise
            except Exception as error:  # of other people's modules
                if ran_out(error):
                    raise
                raise self._refusal(error, phase) from error

    def _try(self, net: nn.Module, phase: Phase | None, device: torch.device) -> None:
        if phase is None:
            net.eval()
        else:
            unfreeze(net, phase, self.plan)
        samples = 1 if phase is None else 2  # BatchNorm of one may have one value per channel
        with torch.no_grad(), lone_norms():
            output = net(torch.zeros(samples, self.spec.channels, *self.spec.size, device=device))
        wrong = wrong_output(output, (samples, self.classes), training=phase is not None)
        if wrong is not None:
            raise UserError(
                f"the network returns {wrong} {_mode(phase)}",
                where=f"backbone {self.backbone.name}, its head",
                todo=f"it must return logits [N, {self.classes}]; in training mode also a tuple that begins with them, "
                "the rest auxiliary logits of that shape or None",
            )
        if phase is not None and self.check is not None:
            self.check(output)

    def _refusal(self, error: Exception, phase: Phase | None) -> UserError:
        height, width = self.spec.size
        other = self.spec.size != self.backbone.input.size
        training = f" {_mode(phase)}" if phase is not None else ""
        plain = isinstance(error, (RuntimeError, ValueError, AssertionError))  # of layers, which say what they need
        return UserError(
            f"the backbone does not take images of {height} x {width}{training}: "
            + (_first_line(error) if plain else raised(error)),
            where="input.size" if other else f"backbone {self.backbone.name}",
            todo=self._remedy(training=phase is not None),
        )

    def _remedy(self, *, training: bool) -> str:
        own, size = self.backbone.input.size, self.spec.size
        known: tuple[str, ...] = ()
        with suppress(UserError):  # a network of nobody's, brought by a function
            known = source(self.backbone.name).arguments()
        todo = [] if own == size else [f"input.size: {_sides(own)}, which {self.backbone.name} is made for"]
        todo += [f"backbone.args: {{{a}: {_sides(size)}}}" for a in SIZE_ARGUMENTS if a in known and own != size]
        if training and self.backbone.auxiliary and "aux_logits" in known:
            todo.append("backbone.args: {aux_logits: false}")
        return "set " + ", or ".join(todo) if todo else "see backbone.args and the network's own documentation"


def wrong_output(output: Any, shape: tuple[int, int], *, training: bool) -> str | None:
    """What is wrong with what a network has returned, in words; None where nothing is."""
    main, *rest = output if isinstance(output, tuple) and output else (output,)
    for place, value in enumerate([main, *rest] if training else [main]):
        if value is None and place:
            continue
        if not isinstance(value, torch.Tensor):
            return f"{_kind(value)}{f' as output {place}' if place else ''}"
        if tuple(value.shape) != shape or not value.is_floating_point():
            what = f"{tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
            return f"{what}{f' as auxiliary logits {place}' if place else ''}, needed is {shape}"
    return None


def largest(plan: Plan) -> list[Phase]:
    """The phases with the most of the network in training mode: all but those that do a part of what another does."""
    runs = {phase.name: frozenset(_in_training(phase)) for phase in plan.phases}
    last = {does: name for name, does in runs.items()}
    return [p for p in plan.phases if last[runs[p.name]] == p.name and not any(runs[p.name] < o for o in last)]


def _in_training(phase: Phase) -> Iterator[str]:
    for layer in phase.layers:
        if phase.trains[layer.name] != "frozen" or phase.settings.stochastic == "on":
            yield layer.name
        if layer.norms and phase.norm_state(layer).statistics == "moving":
            yield f"{layer.name}, its norms"
        if any(p.auxiliary for p in layer.parameters):  # None stands for the logits of a frozen one
            trained = any(p.auxiliary for p in phase.trained(layer))
            yield f"{layer.name}, {'with' if trained else 'without'} its auxiliary classifiers"


def empty_copy(net: nn.Module) -> nn.Module:
    """The same modules with their hooks, on the meta device; nothing that is done to it reaches `net`."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in net.parameters()
    }
    memo |= {id(b): b.detach().to("meta") for b in net.buffers()}
    return copy.deepcopy(net, memo)


def _mode(phase: Phase | None) -> str:
    return "in evaluation mode" if phase is None else f"in training mode (phase {phase.name})"


def _kind(value: object) -> str:
    return "None" if value is None else f"{'an' if type(value).__name__[0] in 'aeiou' else 'a'} {type(value).__name__}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _sides(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)
