"""Several runs compared, as numbers: groups of one configuration, differences with intervals, cost; no picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlx.base.metrics import ACCURACY, Metric
from tlx.report import statistics
from tlx.report.groups import Group, Run, differing, grouped, label, letter
from tlx.report.statistics import Estimate
from tlx.runs import predictions
from tlx.runs.run_files import mapping

MEASURES: Mapping[str, str] = {
    "best": "best of the run",
    "extraction": "after feature extraction",
    "tuning": "after fine-tuning",
    "test": "test",
}
"""Best evaluations, by the metric that the run shows: of all phases, of extraction, of the last phase that is none."""

COSTS: Mapping[str, str] = {
    "time": "training time",
    "parameters": "parameters",
    "samples": "samples seen",
    "speed": "training pictures/s",
}

CHOOSING = ("time", "parameters", "samples")
"""Costs that are better lower, against which there is a front."""

MOST = 6
"""Of more groups than these the best is compared with each other one, not each with each."""

SURE = 0.05


@dataclass(frozen=True)
class Difference:
    """How much better the first group is than the second: positive where it is better.

    Attributes:
        seeds: over seeds; None where both have not two at least.
        paired: the seeds that both have, which are compared; empty where they are others.
        pictures: over validation pictures; None where it is not known what was told of each.
        p: of the one of both that decides, adjusted for the comparisons among the groups; None without one.
    """

    first: Group
    second: Group
    seeds: Estimate | None
    paired: tuple[int, ...]
    pictures: Estimate | None
    p: float | None = None

    @property
    def deciding(self) -> Estimate | None:
        """Seeds where there are some; else pictures, which tell of these very runs alone."""
        return next((e for e in (self.seeds, self.pictures) if e is not None and e.p is not None), None)

    @property
    def sure(self) -> bool:
        return self.p is not None and self.p < SURE

    def data(self) -> dict[str, Any]:
        return {
            "first": self.first.letter,
            "second": self.second.letter,
            "seeds": self.seeds.data() if self.seeds else None,
            "paired_seeds": list(self.paired),
            "pictures": self.pictures.data() if self.pictures else None,
            "p_holm": self.p,
            "sure": self.sure,
        }


@dataclass(frozen=True)
class Comparable:
    """Groups that were judged by one metric on the same validation data.

    Attributes:
        groups: the best first; those without a run that is done last.
        estimates: by letter and measure.
        gains: by letter, fine-tuning minus extraction, paired by run; positive where tuning helped.
        fronts: by cost, the letters of groups that no other beats in both; of costs that differ.
        differs: keys of the configuration, by letter what each group has.
    """

    metric: str
    validation: str
    groups: tuple[Group, ...]
    estimates: Mapping[str, Mapping[str, Estimate]]
    gains: Mapping[str, Estimate]
    differences: tuple[Difference, ...]
    fronts: Mapping[str, tuple[str, ...]]
    differs: Mapping[str, Mapping[str, str]]

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]

    @property
    def ranked(self) -> list[Group]:
        """Those that have a number."""
        return [group for group in self.groups if "best" in self.estimates[group.letter]]

    def between(self, first: Group, second: Group) -> Difference | None:
        return next((d for d in self.differences if (d.first, d.second) == (first, second)), None)

    def data(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "higher_is_better": Metric(self.metric).higher_is_better,
            "validation": self.validation,
            "groups": [self._of_group(group) for group in self.groups],
            "differences": [difference.data() for difference in self.differences],
            "fronts": {cost: list(letters) for cost, letters in self.fronts.items()},
        }

    def _of_group(self, group: Group) -> dict[str, Any]:
        gain = self.gains.get(group.letter)
        return {
            "letter": group.letter,
            "label": group.label,
            "differs": dict(group.differs),
            "measures": {name: e.data() for name, e in self.estimates[group.letter].items()},
            "gain_of_tuning": gain.data() if gain else None,
            "costs": {name: cost for name in COSTS if (cost := group.cost(name)) is not None},
            "runs": [
                {
                    "name": run.name,
                    "path": str(run.history.path),
                    "seed": run.seed,
                    "status": run.history.status,
                    "values": run.values,
                    "costs": run.costs,
                }
                for run in group.runs
            ],
        }


def compared(runs: Sequence[Run]) -> list[Comparable]:
    """Runs that can be compared together, the largest number of runs first; see :class:`Comparable`."""
    sets: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        sets.setdefault((run.metric, run.validation), []).append(run)
    made: list[Comparable] = []
    for (metric, validation), own in sorted(sets.items(), key=lambda item: -len(item[1])):
        groups, differs = _groups(own, metric, first=sum(len(c.groups) for c in made))
        made.append(_comparable(groups, metric=metric, validation=validation, differs=differs))
    return made


def _groups(runs: Sequence[Run], metric: str, *, first: int) -> tuple[list[Group], dict[str, dict[str, str]]]:
    """The groups, the best first, and by key what differs between them."""
    sign = 1 if Metric(metric).higher_is_better else -1
    plain = [Group("", "", {}, tuple(own)) for own in grouped(runs)]
    plain.sort(key=lambda g: -sign * statistics.mean(g.values("best")).value if g.values("best") else math.inf)
    keys = differing([group.runs[0].config for group in plain])
    groups = []
    for place, group in enumerate(plain):
        differs = {key: values[place] for key, values in keys.items()}
        # the configuration tells nothing where it cannot be read, or where the data under one path are others
        said = label(differs) or (group.runs[0].name if len(plain) > 1 else "")
        groups.append(Group(letter(first + place), said, differs, group.runs))
    letters = [group.letter for group in groups]
    return groups, {key: dict(zip(letters, values, strict=True)) for key, values in keys.items()}


def _comparable(
    groups: Sequence[Group], *, metric: str, validation: str, differs: Mapping[str, Mapping[str, str]]
) -> Comparable:
    sign = 1 if Metric(metric).higher_is_better else -1
    estimates = {
        g.letter: {name: statistics.mean(values) for name in MEASURES if (values := g.values(name))} for g in groups
    }
    gains = {g.letter: statistics.mean(of, "paired t-interval over runs") for g in groups if (of := _gains(g, sign))}
    ranked = [group for group in groups if "best" in estimates[group.letter]]
    return Comparable(
        metric=metric,
        validation=validation,
        groups=tuple(groups),
        estimates=estimates,
        gains=gains,
        differences=_differences(ranked, metric),
        fronts={cost: front for cost in CHOOSING if (front := _front(ranked, cost, sign))},
        differs=differs,
    )


def _gains(group: Group, sign: int) -> list[float]:
    both = [run.values for run in group.done if {"extraction", "tuning"} <= run.values.keys()]
    return [sign * (values["tuning"] - values["extraction"]) for values in both]


def _differences(groups: Sequence[Group], metric: str) -> tuple[Difference, ...]:
    """Of each two groups, or of the best and each other, with p-values for all pairs: the best was chosen among all."""
    pairs = list(combinations(groups, 2))
    told = {g.letter: _told(g, metric) for g in groups}
    asked = pairs if len(groups) <= MOST else [(groups[0], other) for other in groups[1:]]
    found = [_difference(a, b, metric, told) for a, b in asked]
    deciding = [d for d in found if d.deciding is not None]
    ps = statistics.holm([d.deciding.p or 0.0 for d in deciding if d.deciding], comparisons=len(pairs))
    adjusted = {id(d): p for d, p in zip(deciding, ps, strict=True)}
    return tuple(Difference(d.first, d.second, d.seeds, d.paired, d.pictures, adjusted.get(id(d))) for d in found)


def _difference(first: Group, second: Group, metric: str, told: Mapping[str, _Told | None]) -> Difference:
    sign = 1 if Metric(metric).higher_is_better else -1
    own, other = first.by_seed("best"), second.by_seed("best")
    shared = tuple(sorted(own.keys() & other.keys()))
    seeds = None
    if len(shared) > 1:
        seeds = statistics.paired([sign * own[s] for s in shared], [sign * other[s] for s in shared])
    elif min(len(first.values("best")), len(second.values("best"))) > 1:
        shared = ()
        seeds = statistics.welch(*([sign * v for v in g.values("best")] for g in (first, second)))
    else:
        shared = ()
    pictures = _over_pictures(told[first.letter], told[second.letter])
    return Difference(first, second, seeds, shared, pictures)


@dataclass(frozen=True)
class _Told:
    """Which validation pictures a group's best evaluations had right: ids, and the share of its runs."""

    digest: str
    ids: NDArray[np.int64]
    share: NDArray[np.float64]


