"""Runs by what they are of: those that differ in seed and folder alone are one group, named by what differs."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from tlx.base.differences import flat
from tlx.base.terminal import escaped
from tlx.plan.later_keys import completed
from tlx.plan.saved_config import MAY_CHANGE, without_directions
from tlx.runs.history import History, PhaseAccuracy
from tlx.runs.run_files import RunFiles, mapping, test_values, whole, within

UNSET, UNKNOWN = "-", "unknown"
_SHOWN, _LONG = 3, 48
_DATA = ("data.train", "data.val")

EXTRACTION, TUNING = "feature extraction", "fine-tuning"


@dataclass(frozen=True)
class Run:
    """One training, as a comparison sees it.

    Attributes:
        name: that tells it from the others.
        config: config.yaml, flat, without what does not change what is trained, and without the seed.
        seed: None where it is not known.
        train, validation: what tells these data from others: their digest; a path where that is not known.
        has_digests: they are digests.
        places: the paths of both.
    """

    history: History
    name: str
    config: Mapping[str, Any]
    seed: int | None
    train: str
    validation: str
    has_digests: bool
    places: tuple[str, str]

    @cached_property
    def metric(self) -> str:
        return self.history.shown

    @cached_property
    def values(self) -> dict[str, float]:
        """By measure, `best` and those of `MEASURES` that the run has, by the metric that it shows."""
        accuracies, best = self.history.accuracies, self.history.best
        found = {
            "best": best.value(self.metric) if best else None,
            "extraction": _best_of([a for a in accuracies if a.kind == EXTRACTION]),
            "tuning": _best_of([a for a in accuracies if a.kind != EXTRACTION]),
            "test": self._tested(),
        }
        return {name: value for name, value in found.items() if value is not None}

    @cached_property
    def costs(self) -> dict[str, float]:
        """By name of `COSTS`."""
        speeds = sorted(v for row in self.history.rows if (v := row.get("time/images_per_s", 0.0)) > 0)
        found = {
            "time": self.history.number("wall_time_s"),
            "parameters": sum(whole(layer.get("parameters")) or 0 for layer in within(self.history.plan, "layers")),
            "samples": self.history.number("samples_seen"),
            "speed": speeds[len(speeds) // 2] if speeds else None,
        }
        return {name: float(value) for name, value in found.items() if value}

    @property
    def tested(self) -> str | None:
        """Which test data were looked at."""
        test = mapping(self.history.details.get("test"))
        return str(test.get("digest") or test.get("data")) if "test" in self.values else None

    def _tested(self) -> float | None:
        values = test_values(self.history.details)
        return values.get(self.metric.removeprefix("val/"), (None, None, None))[0]


def _best_of(phases: Sequence[PhaseAccuracy]) -> float | None:
    """Of the last of them that was judged: what its best evaluation had."""
    return next((a.best for a in reversed(phases) if a.best is not None), None)


@dataclass(frozen=True)
class Group:
    """Runs of one configuration.

    Attributes:
        letter: A, B ...
        label: what differs from the other groups, short.
        differs: by key, in full.
    """

    letter: str
    label: str
    differs: Mapping[str, str]
    runs: tuple[Run, ...]

    @property
    def done(self) -> tuple[Run, ...]:
        """Those whose numbers count: of a run that is not done they are those so far."""
        return tuple(run for run in self.runs if run.history.done)

    @property
    def name(self) -> str:
        return f"{self.letter} ({self.label})" if self.label else self.letter

    def values(self, measure: str) -> list[float]:
        return [run.values[measure] for run in self.done if measure in run.values]

    def by_seed(self, measure: str) -> dict[int, float]:
        """The value of each seed; of a seed that was run more than once, their mean."""
        found: dict[int, list[float]] = {}
        for run in self.done:
            if run.seed is not None and measure in run.values:
                found.setdefault(run.seed, []).append(run.values[measure])
        return {seed: sum(values) / len(values) for seed, values in found.items()}

    def cost(self, name: str) -> float | None:
        """The mean over its runs that are done."""
        known = [run.costs[name] for run in self.done if name in run.costs]
        return sum(known) / len(known) if known else None


def read_run(history: History, name: str) -> Run:
    """A run and its configuration, whatever state its files are in."""
    files = RunFiles(history.path)
    written = files.config
    config = {k: v for k, v in without_directions(flat(completed(written))).items() if not k.startswith(MAY_CHANGE)}
    seed = whole(config.pop("seed", None))
    data, identity = mapping(written.get("data")), _identity(files)
    places = (str(data.get("train") or UNKNOWN), str(data.get("val") or UNKNOWN))
    return Run(
        history=history,
        name=name,
        config=config,
        seed=seed,
        train=str(identity.get("train_shards") or places[0]),
        validation=str(identity.get("val_shards") or places[1]),
        has_digests=bool(identity),
        places=places,
    )


def located(runs: Sequence[Run]) -> list[Run]:
    """The same runs; one that does not know its data's digests yet has those of others at the same paths."""
    known: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for run in runs:
        if run.has_digests:
            known.setdefault(run.places, set()).add((run.train, run.validation))
    found = []
    for run in runs:
        digests = known.get(run.places, set()) if UNKNOWN not in run.places else set()
        train, validation = next(iter(digests)) if len(digests) == 1 else (run.train, run.validation)
        found.append(run if run.has_digests else replace(run, train=train, validation=validation))
    return found


