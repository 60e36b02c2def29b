"""Networks from other packages: an entry point of the group ``tlx.backbone``, or ``package.module:function``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tlx.base import plug
from tlx.base.errors import ConfigError, UserError
from tlx.base.inputs import InputSpec
from tlx.models import Backbone
from tlx.models.channels import RGB, rechannel
from tlx.models.libraries.sources import RESERVED
from tlx.models.weights import files

IN_CHANS = "in_chans"


@dataclass(frozen=True)
class Outside:
    """A :class:`Source`. The function takes the number of classes, then keyword-only arguments.

    One that has a keyword argument `in_chans` is told by it how many channels the images have. Of any other's network
    the convolutions that take the image change, unless its `input` says that it takes so many.
    """

    name: str
    function: Callable[..., Any]
    ships_weights = False

    def check(self, args: Mapping[str, Any]) -> dict[str, Any]:
        if IN_CHANS in args and IN_CHANS in self._named():
            what = f'{self.name}: "{IN_CHANS}" cannot be set in args ({RESERVED[IN_CHANS]})'
            raise ConfigError([UserError(what, where=IN_CHANS)], where=self.name)
        return plug.arguments(self.function, args, label=self.name)

    def build(self, classes: int, args: Mapping[str, Any], tag: str | None, channels: int = 3) -> nn.Module:
        told = IN_CHANS in self._named()
        more = {IN_CHANS: channels} if told else {}
        net = plug.call(f"backbone {self.name}", self.function, classes, **more, **args)
        if not isinstance(net, nn.Module | Backbone):
            raise UserError(
                f"the function returned {type(net).__name__}",
                where=self.name,
                todo="it must return a torch.nn.Module (or a tlx.models.Backbone)",
            )
        if isinstance(net, Backbone):
            return net  # type: ignore[return-value]  # `load` takes it as it is
        spec = self.input(net, args, tag)
        if not told and spec.channels == RGB != channels:
            rechannel(net, channels, spec.size)
        return net

    def input(self, net: nn.Module, args: Mapping[str, Any], tag: str | None) -> InputSpec:
        """The network's attribute `input` if it is an InputSpec, else ImageNet's habit at 224 pixels."""
        own = getattr(net, "input", None)
        return own if isinstance(own, InputSpec) else InputSpec()

    def labels(self, net: nn.Module) -> None:
        return None

    def tags(self) -> tuple[str, ...]:
        return ()

    def pretrained(self, args: Mapping[str, Any], tag: str) -> files.State:
        raise UserError(f'{self.name} has no weights called "{tag}"', todo="use a file, or none")

    def trained_size(self, tag: str) -> None:
        return None

    def convert(self, args: Mapping[str, Any]) -> None:
        return None

    def arguments(self) -> tuple[str, ...]:
        return tuple(name for name in self._named() if name != IN_CHANS)

    def _named(self) -> tuple[str, ...]:
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def find(name: str) -> Outside:
    """Raises UserError: no such function, or it cannot be imported."""
    return Outside(name, plug.find("backbone", name))