def _told(group: Group, metric: str) -> _Told | None:
    """Of the runs of which it is known; None where of none, or where the metric is no share of pictures."""
    if metric != ACCURACY:
        return None
    runs = [told for run in group.done if (told := _right(run)) is not None]
    same = [told for told in runs if told.digest == runs[0].digest]
    if not same:
        return None
    ids = _in_all(told.ids for told in same)
    shares = [told.share[np.isin(told.ids, ids)] for told in same]
    return _Told(same[0].digest, ids, np.mean(shares, axis=0))


def _right(run: Run) -> _Told | None:
    best = mapping(run.history.details.get("best"))
    kept = predictions.read(run.history.path, str(best.get("phase"))) if best else None
    if kept is None or not kept.matches(best) or len(kept.parts) != 1 or kept.parts[0].kind not in ("class", "rank"):
        return None
    part = kept.parts[0]
    right = part.right[part.known].astype(np.float64)
    value = run.values.get("best", math.nan)
    # only where they are what the number is made of
    agrees = len(right) > 0 and abs(float(right.mean()) - value) < 1e-4
    return _Told(kept.digest, kept.ids[part.known], right) if agrees else None


def _over_pictures(first: _Told | None, second: _Told | None) -> Estimate | None:
    if first is None or second is None or first.digest != second.digest:
        return None
    ids = _in_all((first.ids, second.ids))
    if not len(ids):
        return None
    return statistics.over_pictures(*(told.share[np.isin(told.ids, ids)] for told in (first, second)))


def _in_all(of: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    first, *others = of
    for other in others:
        first = np.intersect1d(first, other, assume_unique=True)
    return first


def _front(groups: Sequence[Group], cost: str, sign: int) -> tuple[str, ...]:
    """Letters of the groups that no other beats or equals in both and beats in one; nothing where all cost the same."""
    points = {
        g.letter: (sign * statistics.mean(g.values("best")).value, -of)
        for g in groups
        if (of := g.cost(cost)) is not None
    }
    if len({of for _, of in points.values()}) < 2:
        return ()
    return tuple(
        name
        for name, (value, cheap) in points.items()
        if not any(v >= value and c >= cheap and (v, c) != (value, cheap) for v, c in points.values())
    )
