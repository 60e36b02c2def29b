"""What is known of a file of weights beside its tensors: from the run of tlx that wrote it, or from the settings that a
training script saved with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlx.parsing import from_json

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
        classes: names, by their index.
        head: the name of its head.
        mean, std: that its pictures were normalised by.
        sizes: of its pictures, the size that the network was built for first.
    """

    classes: tuple[str, ...]
    head: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sizes: tuple[Size, ...]


def record_of(file: Path) -> RunRecord | None:
    """Of the checkpoint that a file of weights lies in; None where it lies in none."""
    try:
        said = from_json((file.parent / "state.json").read_bytes())["identity"]
        config, seen = said.get("config", {}), said["input"]
        arguments = {name: config.get(f"backbone.args.{name}") for name in SIZE_ARGUMENTS}
        return RunRecord(
            classes=tuple(map(str, said.get("classes", ()))),
            head=str(config.get("head.name", config.get("head", ""))),
            mean=tuple(map(float, seen["mean"])),
            std=tuple(map(float, seen["std"])),
            sizes=(*sizes_in(arguments), *sizes_in({"img_size": seen.get("size")})),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


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