def _identity(files: RunFiles) -> dict[str, Any]:
    """What tells the run's data from others."""
    kept = mapping(files.checkpoint.get("identity"))
    return kept if kept else mapping(files.read("model.json").get("provenance"))


def grouped(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs of the same configuration on the same data together, in the order in which they come. A run without a
    readable configuration is like no other."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        own = {k: v for k, v in run.config.items() if k not in _DATA}
        text = json.dumps([own, run.train, run.validation], sort_keys=True, default=str)
        found.setdefault(text if run.config else str(run.history.path.resolve()), []).append(run)
    return list(found.values())


def differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """By key what each configuration, flat, has of what they do not share. Where one has nothing below a key, or a word
    in its place, the key is told as a whole: ``layer_decay``, of which one has ``exponential factor=0.7``."""
    parents = [{key.rpartition(".")[0] for key in _with_parents(config)} for config in configs]
    everywhere = set.intersection(*parents) if parents else set()
    keys = dict.fromkeys(_top(key, everywhere) for config in configs for key in config)
    found = {key: [_shown(_under(config, key)) for config in configs] for key in sorted(keys)}
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def _with_parents(keys: Iterable[str]) -> Iterator[str]:
    for key in keys:
        while key:
            yield key
            key = key.rpartition(".")[0]


def _top(key: str, everywhere: Container[str]) -> str:
    """The highest above a key below which not every configuration has something; the key where there is none."""
    words = key.split(".")
    above = (".".join(words[:n]) for n in range(1, len(words)))
    return next((name for name in above if name not in everywhere), key)


def _under(config: Mapping[str, Any], key: str) -> Any:
    if key in config:
        return config[key]
    below = {k.removeprefix(f"{key}."): v for k, v in config.items() if k.startswith(f"{key}.")}
    return below or None


def _shown(value: Any) -> str:
    """On one line, as YAML has it in a flow."""
    if value is None:
        return UNSET
    if isinstance(value, Mapping):
        if "name" in value:
            rest = ", ".join(f"{k}={_shown(v)}" for k, v in value.items() if k != "name")
            return f"{_shown(value['name'])} {rest}".strip()
        return ", ".join(f"{k}={_shown(v)}" for k, v in value.items())
    if isinstance(value, list):
        return f"[{', '.join(_shown(v) for v in value)}]"
    return escaped(value or "''" if isinstance(value, str) else json.dumps(value, default=str))


def label(differs: Mapping[str, str]) -> str:
    """A short name of a group: its values of the keys that tell it from the others, most telling first."""
    shown = {k: v for k, v in differs.items() if v != UNSET}
    if "backbone.name" in shown:  # what comes with a backbone is told in full elsewhere
        shown = {k: v for k, v in shown.items() if k == "backbone.name" or not k.startswith(("backbone.", "input."))}
    short = _short_names(list(differs))
    if not shown:  # it has none of what another has
        return ", ".join(f"no {key if short[key] == 'name' else short[key]}" for key in list(differs)[:_SHOWN])
    order = sorted(shown, key=lambda key: key != "backbone.name")
    parts = [shown[k] if k == "backbone.name" else f"{short[k]}={_clipped(shown[k])}" for k in order[:_SHOWN]]
    more = len(order) - _SHOWN
    return ", ".join(parts) + (f", {more} more" if more > 0 else "")


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """The end of each key that no other has."""
    found = {}
    for key in keys:
        words = key.split(".")
        ends = (".".join(words[-n:]) for n in range(1, len(words) + 1))
        found[key] = next((e for e in ends if sum(k == e or k.endswith(f".{e}") for k in keys) == 1), key)
    return found


def _clipped(text: str) -> str:
    return text if len(text) <= _LONG else "…" + text[1 - _LONG :]


def letter(place: int) -> str:
    """A to Z, then AA, AB ..."""
    rest, last = divmod(place, 26)
    return (letter(rest - 1) if rest else "") + chr(65 + last)
