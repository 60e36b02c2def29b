"""torchvision's classification data sets, and any data set that gives (picture, label) pairs, as a `Source`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np

from tlx.base.errors import UserError, did_you_mean
from tlx.data.build.sources import Picture, Source, size_of


def read_items(items: Mapping[str, Any], classes: Sequence[str] | None = None) -> Source:
    """Data sets by split, each giving (path or PIL picture, integer label) for a position.

    Raises:
        UserError: labels that are no integers or have no class name.
    """
    splits = {split: tuple(_pictures_of(split, data)) for split, data in items.items()}
    labels = {p.label for pictures in splits.values() for p in pictures}
    names = tuple(str(c) for c in classes) if classes else tuple(map(str, range(max(labels, default=-1) + 1)))
    if labels and not 0 <= min(labels) <= max(labels) < len(names):
        raise UserError(f"labels go from {min(labels)} to {max(labels)} for {len(names)} class names")
    return Source(names, splits, items=dict(items))


# torchvision's classification data sets: split -> the arguments that select it

_TRAIN_FLAG: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
_WHOLE: dict[str, dict[str, Any]] = {"train": {}}


def _by(**splits: str) -> dict[str, dict[str, Any]]:
    return {split: {"split": value} for split, value in splits.items()}


_THREE, _TWO = _by(train="train", val="val", test="test"), _by(train="train", test="test")

TORCHVISION: dict[str, dict[str, dict[str, Any]]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "QMNIST", "USPS"), _TRAIN_FLAG),
    **dict.fromkeys(("DTD", "FGVCAircraft", "Flowers102", "PCAM", "RenderedSST2"), _THREE),
    **dict.fromkeys(("Food101", "GTSRB", "STL10", "StanfordCars", "SVHN"), _TWO),
    **dict.fromkeys(("Caltech101", "Caltech256", "EuroSAT", "FER2013", "SEMEION", "SUN397"), _WHOLE),
    **dict.fromkeys(("ImageNet", "Imagenette", "CLEVRClassification"), _by(train="train", val="val")),
    "Country211": _by(train="train", val="valid", test="test"),
    "OxfordIIITPet": _by(train="trainval", test="test"),
    "Places365": _by(train="train-standard", val="val"),
    "EMNIST": {split: {"split": "balanced", **flag} for split, flag in _TRAIN_FLAG.items()},
    "INaturalist": {"train": {"version": "2021_train"}, "val": {"version": "2021_valid"}},
}
"""What can be imported by name. CLEVRClassification's and FER2013's test labels are not public."""


def read_torchvision(
    name: str,
    *,
    root: str | os.PathLike[str] | None,
    download: bool = False,
    variant: str | None = None,
) -> Source:
    """A classification data set of torchvision, with its own splits.

    Where torchvision lets us, files are copied as they are; otherwise its decoded pictures are written as PNG.

    Args:
        root: the folder that torchvision keeps the data in.
        download: let torchvision fetch it into `root`.
        variant: Flowers102: ``article`` trains on the 6149 official test pictures and validates on the other 2040.
            EMNIST: which of its subsets, such as ``letters``.

    Raises:
        UserError: unknown names and variants, data that is not there, a package that is missing.
    """
    if name not in TORCHVISION:
        raise UserError(
            f'torchvision\'s "{name}" cannot be imported{did_you_mean(name, TORCHVISION)}',
            todo="write its pictures into a folder per class, or list them in a CSV file",
        )
    if root is None:
        raise UserError(f"where is {name}?", todo=f"--root FOLDER, the folder torchvision keeps {name} in")
    chosen = TORCHVISION[name]
    if name == "EMNIST" and variant:
        chosen = {split: {**arguments, "split": variant} for split, arguments in chosen.items()}
    elif variant and (name, variant) != ("Flowers102", "article"):
        raise UserError(
            f'{name} has no variant "{variant}"', todo="Flowers102 has the variant article, EMNIST its subsets"
        )
    items = {split: _construct(name, Path(root), arguments, download) for split, arguments in chosen.items()}
    source = read_items(items, _class_names(items["train"]))
    if (name, variant) == ("Flowers102", "article"):
        official = source.splits
        source = replace(source, splits={"train": official["test"], "val": official["train"] + official["val"]})
    return source


def _construct(name: str, root: Path, arguments: Mapping[str, Any], download: bool) -> Any:
    from torchvision import datasets

    kind = getattr(datasets, name)
    known = signature(kind.__init__).parameters
    extra: dict[str, Any] = {}
    if "loader" in known or name == "ImageNet":
        extra["loader"] = _keep_path
    if "download" in known or name in ("EMNIST", "QMNIST"):
        extra["download"] = download
    elif download:
        raise UserError(f"torchvision cannot download {name}", todo="see its page in torchvision's documentation")
    try:
        return kind(root, **arguments, **extra)
    except ImportError as error:
        raise UserError(
            f"torchvision's {name} needs {error.name}", todo=f'pip install "tlx[datasets]", or {error.name} alone'
        ) from error
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"torchvision's {name} ({arguments}): {str(error).strip()}",
            where=str(root),
            todo="--root must hold the files as torchvision lays them out; --download lets it fetch them",
        ) from error


def _class_names(data: Any) -> list[str] | None:
    names = next((n for a in ("classes", "categories", "all_categories") if (n := getattr(data, a, None))), None)
    # ImageNet's are tuples of synonyms, and their first ones are not unique
    return None if names is None else [", ".join(n) if isinstance(n, tuple) else str(n) for n in names]


def _keep_path(path: str | os.PathLike[str]) -> str:
    return os.fspath(path)


def _pictures_of(split: str, data: Any) -> Iterable[Picture]:
    known = next((v for n in ("targets", "labels", "_labels") if _fits(v := getattr(data, n, None), data)), None)
    decoded = known is not None and not isinstance(data[0][0] if len(data) else None, str)
    for place in range(len(data)):
        # only where a data set decodes each picture that we ask for, its own list of labels saves asking
        content, label = (None, known[place]) if decoded and known is not None else data[place]
        if isinstance(label, bool) or (not isinstance(label, (int, np.integer)) and not _scalar(label)):
            raise UserError(
                f"item {place} of {split} has the label {label!r}", todo="one integer per picture is needed"
            )
        if isinstance(content, str):
            yield Picture(content, int(label), content, bytes=size_of(content))
        else:
            yield Picture(f"{split} item {place}", int(label), place=(split, place))


def _fits(labels: Any, data: Any) -> bool:
    return hasattr(labels, "__getitem__") and hasattr(labels, "__len__") and len(labels) == len(data)


def _scalar(label: Any) -> bool:
    """A tensor or array that holds one integer."""
    return getattr(label, "ndim", None) == 0 and float(label) == int(label)
