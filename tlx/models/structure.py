"""From a network and one traced forward pass to its ordered layers, at any granularity.

The rules, for every network alike:

- **order** is execution order; **head** is what depends on the number of classes; branches that run only in training
  (inception's auxiliary classifiers) belong to it;
- **stem** is what runs before the first block, tokens and position embeddings included;
- a unit between two blocks (a downsampling) belongs to the block after it;
- **classifier** is what sees one vector per image but is not the head (VGG's two linear layers);
- the head, the classifier and a norm after the last block share one depth (the rule of BEiT and MAE);
- **stages** begin where the number of positions falls to half or less.
"""

from __future__ import annotations

import os.path
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from tlx.layers import Granularity, Kind, Layer, LayerMap, Parameter
from tlx.models.kinds import is_norm, kind, moves
from tlx.models.trace import Shape, Trace
from tlx.models.units import Cut, Labels, Unit, cut

Role = Literal["backbone", "classifier", "head"]


@dataclass
class _Group:
    """A layer to be: where `last` is set, it shares the head's depth."""

    name: str
    units: list[Unit]
    role: Role = "backbone"
    last: bool = False


@dataclass
class _Parts:
    """Units with parameters in execution order, sorted into the parts of a network."""

    stem: list[Unit] = field(default_factory=list)
    body: list[_Group] = field(default_factory=list)
    tail: list[_Group] = field(default_factory=list)
    classifier: list[Unit] = field(default_factory=list)


