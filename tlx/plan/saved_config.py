"""Configurations that tlx wrote, of this version or an earlier one: what they mean, and in what two of them differ."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from tlx.base.differences import differences, flat
from tlx.base.errors import ConfigError
from tlx.plan.config import Config, parse, plain
from tlx.plan.later_keys import completed, lacking
from tlx.plan.phase_settings import PhaseSettings

MAY_CHANGE = (
    *("world", "track", "checkpoint", "run", "stop_after", "data.workers", "data.cache", "data.expected"),
    *("data.verify", "data.test", "cache.mode", "cache.folder", "cache.limit"),
    *("loop.micro_batch", "loop.fit_micro_batch", "loop.nonfinite", "evaluate.batch"),
)
"""Keys that do not change what is trained, so that a run goes on when they do."""


def as_written(config: Config, table: Mapping[str, Any]) -> Config:
    """The configuration with what it leaves to :mod:`tlx.plan.defaults` as a run had it from there: it goes on as it
    began, whatever the defaults are by now. What was said then and is not now stays a difference.

    Args:
        table: what :func:`from_table` has given for the run.
    """
    made, data = dict(config.phases), table.get("data")
    for name in config.phase_names:
        own = _then(table, name)
        unsaid = [key for key in config.unsaid(name) if key in own and _is_still_meant(config, key, own[key])]
        with contextlib.suppress(ValidationError):  # of a damaged file; the differences will tell
            then = PhaseSettings.model_validate({key: own[key] for key in unsaid})
            made |= {name: then.over(config.phases.get(name, PhaseSettings()))} if unsaid else {}
    batch = data.get("batch") if isinstance(data, Mapping) else None
    update: dict[str, Any] = {"phases": made} if made != config.phases else {}
    if "batch" not in config.data.model_fields_set and isinstance(batch, int):
        update["data"] = config.data.model_copy(update={"batch": batch})
    return config.model_copy(update=update) if update else config


def from_table(config: Config, before: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration leaves to :mod:`tlx.plan.defaults`, and what that says, as plain data.

    Args:
        before: the same of the run until now, which stays where it is still left open.
    """
    now = plain(as_written(config, before))
    phases = {name: {key: now["phases"][name][key] for key in config.unsaid(name)} for name in config.phase_names}
    batch = {} if "batch" in config.data.model_fields_set else {"batch": now["data"]["batch"]}
    made = {"data": batch, "phases": {name: own for name, own in phases.items() if own}}
    return {key: of for key, of in made.items() if of}


def _then(table: Mapping[str, Any], phase: str) -> Mapping[str, Any]:
    phases = table.get("phases")
    own = phases.get(phase) if isinstance(phases, Mapping) else None
    return own if isinstance(own, Mapping) else {}


def _is_still_meant(config: Config, key: str, value: Any) -> bool:
    """A duration of the table is a share of the whole where that is said, and a number of epochs where it is not."""
    return key != "duration" or str(value).endswith("%") == (config.duration is not None)


def changes(before: Mapping[str, Any], config: Config, *, done: bool = False) -> list[str]:
    """What differs in meaning between a configuration that tlx wrote and one of now, a line each.

    Both are read by the schema of now: a key that has gone since, such as `evaluate.mode`, and a default that has come
    since are no differences.

    Args:
        before: as :func:`essential` gives it.
        done: nothing will be trained by it any more, so that it does not matter what the absence of a key meant.
    """
    now = plain(config)
    if before == essential(now):
        return []
    later = lacking(before)
    if done:
        own = essential(now)
        later = {key: own[key] for key in later if key in own}
    try:
        then = essential(plain(_reread({**before, **later}, now)))
    except ConfigError as error:
        return [*differences(before, essential(now)), *error.problems]
    hints = {key: _hint(key, value) for key, value in later.items()}
    return [line + hints.get(line.partition(":")[0], "") for line in differences(then, essential(now))]


def hints(before: Mapping[str, Any]) -> dict[str, str]:
    """What to say behind a difference in a key that came after a configuration (as :func:`essential` gives it), by
    key."""
    return {key: _hint(key, value) for key, value in lacking(before).items()}


def _hint(key: str, value: Any) -> str:
    return f", a key that came later: {key}={json.dumps(value)} goes on as it began"


def _reread(before: Mapping[str, Any], now: Mapping[str, Any]) -> Config:
    """The configuration that `before` says, flat, with what `now` says of the keys that may change."""
    paths = dict(_paths(now))
    raw: dict[str, Any] = {}
    for key, value in {**_changeable(now), **before}.items():
        *parents, last = paths.get(key, tuple(key.split(".")))  # names, such as layers', may hold dots themselves
        node = raw
        for parent in parents:
            below = node.setdefault(parent, {})
            if not isinstance(below, dict):  # a damaged file; the differences will tell
                raise ConfigError([f"{key}: under a key that is no mapping"])
            node = below
        node[last] = value
    return parse(raw)


def _changeable(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flat(config).items() if key.startswith(MAY_CHANGE)}


def _paths(node: Any, key: str = "", steps: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every key of nested mappings as :func:`flat` joins it, and the steps that lead there."""
    if not isinstance(node, Mapping):
        yield key, steps
        return
    for name, below in node.items():
        yield from _paths(below, f"{key}.{name}".strip("."), (*steps, str(name)))


def without_directions(written: Mapping[str, Any]) -> dict[str, Any]:
    """A flat configuration without the directions of metrics, `mode`, that earlier ones state; what was done by a wrong
    one, :mod:`tlx.runs.older_meaning` tells."""
    return {key: value for key, value in written.items() if key != "evaluate.mode" and not _of_a_plateau(key)}


def _of_a_plateau(key: str) -> bool:
    return key.startswith("phases.") and key.endswith(".duration.mode")


def essential(config: Any) -> dict[str, Any]:
    """Of a configuration as plain data, what decides the training, keys joined by dots."""
    return {key: value for key, value in flat(config).items() if not key.startswith(MAY_CHANGE)}


def meant(written: Mapping[str, Any]) -> Config:
    """The configuration of a config.yaml that tlx wrote, as plain data, by what its keys and their absence meant then;
    but for directions of metrics, see :func:`without_directions`.

    Raises:
        ConfigError: what cannot be read any more.
    """
    raw = copy.deepcopy(dict(written))
    phases = raw.get("phases")
    lengths = [p.get("duration") for p in phases.values() if isinstance(p, dict)] if isinstance(phases, dict) else []
    for directed in (raw.get("evaluate"), *lengths):
        if isinstance(directed, dict):
            directed.pop("mode", None)
    return parse(completed(raw))
