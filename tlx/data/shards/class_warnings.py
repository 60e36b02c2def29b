"""Classes that were probably unintended: what people are warned of before they train on them.

``class_warnings(counts) -> list[str]``
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from tlx.base.terminal import escaped
from tlx.data.build.sources import split_of
from tlx.data.shards.class_names import is_integer

_NULLS = frozenset(
    ["null", "none", "nan", "na", "n/a", "#n/a", "nil", "undefined", "unlabeled", "unlabelled", "-1", "?"]
)
_NUMBER = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)([eE][-+]?[0-9]+)?\Z")
_BRACKETS = {"[": "]", "(": ")", "{": "}"}
_BETWEEN = re.compile(r"\s*[,;|+]\s*")
_SHOWN = 5
_OWN = 0.9  # so large a share of the samples with a class of its own is no classification


def class_warnings(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A sentence for each thing that is odd about the classes.

    Args:
        counts: split, or whatever a folder is called -> class -> samples.
    """
    total: dict[str, int] = {}
    for split in counts.values():
        for name, count in split.items():
            total[name] = total.get(name, 0) + count
    names = [name for name, count in total.items() if count]
    if not names:
        return []
    found = [_number_of_classes(len(names), sum(total.values())), _nulls(names), _lists(names), _numbers(names)]
    return [warning for warning in (*found, *_alike(names), *_absent(counts)) if warning]


def _number_of_classes(classes: int, samples: int) -> str:
    if classes == 1:
        return "there is only one class; a classifier needs two or more"
    if classes > 2 and classes >= _OWN * samples:
        return f"{classes:,} classes for {samples:,} samples: is the label a name or a number of each picture?"
    return ""


def _nulls(names: Sequence[str]) -> str:
    odd = [name for name in names if name.strip(" <>").casefold() in _NULLS]
    return f"looks like a missing label: {_listed(odd)}" if odd else ""


def _lists(names: Sequence[str]) -> str:
    known = set(names)
    odd = [
        name
        for name in names
        if _BRACKETS.get(name[:1], "\0") == name[-1:]
        or (len(parts := _BETWEEN.split(name)) > 1 and all(part in known for part in parts))
    ]
    return f"looks like several labels, of which a sample has one here: {_listed(odd)}" if odd else ""


def _numbers(names: Sequence[str]) -> str:
    integers = [name for name in names if is_integer(name)]
    fractions = [name for name in names if _NUMBER.match(name) and not is_integer(name)]
    if fractions:
        return f"looks like a measured number, not a class: {_listed(fractions)}"
    if integers and len(integers) < len(names):
        return f"looks like a number among names: {_listed(integers)}"
    values = {int(name) for name in integers}
    if values and max(values) - min(values) > 2 * len(values):
        return (
            f"numbers with gaps, from {min(values)} to {max(values)}, for classes: are they measured, or do they count?"
        )
    return ""


def _alike(names: Sequence[str]) -> Iterable[str]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_folded(name), []).append(name)
    different = [group for group in groups.values() if len(group) > 1]
    for group in different[:_SHOWN]:
        look_same = len({unicodedata.normalize("NFC", name) for name in group}) < len(group)
        listed = " and ".join(ascii(name) if look_same else f'"{escaped(name)}"' for name in group)
        yield f"differ only by capitals or Unicode normalisation: {listed}"
    if len(different) > _SHOWN:
        yield f"and {len(different) - _SHOWN:,} more groups of classes that differ by no more"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def _absent(counts: Mapping[str, Mapping[str, int]]) -> Iterable[str]:
    training = {name for name, split in counts.items() if split_of(name) == "train"}
    trained = {c for name in training for c, count in counts[name].items() if count}
    if not trained:
        return
    for name in sorted(counts.keys() - training):
        here = {c for c, count in counts[name].items() if count}
        for absent, where in ((trained - here, name), (here - trained, "training")):
            if absent:
                listed = _listed(sorted(absent))
                yield f"{len(absent):,} of {len(trained | here):,} classes have no sample in {where}: {listed}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(f'"{escaped(name)}"' for name in names[:_SHOWN]) + more