class Anatomy:
    """A traced network, ready to be divided into layers.

    Args:
        net: as it will train, the new head in place; its parameters may be on the meta device.
        seen: what one forward pass of it showed.
        heads: paths of the modules that make the classes, auxiliary ones included, the main one first.
        labels: groups of parameters that the library itself defines; used where they follow execution order.
    """

    def __init__(self, net: nn.Module, seen: Trace, heads: Sequence[str], labels: Labels | None = None) -> None:
        self._net, self._seen, self._heads = net, seen, tuple(heads)
        self._cut, self._labels = _fitting(net, seen, heads, labels)
        self._modules_by_path = dict(net.named_modules())
        self._parameters = _described(net)
        self._parts = self._sort()

    @property
    def blocks(self) -> tuple[str, ...]:
        """Module paths of the repeated blocks, in execution order: what gradient checkpointing may wrap."""
        return tuple(u.path for u in self._running() if u.block)

    def layers(self, granularity: Granularity) -> LayerMap:
        """The layers; every parameter of the network is in exactly one.

        Raises:
            TlxError: a parameter in none or in two (a fault of this module, not of the user).
        """
        groups = {"stage": self._stages, "block": self._blocks, "module": self._modules}[granularity]()
        groups += self._ends()
        kinds = {p.name: p.kind for p in self._parameters}
        owner = _Owners(self._net, self._cut, groups, self._heads, kinds).assign()
        layers = LayerMap(tuple(self._layer(i, groups, owner) for i in range(len(groups))))
        layers.verify(name for name, _ in self._net.named_parameters())
        return layers

    def _running(self) -> list[Unit]:
        """Units with parameters that run in evaluation mode, the heads left out."""
        units = [u for u in self._cut.units if u.parameters and u.path not in self._heads and u.start is not None]
        return sorted(units, key=lambda u: u.start or 0)

    def _sort(self) -> _Parts:
        units, parts = self._running(), _Parts()
        blocks = [i for i, u in enumerate(units) if u.block]
        first, stop = (blocks[0], blocks[-1] + 1) if blocks else (0, len(units))
        spatial = [i for i, u in enumerate(units) if u.block or not u.vector]
        end = max(spatial[-1] + 1 if spatial else len(units), stop if blocks else 0)
        if self._labels:
            first = self._end_of_stem(units, first)
        parts.stem = units[:first]
        body, tail, parts.classifier = units[first : min(stop, end)], units[min(stop, end) : end], units[end:]
        parts.body = self._body(body)
        parts.tail = _pairs(tail)
        for group in parts.tail:
            group.name = self._name(group.units)
        if parts.tail and blocks and all(u.norm for u in parts.tail[-1].units):
            parts.tail[-1].last = True
        return parts

    def _end_of_stem(self, units: list[Unit], first: int) -> int:
        """The library's first group, as long as it holds no block."""
        same = [self._label(u) == self._label(units[0]) for u in units]
        stop = same.index(False) if False in same else len(units)
        return min(stop, first) if first else first

    def _label(self, unit: Unit) -> int | None:
        return self._labels.get(unit.parameters[0]) if self._labels else None

    def _body(self, units: list[Unit]) -> list[_Group]:
        """A group per block, with what leads to it; without blocks, a group per convolution with its norm."""
        if self._labels:
            runs = _runs(units, [self._label(u) for u in units])
        elif any(u.block for u in units):
            runs = _until_block(units)
        else:
            return _pairs(units)
        groups = [_Group(self._name(run), run) for run in runs]
        return groups if any(u.block for u in units) else _pairs_of_groups(groups)

    def _name(self, units: list[Unit]) -> str:
        blocks = [u.path for u in units if u.block]
        return blocks[0] if len(blocks) == 1 else _shared_path(units, self._cut)

    def _stem(self) -> list[_Group]:
        return [_Group("stem", self._parts.stem)] if self._parts.stem else []

    def _blocks(self) -> list[_Group]:
        return [*self._stem(), *self._parts.body, *self._parts.tail]

    def _stages(self) -> list[_Group]:
        stages: list[_Group] = []
        positions = 0.0
        for group in self._parts.body:
            now = _positions(group.units[-1].output, self._seen.image)
            if not stages or (now and now <= positions / 2):
                stages.append(_Group("", []))
            stages[-1].units += group.units
            positions = now or positions
        norm = [group for group in self._parts.tail if group.last]
        for group in self._parts.tail:
            if not group.last:
                stages[-1].units += group.units
        for i, name in enumerate(_stage_names(stages, self._cut)):
            stages[i].name = name
        return [*self._stem(), *stages, *norm]

    def _modules(self) -> list[_Group]:
        """The trunk's direct children; one that holds every block is opened, and so is the trunk of a plain network."""
        parts = self._parts
        inside = [u for g in [*parts.body, *parts.tail] for u in g.units]
        core = [u for u in inside if u.block] or inside
        units = sorted([*parts.stem, *inside], key=lambda u: u.start or 0)
        last = {u.path for group in parts.tail if group.last for u in group.units}
        groups = []
        for path, listed in self._children("", core):
            mine = [u for u in units if u.path == path or u.path.startswith(f"{path}.")]
            if mine or listed:
                final = bool(mine) and all(u.path in last for u in mine) and not listed
                groups.append(_Group(path, mine, last=final))
        return groups

    def _children(self, path: str, core: list[Unit]) -> list[tuple[str, bool]]:
        """Paths in execution order, each with whether it counts without parameters (its parent is a sequence)."""
        parent = self._net.get_submodule(path)
        found: list[tuple[str, bool]] = []
        for name, child in parent.named_children():
            below = f"{path}.{name}" if path else name
            if len(core) > 1 and all(u.path.startswith(f"{below}.") for u in core):
                found += self._children(below, core)
            elif not any(head == below or head.startswith(f"{below}.") for head in self._heads):
                listed = isinstance(parent, nn.Sequential) and path != ""
                if any(True for _ in child.parameters()) or (listed and below in self._seen.order):
                    found.append((below, listed))
        starts = {u.path: u.start for u in self._cut.units if u.start is not None}
        return sorted(found, key=lambda item: _first_start(item[0], starts))

    def _ends(self) -> list[_Group]:
        heads = [u for u in self._cut.units if u.path in self._heads]
        groups = [_Group(self._heads[0], heads, "head", last=True)]
        if self._parts.classifier:
            name = _shared_path(self._parts.classifier, self._cut, also=heads)
            groups.insert(0, _Group(name, self._parts.classifier, "classifier", last=True))
        return groups

    def _layer(self, index: int, groups: list[_Group], owner: _Owner) -> Layer:
        group = groups[index]
        depth = sum(not g.last for g in groups[: index if not group.last else None])
        modules = self._modules_by_path
        mine = tuple(path for path, i in owner.modules.items() if i == index)
        norms = tuple(path for path in mine if is_norm(modules[path]))
        return Layer(
            name=group.name,
            depth=depth,
            role=group.role,
            parameters=tuple(p for p in self._parameters if owner.parameters[p.name] == index),
            modules=mine,
            norms=norms,
            moving=tuple(path for path in norms if moves(modules[path])),
        )


