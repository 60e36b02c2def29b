"""Networks of timm."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub as hub
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import PretrainedCfg, group_parameters, model_entrypoint
from torch import nn

from tlx.errors import UserError
from tlx.inputs import InputSpec
from tlx.models import weights as files
from tlx.models.sources import check_arguments, signature
from tlx.models.trace import Uninitialised, build_empty
from tlx.models.units import Labels


@cache
def names() -> tuple[str, ...]:
    """timm's architectures."""
    return tuple(timm.list_models())


@dataclass(frozen=True)
class Timm:
    """A :class:`tlx.models.sources.Source`."""

    model: str
    tag: str = ""
    ships_weights = True

    @property
    def name(self) -> str:
        return f"timm/{self._tagged(None)}"

    def check(self, args: Mapping[str, Any]) -> dict[str, Any]:
        return check_arguments(args, _settable(self.model), label=self.name) if args else {}

    def build(self, classes: int, args: Mapping[str, Any], tag: str | None) -> nn.Module:
        net: nn.Module = timm.create_model(self._tagged(tag), num_classes=classes, **args)
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
        except Exception:  # a matcher that fails is as good as none: the structure of the network speaks
            return None

    def tags(self) -> tuple[str, ...]:
        default = timm.get_pretrained_cfg(self.model)
        first = [self.tag] if self.tag else [default.tag or ""] if default is not None and default.has_weights else []
        rest = [name.partition(".")[2] for name in timm.list_pretrained(f"{self.model}.*")]
        return tuple(dict.fromkeys(first + rest))

    def pretrained(self, args: Mapping[str, Any], tag: str) -> files.State:
        """From a network that timm itself fills, strictly, so that its own filters are used."""
        overlay = self._cached(tag)
        try:
            with Uninitialised():
                net = timm.create_model(self._tagged(tag), pretrained=True, pretrained_cfg_overlay=overlay, **args)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            todo = "leave out the args that change the network's shape, or use weights: none"
            raise UserError(
                f"timm cannot load the weights with these args: {reason}", where=self.name, todo=todo
            ) from error
        return dict(net.state_dict())

    def convert(self, args: Mapping[str, Any]) -> files.Convert | None:
        """timm's filter of the network's own module: other layouts, position embeddings of another size."""

        def filtered(state: files.State, net: nn.Module) -> files.State:
            module = sys.modules[type(net).__module__]
            own = getattr(module, "checkpoint_filter_fn", None)
            return state if own is None else dict(own(dict(state), net))

        return filtered

    def arguments(self) -> tuple[str, ...]:
        return tuple(_settable(self.model))

    def _tagged(self, tag: str | None) -> str:
        chosen = tag or self.tag
        return f"{self.model}.{chosen}" if chosen else self.model

    def _cached(self, tag: str) -> dict[str, Any]:
        """Where timm is to read the weights, without asking any server; empty if it must download them.

        Raises:
            UserError: not in a cache, and no server answers.
        """
        cfg = timm.get_pretrained_cfg(self._tagged(tag))
        assert cfg is not None
        found = _in_hub_cache(cfg) or _in_torch_cache(cfg)
        if found or _online(cfg):
            return found or {}
        name = self._tagged(tag)
        command = f"python -c \"import timm; timm.create_model('{name}', pretrained=True)\""
        if not cfg.hf_hub_id:
            raise files.missing(f"timm/{name}", _torch_cache(cfg.url), command)
        folder = Path(hub.constants.HF_HUB_CACHE) / ("models--" + cfg.hf_hub_id.partition("@")[0].replace("/", "--"))
        expected = folder / "snapshots" / "*" / _filenames(cfg.hf_hub_filename)[0]
        raise files.missing(
            f"timm/{name}", expected, command, copy=f"the folder {folder.name} of its cache to this one"
        )


def find(model: str) -> Timm | None:
    """The network called `model` (``resnet50``, or with a tag, ``resnet50.a1_in1k``), if timm has one."""
    base, _, tag = model.partition(".")
    if base not in names() or (tag and tag not in Timm(base).tags()):
        return None
    return Timm(base, tag)


def _in_hub_cache(cfg: PretrainedCfg) -> dict[str, Any] | None:
    repository, _, revision = (cfg.hf_hub_id or "").partition("@")
    for filename in _filenames(cfg.hf_hub_filename) if repository else []:
        found = hub.try_to_load_from_cache(repository, filename, revision=revision or None)
        if isinstance(found, str):
            return {"file": found, "custom_load": cfg.custom_load == "hf"}
    return None


def _in_torch_cache(cfg: PretrainedCfg) -> dict[str, Any] | None:
    if not cfg.url or not _torch_cache(cfg.url).is_file():
        return None
    files.check_hash(_torch_cache(cfg.url))
    return {"file": str(_torch_cache(cfg.url)), "custom_load": bool(cfg.custom_load)}


def _torch_cache(url: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name


def _online(cfg: PretrainedCfg) -> bool:
    if cfg.hf_hub_id:
        return not hub.constants.HF_HUB_OFFLINE and files.reachable(hub.constants.ENDPOINT)
    return bool(cfg.url) and files.reachable(cfg.url)


def _filenames(override: str | None) -> list[str]:
    """Files of a hub repository in the order in which timm looks for them."""
    if override is None:
        return ["model.safetensors", "pytorch_model.bin"]
    safe = {"open_clip_pytorch_model.bin": "open_clip_model.safetensors"}.get(override)
    return [*([safe] if safe else [str(Path(override).with_suffix(".safetensors"))]), override]


@cache
def _settable(model: str) -> dict[str, Any]:
    """The arguments of the network's class; of its configuration too, where it is built from one."""
    network = _hint(model)
    if network is None:
        network = type(build_empty(lambda: timm.create_model(model)))
    found = signature(network)
    for hint in list(found.values()):
        if dataclasses.is_dataclass(hint):
            found |= {field.name: Any for field in dataclasses.fields(hint)}
    return found


def _hint(model: str) -> type | None:
    try:
        found = typing.get_type_hints(model_entrypoint(model)).get("return")
    except Exception:  # annotations of other people's code need not evaluate
        return None
    return found if isinstance(found, type) and found is not nn.Module else None
