"""Networks of torchvision."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pickle import UnpicklingError
from typing import Any

import torchvision
from torch import nn
from torchvision.models import get_model_builder, get_model_weights, list_models

from tlx.base.errors import UserError
from tlx.base.inputs import InputSpec
from tlx.models.channels import RGB, rechannel
from tlx.models.layers.trace import Uninitialised
from tlx.models.libraries.sources import check_arguments, required, signature
from tlx.models.weights import download, files
from tlx.models.weights.formats import format_of, refused


@cache
def names() -> tuple[str, ...]:
    """torchvision's classification networks."""
    return tuple(list_models(module=torchvision.models))


@dataclass(frozen=True)
class Torchvision:
    """A :class:`tlx.models.libraries.sources.Source`."""

    model: str
    ships_weights = True

    @property
    def name(self) -> str:
        return f"torchvision/{self.model}"

    def check(self, args: Mapping[str, Any]) -> dict[str, Any]:
        return check_arguments(args, self._signature(), label=self.name, fixed=self._fixed())

    def build(self, classes: int, args: Mapping[str, Any], tag: str | None, channels: int = 3) -> nn.Module:
        known = self._signature()
        more: dict[str, Any] = {"num_classes": classes}
        if "image_size" in known:  # the weights fix it: 518 for vit_h_14
            more["image_size"] = self._preset(tag).crop_size[0]
        if "init_weights" in known:
            more["init_weights"] = True
        net: nn.Module = get_model_builder(self.model)(weights=None, **{**more, **args})
        if channels != RGB:
            rechannel(net, channels, self.input(net, args, tag).size)
        return net

    def input(self, net: nn.Module, args: Mapping[str, Any], tag: str | None) -> InputSpec:
        preset = self._preset(tag)
        size = args.get("image_size") or args.get("input_size") or preset.crop_size[0]
        height, width = (size, size) if isinstance(size, int) else size
        mean, std = tuple(preset.mean), tuple(preset.std)
        if "transform_input" in self._signature() and not args.get("transform_input", False):
            # torchvision's builder switches a rescaling inside the network on for pretrained weights, and off for the
            # plain network that reads our files; the same pixels reach the weights when it stays off and we scale
            mean = std = (0.5, 0.5, 0.5)
        return InputSpec(
            size=(int(height), int(width)),
            mean=mean,
            std=std,
            interpolation=preset.interpolation.value,
            crop_pct=preset.crop_size[0] / preset.resize_size[0],
        )

    def labels(self, net: nn.Module) -> None:
        return None

    def tags(self) -> tuple[str, ...]:
        enum = get_model_weights(self.model)
        return tuple(dict.fromkeys([enum.DEFAULT.name, *(member.name for member in enum)]))

    def pretrained(self, args: Mapping[str, Any], tag: str) -> files.State:
        """From a network that torchvision itself fills, so that its own renaming of old files is used."""
        member = self._member(tag)
        path = download.from_url(member.url)
        format_of(path)
        more = {name: value for name, value in args.items() if name not in ("image_size", "transform_input")}
        if "aux_logits" in self._signature():
            more.setdefault("aux_logits", True)
        try:
            with Uninitialised(), files.unpickled():
                return dict(get_model_builder(self.model)(weights=member, **more).state_dict())
        except Exception as error:  # torchvision's and torch's own, for what does not fit or is damaged
            if isinstance(error, UnpicklingError):
                raise refused(path, error) from error
            why = " ".join(str(error).split())[:300]
            raise UserError(
                f"torchvision cannot load the weights of {self.name}{' with these args' if more else ''}: {why}",
                where=str(path),
                todo="leave out the args that change the network's shape, or use weights: none",
            ) from error

    def trained_size(self, tag: str) -> tuple[int, int]:
        side = int(self._preset(tag).crop_size[0])
        return side, side

    def convert(self, args: Mapping[str, Any]) -> files.Convert | None:
        """Position embeddings resized by torchvision's own function; auxiliary classifiers left that are not wanted."""
        known = self._signature()
        if "image_size" in known:
            return _resized
        return _without_auxiliary if "aux_logits" in known else None

    def arguments(self) -> tuple[str, ...]:
        return tuple(name for name in self._signature() if name not in self._fixed())

    def _class(self) -> type:
        found: type = typing.get_type_hints(get_model_builder(self.model))["return"]
        return found

    def _signature(self) -> dict[str, Any]:
        return signature(self._class())

    def _fixed(self) -> set[str]:
        """What makes the variant: torchvision's builders pass it, these two aside, which they merely default."""
        return required(self._class()) - {"image_size", "dropout"}

    def _member(self, tag: str | None) -> Any:
        enum = get_model_weights(self.model)
        return enum[tag] if tag else enum.DEFAULT

    def _preset(self, tag: str | None) -> Any:
        return self._member(tag).transforms()


def find(model: str) -> Torchvision | None:
    """The network called `model`, if torchvision has one."""
    return Torchvision(model) if model in names() else None


def _resized(state: files.State, net: nn.Module) -> files.State:
    from torchvision.models.vision_transformer import interpolate_embeddings

    size, patch = typing.cast(int, net.image_size), typing.cast(int, net.patch_size)
    return dict(interpolate_embeddings(size, patch, typing.cast(Any, dict(state))))


def _without_auxiliary(state: files.State, net: nn.Module) -> files.State:
    absent = tuple(f"{name}." for name in ("AuxLogits", "aux1", "aux2") if getattr(net, name, None) is None)
    return {name: tensor for name, tensor in state.items() if not name.startswith(absent)}
