"""Which layer everything belongs to: parameters, modules with and without them, and what never runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from tlx.base.layers import Kind
from tlx.models.auxiliary import Branches
from tlx.models.layers.groups import Group, within
from tlx.models.layers.units import Cut, Loose, Unit, ancestors


@dataclass
class Owner:
    """Parameter name -> index of its group, and the same for modules (those that span groups are left out)."""

    parameters: dict[str, int] = field(default_factory=dict)
    modules: dict[str, int] = field(default_factory=dict)


def assign(
    net: nn.Module,
    pieces: Cut,
    groups: Sequence[Group],
    heads: Sequence[str],
    kinds: Mapping[str, Kind],
    hung: Branches,
) -> Owner:
    """The owner of every parameter and of every module that lies in one group. The last group is the head.

    Args:
        hung: units of auxiliary branches, with the modules that they hang on, the last one first.
    """
    return _Assigner(net, pieces, groups, heads, kinds, hung).assign()


class _Assigner:
    """Puts everything that is not a unit with parameters beside one that is."""

    def __init__(
        self,
        net: nn.Module,
        pieces: Cut,
        groups: Sequence[Group],
        heads: Sequence[str],
        kinds: Mapping[str, Kind],
        hung: Branches,
    ) -> None:
        self._net, self._cut, self._heads, self._kinds, self._hung = net, pieces, heads, kinds, hung
        self._head = len(groups) - 1
        self._of = {u.path: i for i, group in enumerate(groups) for u in group.units}
        self._bare = {group.name: i for i, group in enumerate(groups) if not group.units}
        clocked = [u for u in pieces.units if u.start is not None and u.parameters and u.path in self._of]
        self._clock = sorted((u.start or 0, self._of[u.path]) for u in clocked)

    def assign(self) -> Owner:
        owner = Owner()
        with_parameters = [u for u in self._cut.units if u.parameters]
        of_unit = self._neighbours(with_parameters)
        for unit in with_parameters:
            owner.parameters |= dict.fromkeys(unit.parameters, of_unit[unit.path])
        for loose in self._cut.loose:
            owner.parameters[loose.name] = self._of_loose(loose)
        spans = _spans(owner.parameters)
        empty = [u for u in self._cut.units if not u.parameters]
        for unit in empty:
            around = _single(next((spans[a] for a in ancestors(unit.path) if a in spans), ()))
            of_unit[unit.path] = self._of_empty(unit) if around is None else around
        for path, _ in self._net.named_modules():
            index = self._of_module(path, spans, of_unit)
            if path and index is not None:
                owner.modules[path] = index
        return owner

    def _neighbours(self, units: Iterable[Unit]) -> dict[str, int]:
        """Groups of units with parameters; one that never ran stands with its neighbour in the source."""
        found: dict[str, int] = {}
        before = self._clock[0][1] if self._clock else self._head
        for unit in units:
            if unit.path in self._hung:
                found[unit.path] = self._of_branch(self._hung[unit.path])
                continue
            beside = self._head if unit.start is None and self._beside_head(unit.path) else before
            found[unit.path] = before = self._of.get(unit.path, beside)
        return found

    def _of_branch(self, hangs_on: Sequence[str]) -> int:
        """The group of the first of these modules that lies in one; without any the last one below the head."""
        units = (u for path in hangs_on for u in self._cut.units if within(path, u.path))
        unit = next((u for u in units if u.path in self._of or not u.parameters), None)
        if unit is None:
            return max(self._head - 1, 0)
        return self._of[unit.path] if unit.path in self._of else self._of_empty(unit)

    def _of_empty(self, unit: Unit) -> int:
        """A module without parameters: just before the head it goes with it, otherwise with the layer before it."""
        bare = [self._bare[p] for p in (unit.path, *ancestors(unit.path)) if p in self._bare]
        if bare:  # a child of a plain trunk, which is a layer by itself
            return bare[0]
        first = self._clock[0][1] if self._clock else self._head
        if unit.start is None:
            return self._head if self._beside_head(unit.path) else first
        before = [i for clock, i in self._clock if clock < (unit.start or 0)]
        follows = any(clock > unit.start and i != self._head for clock, i in self._clock)
        return self._head if not follows else before[-1] if before else first

    def _of_loose(self, loose: Loose) -> int:
        if loose.start is None or self._kinds[loose.name] == "embedding":
            return 0
        start = loose.start
        return max((item for item in self._clock if item[0] < start), default=(0, 0))[1]

    def _of_module(self, path: str, spans: Mapping[str, set[int]], of_unit: Mapping[str, int]) -> int | None:
        if path in spans:
            return _single(spans[path])
        inside = next((of_unit[p] for p in (path, *ancestors(path)) if p in of_unit), None)
        return inside if inside is not None else _single(i for p, i in of_unit.items() if within(p, path))

    def _beside_head(self, path: str) -> bool:
        """Whether an ancestor other than the root holds a head: a dropout that is not used."""
        return any(head.startswith(f"{a}.") for a in ancestors(path) for head in self._heads)


def _spans(parameters: Mapping[str, int]) -> dict[str, set[int]]:
    """Module path -> the groups of all parameters below it."""
    spans: dict[str, set[int]] = {}
    for name, index in parameters.items():
        for path in ancestors(name):
            spans.setdefault(path, set()).add(index)
    return spans


def _single(indices: Iterable[int]) -> int | None:
    found = set(indices)
    return found.pop() if len(found) == 1 else None
