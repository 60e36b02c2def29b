"""A comparison in words: the verdict, what to mind, the cells of its tables; the same on the page, in Markdown and on
the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tlx.base.terminal import clock
from tlx.report.comparison import COSTS, MEASURES, Comparable, Difference
from tlx.report.groups import Group
from tlx.report.statistics import PAIRED, SOURCES, WELCH, Estimate
from tlx.runs.history import is_share, shown
from tlx.runs.run_files import mapping

_NAMED = 4


def verdict(of: Comparable) -> str:
    """Two sentences: which is better, by how much, how sure; and what that does not tell."""
    ranked = of.ranked
    if not ranked:
        return "No run is done: there is nothing to compare yet."
    if len(ranked) == 1:
        return _of_one(of, ranked[0])
    first, second, *rest = ranked
    nearest = of.between(first, second)
    if nearest is None:  # the type's sake: the two best are always compared
        return ""
    return f"{_claim(of, nearest)}{_others(of, first, rest)} {_limit(of, nearest)}"


def _of_one(of: Comparable, group: Group) -> str:
    estimate = of.estimates[group.letter]["best"]
    value = f"{of.metric} {shown(of.metric, estimate.value)}"
    if estimate.n == 1:
        return f"One run that is done: {value}. How far another seed would come is not known."
    between = f", 95 % {interval(of.metric, estimate)}" if estimate.low is not None else ""
    return (
        f"{estimate.n} runs of one configuration: {value} in the mean{between}. Their standard deviation is "
        f"{amount(of.metric, estimate.deviation)}."
    )


def _claim(of: Comparable, nearest: Difference) -> str:
    names = f"{nearest.first.name} and {nearest.second.name}"
    deciding = nearest.deciding
    if deciding is None:
        first, second = (of.estimates[group.letter]["best"].value for group in (nearest.first, nearest.second))
        ahead = f"{nearest.first.name} has {shown(of.metric, first)}, {amount(of.metric, first - second)} before "
        return f"No difference can be told: {ahead}{nearest.second.name}, {_why(nearest)}."
    by = f"{amount(of.metric, deciding.value)} (95 % {interval(of.metric, deciding, signed=True)}, {basis(nearest)}"
    by += f", p = {probability(nearest.p)})".replace("= <", "<")
    than = "better" if deciding.value >= 0 else "worse"
    if nearest.sure:
        return f"{nearest.first.name} is {than} than {nearest.second.name} by {by}."
    return f"No difference can be told between {names}: the first is {than} by {by}."


def _why(difference: Difference) -> str:
    if difference.seeds is not None or difference.pictures is not None:
        return "the same in every pair, so that there is no interval"
    return "but there are not two seeds of each, nor their predictions of each picture"


def _others(of: Comparable, first: Group, rest: Sequence[Group]) -> str:
    """Of the best and the groups behind the second."""
    against = [d for other in rest if (d := of.between(first, other)) is not None and d.deciding is not None]
    beaten, open_ = ([d.second.letter for d in against if d.sure is sure] for sure in (True, False))
    parts = [f"better than {_listed(beaten)}"] if beaten else []
    parts += [f"not to be told from {_listed(open_)}"] if open_ else []
    return f" {first.letter} is {' and '.join(parts)} as well." if parts else ""


def _limit(of: Comparable, nearest: Difference) -> str:
    """What the first sentence does not tell."""
    tested = _tested(of, nearest)
    if tested:
        return tested
    seeds, pictures = nearest.seeds, nearest.pictures
    if seeds is not None and seeds.p is not None and pictures is not None and pictures.low is not None:
        inside = pictures.low <= 0 <= (pictures.high or 0.0)
        ends = interval(of.metric, pictures, signed=True)
        end = "other pictures may turn it" if inside else "other pictures would hardly turn it"
        return f"Over the {pictures.n:,} validation pictures the interval is {ends}: {end}."
    if nearest.deciding is pictures and pictures is not None:
        return "This is of these very runs: what other seeds would bring is not known."
    return "That is of these validation pictures, on which each run's best evaluation was chosen; others may differ."


def _tested(of: Comparable, nearest: Difference) -> str:
    """The test data, where both have looked at the same."""
    groups = (nearest.first, nearest.second)
    looked = {run.tested for group in groups for run in group.done}
    estimates = [of.estimates[g.letter].get("test") for g in groups]
    if len(looked) != 1 or None in looked or None in estimates:
        return ""
    values = (shown(of.metric, e.value) for e in estimates if e is not None)
    return "On test data they have {} and {}.".format(*values)


def basis(difference: Difference) -> str:
    """Of what the interval is."""
    deciding = difference.deciding
    if deciding is None:
        return ""
    if deciding.method == PAIRED:
        return f"{len(difference.paired)} seeds, paired"
    if deciding.method == WELCH:
        counts = [len(group.values("best")) for group in (difference.first, difference.second)]
        return f"{counts[0]} and {counts[1]} runs, not paired"
    return f"{deciding.n:,} validation pictures, paired"


def notes(sets: Sequence[Comparable]) -> list[str]:
    """What a good colleague would mention."""
    return [note for note in _notes(sets) if note]


def _notes(sets: Sequence[Comparable]) -> Iterator[str]:
    if len(sets) > 1:
        what = "metric" if len({s.validation for s in sets}) == 1 else "validation data"
        yield f"Runs of another {what} stand in tables of their own: they are not compared."
    groups = [group for of in sets for group in of.groups]
    going = [run for group in groups for run in group.runs if not run.history.done]
    if going:
        names = _listed([f"{run.name} ({run.history.state})" for run in going])
        yield f"Not done, and not in means, intervals and fronts: {names}."
    alone = [group.letter for group in groups if len(group.done) == 1]
    if alone:
        yield f"Of one run alone, so that its spread over seeds is not known: {_listed(alone)}."
    for of in sets:
        yield from _of_set(of)
    if any(group.runs for group in groups):
        yield (
            "The best of a run's evaluations was chosen on the pictures that measure it, and is a little too good; "
            "the differences suffer less."
        )


def _of_set(of: Comparable) -> Iterator[str]:
    count = len(of.ranked)
    if count > 2:
        yield (
            f"{count} groups, {count * (count - 1) // 2} pairs: p-values are adjusted by Holm for all pairs, intervals "
            "are not adjusted: of twenty, one misses."
        )
    for difference in of.differences:
        first, second = difference.first.by_seed("best"), difference.second.by_seed("best")
        apart = sorted(first.keys() ^ second.keys())
        if difference.paired and apart:
            yield (
                f"{difference.first.letter} and {difference.second.letter} are compared over the seeds of both "
                f"({_listed(list(map(str, difference.paired)))}); {_listed(list(map(str, apart)))} of one alone."
            )
    if len({run.train for run in of.runs}) > 1:
        yield "The groups were trained on different data."
    versions = [mapping(run.history.details.get("versions")) for run in of.runs]
    for package in sorted({name for own in versions for name in own} & {"tlx", "torch", "timm", "torchvision"}):
        found = sorted({str(own[package]) for own in versions if package in own})
        if len(found) > 1:
            yield f"Trained with different versions of {package}: {_listed(found)}."
    if "time" in of.fronts:
        yield "Training time is by the clock, on the machine and beside the load that each run had."
    looks = [int(n) for run in of.runs if (n := mapping(run.history.details.get("test")).get("look")) is not None]
    if looks and max(looks) > 1:
        yield f"The test data were looked at up to {max(looks)} times: what is chosen by them is too good."


def _listed(names: Sequence[str]) -> str:
    if len(names) > _NAMED:
        return f"{', '.join(names[:_NAMED])} and {len(names) - _NAMED} more"
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def amount(metric: str, difference: float | None) -> str:
    """A difference's size: accuracies in percentage points."""
    if difference is None:
        return "-"
    size = abs(difference)
    return f"{_points(size)} points" if is_share(metric) else f"{size:.3g}"


