"""What is known of a file of weights beside its tensors: from the run of tlx that wrote it, or from the settings that a
training script saved with them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlx.base.differences import flat
from tlx.base.parsing import from_json

Size = tuple[int, int]
"""Height and width in pixels."""

SIZE_ARGUMENTS = ("img_size", "image_size", "input_size")
"""What networks, and the scripts that train them, call the size of the images."""

_SETTINGS = ("args", "config", "cfg", "opt", "hyper_parameters", "model_args")
_LARGEST = 100_000  # pixels


@dataclass(frozen=True)
class RunRecord:
    """What a checkpoint of tlx says of its weights; empty where one of before did not say it.

    Attributes:
        classes: names of the outputs, by their index.
        head: the name of its head.
        mean, std: that its pictures were normalised by.
        sizes: that its network was built for, as its arguments say them. What it was trained on may be another one: a
            network may take pictures of any size (timm's `dynamic_img_size`) on the grid that it was built with.
        backbone, weights: as its configuration names them.
        args: of the backbone, and of the head but for what no weight depends on; flat, keys joined by dots.
        scale: what its outputs mean, see :class:`tlx.tasks.Task`.
    """

    classes: tuple[str, ...]
    head: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sizes: tuple[Size, ...]
    backbone: str = ""
    weights: str = ""
    args: Mapping[str, Any] = field(default_factory=dict)
    head_args: Mapping[str, Any] = field(default_factory=dict)
    scale: Mapping[str, Any] = field(default_factory=dict)

    def is_of(self, network: str, args: Mapping[str, Any]) -> bool:
        """Whether its network is built like the one of this name with these arguments."""
        return base(self.backbone)[0] == base(network)[0] and self.args == comparable(args)


def record_of(file: Path) -> RunRecord | None:
    """Of the checkpoint that a file of weights lies in; None where it lies in none."""
    try:
        said = from_json((file.parent / "state.json").read_bytes())["identity"]
        config, seen = said.get("config", {}), said["input"]
        arguments = _below(config, "backbone.args")
        return RunRecord(
            classes=tuple(map(str, said.get("outputs") or said.get("classes", ()))),
            head=str(config.get("head.name", config.get("head", ""))),
            mean=tuple(map(float, seen["mean"])),
            std=tuple(map(float, seen["std"])),
            sizes=sizes_in(arguments),
            backbone=str(said.get("backbone", config.get("backbone.name", ""))),
            weights=str(config.get("backbone.weights", "")),
            args=arguments,
            head_args=_below(config, "head"),
            scale=dict(said.get("scale", {})),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def best_of_run(folder: Path) -> Path | None:
    """The file with the best weights of a run, the moving average's where these were the best; those of its last
    checkpoint where it has no best one. None where the folder is no run's."""
    for checkpoint in (folder / "checkpoints" / "best", folder / "checkpoints" / "latest"):
        try:
            state = from_json((checkpoint / "state.json").read_bytes())
        except (OSError, ValueError):
            continue
        best = state.get("best") if isinstance(state, dict) else None
        averaged = checkpoint.name == "best" and isinstance(best, dict) and best.get("weights") == "ema"
        return checkpoint / ("ema.safetensors" if averaged else "model.safetensors")
    return None


def base(network: str) -> tuple[str, str]:
    """A network's name without its library, and the tag behind it: ``timm/vit.augreg`` is ``vit`` and ``augreg``."""
    name, _, tag = network.rpartition("/")[2].partition(".") if ":" not in network else (network, "", "")
    return name, tag


def comparable(args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as state.json holds them: flat, tuples as lists, empty mappings left out."""
    found: dict[str, Any] = flat(json.loads(json.dumps(args, default=str)))
    return {key: value for key, value in found.items() if key and value != {}}


def _below(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """What a flat configuration says below a key, by what is left of the keys."""
    return {name.removeprefix(f"{key}."): value for name, value in config.items() if name.startswith(f"{key}.")}


def sizes_beside(content: Any) -> tuple[Size, ...]:
    """Sizes of pictures in the settings that a file holds beside its state dict."""
    if not isinstance(content, Mapping):
        return ()
    return tuple(size for name in _SETTINGS for size in sizes_in(content.get(name)))


def sizes_in(settings: Any) -> tuple[Size, ...]:
    """Every size of pictures in settings: a mapping, or an object with attributes, such as argparse's."""
    values = settings if isinstance(settings, Mapping) else getattr(settings, "__dict__", {})
    return tuple(size for name in SIZE_ARGUMENTS for size in _size(values.get(name)))


def _size(value: Any) -> Iterator[Size]:
    """A side, (height, width) or (channels, height, width)."""
    sides = [value, value] if isinstance(value, int) else value
    if isinstance(sides, Sequence) and len(sides) in (2, 3) and all(_is_side(side) for side in sides[-2:]):
        yield int(sides[-2]), int(sides[-1])


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST
