"""Which networks a library has, without importing it: lists for the versions that tlx is tested with.

A list is a file beside this one, ``timm-1.0.31.txt``: in each line a network and the tags of its pretrained weights
that may follow its name. ``python tests/backbones.py --names`` writes those of the versions that are installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("torchvision", "timm")
Names = Mapping[str, tuple[str, ...]]
"""Network -> tags of its weights."""


@cache
def listed_networks(library: str) -> Names | None:
    """The networks of the installed version; None where there is no list of it."""
    try:
        lines = list_of(library).read_text(encoding="utf-8").splitlines()
    except (PackageNotFoundError, OSError):
        return None
    return {name: tuple(tags) for name, *tags in map(str.split, lines)}


def imported(library: str) -> Names:
    """The same from the library itself."""
    if library == "timm":
        from tlx.models.libraries import from_timm

        return from_timm.networks()
    from tlx.models.libraries import from_torchvision

    return dict.fromkeys(from_torchvision.names(), ())


def list_of(library: str) -> Path:
    """The file for the installed version, whether or not it is there."""
    public = version(library).partition("+")[0]  # 0.29.2+cpu has the networks of 0.29.2
    return Path(__file__).with_name(f"{library}-{public}.txt")


def has(names: Names, model: str) -> bool:
    """Whether `model` is a network, or one with the tag of its weights (``resnet50.a1_in1k``)."""
    base, dot, tag = model.partition(".")
    return base in names and (not dot or tag in names[base])