@dataclass
class _Owner:
    """Parameter name -> index of its group, and the same for modules (those that span groups are left out)."""

    parameters: dict[str, int] = field(default_factory=dict)
    modules: dict[str, int] = field(default_factory=dict)


class _Owners:
    """Puts everything that is not a unit with parameters beside one that is."""

    def __init__(
        self, net: nn.Module, pieces: Cut, groups: list[_Group], heads: Sequence[str], kinds: Mapping[str, Kind]
    ) -> None:
        self._net, self._cut, self._heads, self._kinds = net, pieces, heads, kinds
        self._head = len(groups) - 1
        self._of = {u.path: i for i, group in enumerate(groups) for u in group.units}
        self._named = {group.name: i for i, group in enumerate(groups)}
        clocked = [u for u in pieces.units if u.start is not None and u.parameters and u.path in self._of]
        self._clock = sorted((u.start or 0, self._of[u.path]) for u in clocked)

    def assign(self) -> _Owner:
        owner = _Owner()
        with_parameters = [u for u in self._cut.units if u.parameters]
        of_unit = self._neighbours(with_parameters)
        for unit in with_parameters:
            owner.parameters |= dict.fromkeys(unit.parameters, of_unit[unit.path])
        for loose in self._cut.loose:
            owner.parameters[loose.name] = self._of_loose(loose)
        spans = _spans(owner.parameters)
        empty = [u for u in self._cut.units if not u.parameters]
        for unit in empty:
            around = next((spans[a] for a in _ancestors(unit.path) if a in spans), {0, 1})
            of_unit[unit.path] = next(iter(around)) if len(around) == 1 else self._of_empty(unit)
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
            beside = self._head if unit.start is None and self._beside_head(unit.path) else before
            found[unit.path] = before = self._of.get(unit.path, beside)
        return found

    def _of_empty(self, unit: Unit) -> int:
        """A module without parameters: just before the head it goes with it, otherwise with the layer before it."""
        if unit.path in self._named:  # a child of a plain trunk, which is a layer by itself
            return self._named[unit.path]
        if unit.start is None:
            return self._head if self._beside_head(unit.path) else self._clock[0][1] if self._clock else self._head
        before = [i for clock, i in self._clock if clock < (unit.start or 0)]
        follows = any(clock > unit.start and i != self._head for clock, i in self._clock)
        if not before:
            return self._clock[0][1] if self._clock else self._head
        return before[-1] if follows else self._head

    def _of_loose(self, loose: Loose) -> int:
        if loose.start is None or self._kinds[loose.name] == "embedding":
            return 0
        start = loose.start
        return max((item for item in self._clock if item[0] < start), default=(0, 0))[1]

    def _of_module(self, path: str, spans: Mapping[str, set[int]], of_unit: Mapping[str, int]) -> int | None:
        if path in spans:
            return next(iter(spans[path])) if len(spans[path]) == 1 else None
        inside = next((of_unit[p] for p in (path, *_ancestors(path)) if p in of_unit), None)
        return inside if inside is not None else _only(i for p, i in of_unit.items() if _within(p, path))

    def _beside_head(self, path: str) -> bool:
        """Whether an ancestor other than the root holds a head: an auxiliary branch, a dropout that is not used."""
        return any(head.startswith(f"{a}.") for a in _ancestors(path) for head in self._heads)


def _spans(parameters: Mapping[str, int]) -> dict[str, set[int]]:
    """Module path -> the groups of all parameters below it."""
    spans: dict[str, set[int]] = {}
    for name, index in parameters.items():
        for path in _ancestors(name):
            spans.setdefault(path, set()).add(index)
    return spans


