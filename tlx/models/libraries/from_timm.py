"""Networks of timm."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
from timm.data import resolve_model_data_config
from timm.models import group_parameters, model_entrypoint
from torch import nn

from tlx.base.errors import UserError
from tlx.base.inputs import InputSpec
from tlx.models.channels import RGB
from tlx.models.layers.trace import Uninitialised, build_empty
from tlx.models.layers.units import Labels
from tlx.models.libraries.sources import check_arguments, signature
from tlx.models.libraries.timm_filter import converter
from tlx.models.weights import download, files
from tlx.models.weights.formats import format_of, reason, refused
from tlx.models.weights.provenance import SIZE_ARGUMENTS


@cache
def names() -> tuple[str, ...]:
    """timm's architectures."""
    return tuple(timm.list_models())


@cache
def _tags() -> dict[str, list[str]]:
    """Architecture -> tags of its pretrained weights."""
    found: dict[str, list[str]] = {}
    for name in timm.list_pretrained():
        model, _, tag = name.partition(".")
        if tag:
            found.setdefault(model, []).append(tag)
    return found


@dataclass(frozen=True)
class Timm:
    """A :class:`tlx.models.libraries.sources.Source`."""

    model: str
    tag: str = ""
    ships_weights = True

    @property
    def name(self) -> str:
        return f"timm/{self._tagged(None)}"

    def check(self, args: Mapping[str, Any]) -> dict[str, Any]:
        return check_arguments(args, _settable(self.model), label=self.name) if args else {}

    def build(self, classes: int, args: Mapping[str, Any], tag: str | None, channels: int = 3) -> nn.Module:
        more = {"in_chans": channels} if channels != RGB else {}
        net: nn.Module = timm.create_model(self._tagged(tag), num_classes=classes, **more, **args)
        return net

    def input(self, net: nn.Module, args: Mapping[str, Any], tag: str | None) -> InputSpec:
        found = resolve_model_data_config(net)
        size = args.get("img_size") or found["input_size"][1:]
        height, width = (size, size) if isinstance(size, int) else size
        known = found["interpolation"] in ("nearest", "bilinear", "bicubic")
        return InputSpec(
            size=(int(height), int(width)),
            mean=tuple(found["mean"]),
            std=tuple(found["std"]),
            interpolation=found["interpolation"] if known else "bicubic",
            crop_pct=float(found["crop_pct"]),
        )

    def labels(self, net: nn.Module) -> Labels | None:
        matcher: Any = getattr(net, "group_matcher", None)
        if matcher is None:
            return None
        try:
            return dict(group_parameters(net, matcher(coarse=False), reverse=True))
        except (LookupError, AttributeError, TypeError, ValueError, AssertionError, re.error):  # as good as none
            return None

    def tags(self) -> tuple[str, ...]:
        default = timm.get_pretrained_cfg(self.model)
        first = [self.tag] if self.tag else [default.tag or ""] if default is not None and default.has_weights else []
        return tuple(dict.fromkeys(first + _tags().get(self.model, [])))

    def pretrained(self, args: Mapping[str, Any], tag: str) -> files.State:
        """From a network that timm itself fills, so that its own filters are used, with `args` where timm manages.

        Pictures of another shape than a square are left to `weights.positions`: timm takes a grid of as many
        places for the same one.
        """
        overlay = self._located(tag)
        args = {name: value for name, value in args.items() if name not in SIZE_ARGUMENTS or _is_square(value)}
        if args:
            with suppress(Exception):  # the state without args then shows, tensor by tensor, what does not fit
                usual = build_empty(lambda: timm.create_model(self._tagged(tag))).state_dict()
                found = self._filled(overlay, args, tag)
                if found.keys() <= usual.keys():  # timm is not always strict: what args add stays as it was built
                    return found
        try:
            return self._filled(overlay, {}, tag)
        except Exception as error:  # of timm, torch and safetensors
            path = Path(str(overlay.get("file", self.name)))
            if path.suffix in files.SUFFIXES and path.is_file():
                format_of(path)
                if isinstance(error, UnpicklingError):
                    raise refused(path, error) from error
            raise UserError(
                f"timm cannot load the weights of {self.name}: {reason(error)}",
                where=str(path),
                todo="if damaged, delete it",
            ) from error

    def trained_size(self, tag: str) -> tuple[int, int] | None:
        cfg = timm.get_pretrained_cfg(self._tagged(tag))
        if cfg is None:
            return None
        _, height, width = cfg.input_size
        return height, width

    def convert(self, args: Mapping[str, Any]) -> files.Convert | None:
        """timm's filter of the network's own module: other layouts, position embeddings of another size."""
        return converter(self.model)

    def arguments(self) -> tuple[str, ...]:
        return tuple(_settable(self.model))

    def _tagged(self, tag: str | None) -> str:
        chosen = tag or self.tag
        return f"{self.model}.{chosen}" if chosen else self.model

    def _located(self, tag: str) -> dict[str, Any]:
        """Where timm is to read the weights, without asking any server for what is in a cache.

        Raises:
            NotHere: not in a cache, and no server answers.
        """
        cfg = timm.get_pretrained_cfg(self._tagged(tag))
        assert cfg is not None
        if cfg.file:
            return {}
        repository, _, revision = (cfg.hf_hub_id or "").partition("@")
        names = _filenames(cfg.hf_hub_filename)
        hubs = repository and download.cached(repository, names, revision or None)
        if not repository or (not hubs and cfg.url and download.torch_cache(cfg.url).is_file()):
            return {"file": str(download.from_url(cfg.url)), "custom_load": bool(cfg.custom_load)}
        path = hubs or download.from_hub(repository, names, revision or None)
        return {"file": str(path), "custom_load": cfg.custom_load == "hf"}

    def _filled(self, overlay: Mapping[str, Any], args: Mapping[str, Any], tag: str) -> files.State:
        with Uninitialised():
            net = timm.create_model(self._tagged(tag), pretrained=True, pretrained_cfg_overlay=overlay, **args)
        return dict(net.state_dict())


def find(model: str) -> Timm | None:
    """The network called `model` (``resnet50``, or with a tag, ``resnet50.a1_in1k``), if timm has one."""
    base, _, tag = model.partition(".")
    if base not in names() or (tag and tag not in Timm(base).tags()):
        return None
    return Timm(base, tag)


def _is_square(size: Any) -> bool:
    return not isinstance(size, list | tuple) or len(set(size)) == 1


def _filenames(override: str | None) -> list[str]:
    """Files of a hub repository in the order in which timm looks for them."""
    if override is None:
        return list(download.WEIGHTS)
    safe = {"open_clip_pytorch_model.bin": "open_clip_model.safetensors"}.get(override)
    return [*([safe] if safe else [str(Path(override).with_suffix(".safetensors"))]), override]


@cache
def _settable(model: str) -> dict[str, Any]:
    """The arguments of the network's class; of its configuration too, where it is built from one."""
    network = _hint(model)
    if network is None:
        network = type(build_empty(lambda: timm.create_model(model)))
    found = signature(network)
    hints = [part for hint in found.values() for part in (hint, *typing.get_args(hint))]  # also Optional[...] of one
    for hint in hints:
        if dataclasses.is_dataclass(hint):
            found |= {field.name: Any for field in dataclasses.fields(hint)}
    return found


def _hint(model: str) -> type | None:
    try:
        found = typing.get_type_hints(model_entrypoint(model)).get("return")
    except (NameError, AttributeError, TypeError, ValueError, SyntaxError):  # annotations need not evaluate
        return None
    return found if isinstance(found, type) and found is not nn.Module else None