def _points(share: float) -> str:
    return f"{100 * share:.1f}" if abs(share) >= 0.001 or not share else f"{100 * share:.2f}"


def interval(metric: str, estimate: Estimate, *, signed: bool = False) -> str:
    """Its ends, of a value or (`signed`) of a difference, for which points need no sign of percent."""
    if estimate.low is None or estimate.high is None:
        return "-"
    ends = (estimate.low, estimate.high)
    if is_share(metric):
        low, high = (_points(end) if signed else f"{100 * end:.1f}" for end in ends)
        return f"{low} to {high}" + ("" if signed else " %")
    return "{:.3g} to {:.3g}".format(*ends)


def probability(p: float | None) -> str:
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def value_cell(metric: str, estimate: Estimate | None) -> str:
    """Mean, deviation and interval on two lines."""
    if estimate is None:
        return "-"
    text = shown(metric, estimate.value)
    if estimate.deviation is None:
        return text
    text += f" ± {_points(estimate.deviation) if is_share(metric) else f'{estimate.deviation:.2g}'}"
    return text if estimate.low is None else f"{text}\n{interval(metric, estimate)}"


def difference_cell(metric: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    sign = "+" if estimate.value > 0 else "-" if estimate.value < 0 else ""
    text = f"{sign}{amount(metric, estimate.value)}"
    return text if estimate.low is None else f"{text}\n{interval(metric, estimate, signed=True)}"


def cost_cell(name: str, cost: float | None) -> str:
    if cost is None:
        return "-"
    return clock(cost) if name == "time" else f"{cost:,.0f}"


def group_table(of: Comparable) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the groups; measures and costs that no group has are left out."""
    measures = [m for m in MEASURES if any(m in of.estimates[g.letter] for g in of.groups)]
    costs = [c for c in COSTS if any(g.cost(c) is not None for g in of.groups)]
    gain = ["tuning minus extraction"] if of.gains else []
    heads = ["group", "runs", *(MEASURES[m] for m in measures), *gain, *(COSTS[c] for c in costs)]
    rows = []
    for group in of.groups:
        done = len(group.done)
        runs = f"{done}" if done == len(group.runs) else f"{done} of {len(group.runs)} done"
        row = [f"{group.letter}\n{group.label}".strip(), runs]
        row += [value_cell(of.metric, of.estimates[group.letter].get(m)) for m in measures]
        row += [difference_cell(of.metric, of.gains.get(group.letter))] if gain else []
        rows.append(row + [cost_cell(c, group.cost(c)) for c in costs])
    return heads, rows


def difference_table(of: Comparable) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the pairs."""
    heads = ["pair", "over seeds", "over pictures", "p" + (" (Holm)" if len(of.ranked) > 2 else ""), "in short"]
    rows = [
        [
            f"{d.first.letter} - {d.second.letter}",
            _with_method(of.metric, d, d.seeds),
            _with_method(of.metric, d, d.pictures),
            probability(d.p),
            f"{d.first.letter} is better" if d.sure and d.deciding and d.deciding.value > 0
            else f"{d.second.letter} is better" if d.sure else "not to be told",
        ]
        for d in of.differences
    ]  # fmt: skip
    return heads, rows


def _with_method(metric: str, difference: Difference, estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    pairs = difference.paired and estimate is difference.seeds
    return f"{difference_cell(metric, estimate)}\n" + (f"{estimate.n} pairs" if pairs else f"n = {estimate.n:,}")


def methods(sets: Sequence[Comparable]) -> dict[str, str]:
    """Those that were used, and whose they are."""
    used = {e.method for of in sets for own in of.estimates.values() for e in own.values() if e.low is not None}
    used |= {e.method for of in sets for d in of.differences for e in (d.seeds, d.pictures) if e is not None}
    used |= {"Holm"} if any(len(of.ranked) > 2 for of in sets) else set()
    return {name: source for name, source in SOURCES.items() if name in used}