def _ancestors(path: str) -> Iterator[str]:
    """The nearest first, the root left out."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _fitting(net: nn.Module, seen: Trace, heads: Sequence[str], labels: Labels | None) -> tuple[Cut, Labels | None]:
    """The library's labels where they follow execution order and tell blocks apart; otherwise the cut without them."""
    if labels:
        pieces = cut(net, seen, heads, labels)
        running = [u for u in pieces.units if u.parameters and u.start is not None and u.path not in heads]
        order = [labels[u.parameters[0]] for u in sorted(running, key=lambda u: u.start or 0)]
        blocks = [labels[u.parameters[0]] for u in running if u.block]
        if order == sorted(order) and len(set(order)) > 1 and len(set(blocks)) == len(blocks):
            return pieces, labels
    return cut(net, seen, heads), None


def _until_block(units: list[Unit]) -> list[list[Unit]]:
    runs: list[list[Unit]] = [[]]
    for unit in units:
        runs[-1].append(unit)
        if unit.block:
            runs.append([])
    return [run for run in runs if run]


def _runs(units: list[Unit], labels: Sequence[int | None]) -> list[list[Unit]]:
    runs: list[list[Unit]] = []
    for i, unit in enumerate(units):
        if i and labels[i] == labels[i - 1]:
            runs[-1].append(unit)
        else:
            runs.append([unit])
    return runs


def _pairs(units: list[Unit]) -> list[_Group]:
    """A group per unit, a norm joined to the convolution before it."""
    return _pairs_of_groups([_Group(u.path, [u]) for u in units])


def _pairs_of_groups(groups: list[_Group]) -> list[_Group]:
    pairs: list[_Group] = []
    for group in groups:
        if pairs and all(u.norm for u in group.units) and not any(u.norm for u in pairs[-1].units):
            pairs[-1].units += group.units
        else:
            pairs.append(group)
    return pairs


def _shared_path(units: Sequence[Unit], pieces: Cut, also: Sequence[Unit] = ()) -> str:
    """The module that holds these units and no other parameters (those of `also` aside), else the first one's path."""
    if len(units) == 1:
        return units[0].path
    path = _common(u.path for u in units)
    mine = {u.path for u in [*units, *also]}
    others = [u for u in pieces.units if u.parameters and u.path not in mine]
    return path if path and not any(_within(u.path, path) for u in others) else units[0].path


def _stage_names(stages: list[_Group], pieces: Cut) -> list[str]:
    """The containers' own names if every stage has one to itself, else stage1, stage2 ..."""
    names = []
    for stage in stages:
        path = _common(u.path.rpartition(".")[0] + "." for u in stage.units if u.block or len(stage.units) == 1)
        mine = {u.path for u in stage.units}
        others = [u.path for u in pieces.units if u.parameters and u.path not in mine]
        alone = [a for a in (path, *_ancestors(path)) if a and not any(_within(p, a) for p in others)]
        names.append(alone[-1] if alone else "")
    return names if all(names) else [f"stage{i + 1}" for i in range(len(stages))]


def _common(paths: Iterable[str]) -> str:
    split = [p.rstrip(".").split(".") for p in paths]
    return ".".join(os.path.commonprefix(split)) if split else ""  # type: ignore[type-var]


def _positions(output: Shape, image: tuple[int, int]) -> float:
    """Positions of a map (channels first or last) or a sequence of tokens; 0 for anything else."""
    if len(output) == 3:
        return output[1]
    if len(output) != 4:
        return 0
    pairs = [(output[2], output[3]), (output[1], output[2])]
    height, width = min(pairs, key=lambda p: abs(p[0] * image[1] - p[1] * image[0]))
    return height * width


def _first_start(path: str, starts: Mapping[str, int | None]) -> float:
    return min((s for p, s in starts.items() if s is not None and _within(p, path)), default=float("inf"))


def _within(path: str, container: str) -> bool:
    return path == container or path.startswith(f"{container}.")


def _only(indices: Iterable[int]) -> int | None:
    found = set(indices)
    return found.pop() if len(found) == 1 else None


def _described(net: nn.Module) -> tuple[Parameter, ...]:
    listed = getattr(net, "no_weight_decay", None)
    exempt = frozenset(listed()) if callable(listed) else frozenset()
    return tuple(
        Parameter(name, tuple(p.shape), kind(net.get_submodule(name.rpartition(".")[0]), name, exempt))
        for name, p in net.named_parameters()
    )
