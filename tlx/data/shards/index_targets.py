"""Targets of tars that are indexed: with one list of classes over all folders, and as arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tlx.base.errors import UserError
from tlx.data.shards.index_file import parse, targets_of
from tlx.data.shards.labels import LabelRule
from tlx.data.shards.manifest import Manifest
from tlx.data.shards.target_arrays import empty_array, verified
from tlx.data.shards.target_values import (
    Column,
    TargetSpec,
    array_of,
    listed_target,
    missing,
    names_and_widths,
    width_of,
)
from tlx.data.shards.targets import LABEL, Target

if TYPE_CHECKING:
    from tlx.data.shards.index import Scan


def targets_in(
    rule: LabelRule,
    scans: Sequence[Scan],
    folders: Sequence[Path],
    given: Mapping[str, str | os.PathLike[str]],
    *,
    fresh: bool,
) -> tuple[list[Target], LabelRule]:
    """The targets that the rule reads, with one list of classes for all folders; and the rule with what is known now of
    positions.

    Args:
        given: where lists of classes come from, by target.

    Raises:
        UserError: a target that no sample has, classes that are not in a list.
    """
    odd = next((name for name in given if name not in [s.name for s in rule.targets if s.kind != "number"]), None)
    if odd is not None:
        raise UserError(
            f'there is no target "{odd}" with classes', where="--target-classes", todo=f"--target {odd}=KEY"
        )
    earlier = {} if fresh else _targets_before(folders)
    found, positions = [], []
    for i, spec in enumerate(rule.targets):
        columns = [scan.targets[i] for scan in scans]
        hint = next((scan.hints[spec.name] for scan in scans if spec.name in scan.hints), None)
        if hint is not None and all(_all_missing(spec, column) for column in columns):
            raise UserError(
                f"no sample has the target {spec.name}, in its .json at {hint}",
                where=str(folders[0]),
                todo=f"--target {spec.name}:{spec.kind}=KEY says where it is; --fresh forgets the earlier index",
            )
        names, widths = (set().union(*each) for each in zip(*map(names_and_widths, columns), strict=True))
        if spec.kind == "number":
            found.append(verified(Target(spec.name, "number", width=width_of(spec, widths))))
            continue
        before = earlier.get(spec.name)
        known = names_in(Path(given[spec.name]), spec.name) if spec.name in given else None
        if known is None and before is not None and before.kind == spec.kind:
            known = before.classes
        target, positional = listed_target(
            spec, names, known, given=spec.name in given, positions=spec.name in rule.positions
        )
        found.append(target)
        positions += [spec.name] if positional else []
    return found, replace(rule, positions=tuple(positions))


def _all_missing(spec: TargetSpec, values: Column) -> bool:
    return not isinstance(values, np.ndarray) and all(value == missing(spec) for value in values)


def _targets_before(folders: Sequence[Path]) -> dict[str, Target]:
    """The targets of an earlier index."""
    for folder in folders:
        with suppress(OSError, UserError):
            found = targets_of(parse(str(folder), (folder / "index.json").read_bytes()))
            if found:
                return {name: target for name, (target, _) in found.items()}
    return {}


def target_array(target: Target, rule: LabelRule, scans: Sequence[Scan]) -> NDArray[Any] | None:
    """The array of a target over the samples of tars, as the rule has read them; None where a value is none of its."""
    place = [spec.name for spec in rule.targets].index(target.name)
    array = empty_array(target, sum(len(scan.targets[place]) for scan in scans))
    at = 0
    for scan in scans:
        own = array_of(target, scan.targets[place], positions=target.name in rule.positions)
        if own is None:
            return None
        array[at : at + len(own)] = own
        at += len(own)
    return array


def names_in(source: Path, target: str = LABEL) -> tuple[str, ...]:
    """The class names of a list: a text file with one per line, or those of a target of an indexed folder.

    Raises:
        UserError: it cannot be read, or names a class twice.
    """
    if source.is_dir():
        manifest = Manifest.open(source)
        if target not in manifest.targets:
            manifest.values(target)  # refused; only the class need not be there
            return ()
        return manifest.targets[target].classes
    try:
        names = tuple(line.strip() for line in source.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the class names cannot be read: {error}", where=str(source)) from error
    if len(set(names)) < len(names):
        raise UserError("a class is named twice", where=str(source))
    return names
