"""From a network and one traced forward pass to its ordered layers, at any granularity.

The rules, for every network alike:

- **order** is execution order; **head** is what depends on the number of classes and makes the logits; an auxiliary
  classifier, with the branch it ends, belongs to the layer whose output the branch reads (``auxiliary.py``);
- **stem** is what runs before the first block, tokens and position embeddings included, and up to three blocks where
  the library itself counts them to its stem (FastViT, EfficientViT);
- a unit between two blocks (a downsampling) belongs to the block after it, one that joins the branches of a stage to
  the stage's last block (CSP networks); a module that several blocks share belongs
  to the first that runs it (CoaT's position encodings);
- **classifier** is what gives one vector per image but is not the head (VGG's two linear layers, attention pooling);
- the head, the classifier and norms after the last block share one depth (the rule of BEiT and MAE);
- **stages** begin where the number of positions falls to half or less; where it rises again on the way (HRNet, CoaT,
  GC ViT), they are the trunk's children that hold blocks, if those bring several together.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import nn

from tlx.base.layers import ROLES, Granularity, Layer, LayerMap, Parameter
from tlx.models.auxiliary import Branches, branch_units
from tlx.models.layers.groups import (
    Group,
    ends_stage,
    first_start,
    joined_norms,
    outermost,
    pairs,
    positions,
    runs,
    shared_path,
    stage_names,
    until_block,
    within,
)
from tlx.models.layers.kinds import is_norm, kind, moves
from tlx.models.layers.layer_assignment import Owner, assign
from tlx.models.layers.trace import Trace
from tlx.models.layers.units import Cut, Labels, Unit, cut

_STEM_BLOCKS = 3
"""The most blocks that a library's stem may hold; a trunk in front of a vision transformer is more than a stem."""

_RISE = 1.5
"""How much the number of positions must grow to count: tokens come and go, maps double."""


@dataclass
class _Parts:
    """Units with parameters in execution order, sorted into the parts of a network."""

    stem: list[Unit] = field(default_factory=list)
    body: list[Group] = field(default_factory=list)
    tail: list[Group] = field(default_factory=list)
    classifier: list[Unit] = field(default_factory=list)


class Anatomy:
    """A traced network, ready to be divided into layers.

    Args:
        net: as it will train, the new head in place; its parameters may be on the meta device.
        seen: what one forward pass of it showed.
        heads: paths of the modules that make the logits, the main one first.
        labels: groups of parameters that the library itself defines; used where they follow execution order.
        idle: parameters that no gradient reaches.
        branches: modules that only auxiliary logits are made of.
    """

    def __init__(
        self,
        net: nn.Module,
        seen: Trace,
        heads: Sequence[str],
        labels: Labels | None = None,
        idle: Collection[str] = (),
        branches: Branches = MappingProxyType({}),
    ) -> None:
        self._net, self._seen, self._heads = net, seen, tuple(heads)
        self._cut, self._labels = _fitting(net, seen, heads, labels)
        self._hung = branch_units(self._cut.units, branches, seen)
        self._given = labels or {}
        self._modules_by_path = dict(net.named_modules())
        auxiliary = {name for u in self._cut.units if u.path in self._hung for name in u.parameters}
        self._parameters = _described(net, idle, auxiliary)
        self._parts = self._sort()

    @property
    def blocks(self) -> tuple[str, ...]:
        """Module paths of the repeated blocks, in execution order: what gradient checkpointing may wrap."""
        trunk = [*self._parts.stem, *(u for group in self._parts.body for u in group.units)]
        return tuple(u.path for u in outermost([u for u in trunk if u.block]))

    def layers(self, granularity: Granularity) -> LayerMap:
        """The layers; every parameter of the network is in exactly one.

        Raises:
            TlxError: a parameter in none or in two (a fault of this module, not of the user).
        """
        groups = {"stage": self._stages, "block": self._blocks, "module": self._modules}[granularity]()
        groups += self._ends()
        for group in groups:
            rest = [g for g in groups if g is not group]
            others = {g.name for g in rest} | {u.path for g in rest for u in g.units}
            role = group.name in ROLES and group.name != group.role  # a pattern that says "head" means the head
            taken = group.name in others and all(u.path != group.name for u in group.units)  # a child called "stem"
            if group.units and (role or taken):
                group.name = group.units[0].path
        kinds = {p.name: p.kind for p in self._parameters}
        owner = assign(self._net, self._cut, groups, self._heads, kinds, self._hung)
        layers = LayerMap(tuple(self._layer(i, groups, owner) for i in range(len(groups))))
        layers.verify(name for name, _ in self._net.named_parameters())
        return layers

    def _running(self) -> list[Unit]:
        """Units with parameters that run in evaluation mode, heads and auxiliary branches left out."""
        out = {*self._heads, *self._hung}
        units = [u for u in self._cut.units if u.parameters and u.path not in out and u.start is not None]
        return sorted(units, key=lambda u: u.start or 0)

    def _sort(self) -> _Parts:
        units, parts = self._running(), _Parts()
        end = self._end_of_map(units)
        blocks = [i for i, u in enumerate(units[:end]) if u.block]
        first, stop = (blocks[0], blocks[-1] + 1) if blocks else (0, end)
        while blocks and stop < end and ends_stage(units[:end], stop, self._cut.stages):
            stop += 1
        if self._given:
            first = self._end_of_stem(units[:end], first)
        parts.stem = units[:first]
        body, tail, parts.classifier = units[first:stop], units[stop:end], units[end:]
        parts.body = self._body(body)
        parts.tail = pairs(tail)
        for group in parts.tail:
            group.name = self._name(group.units)
        for group in reversed(parts.tail) if blocks else ():
            if not all(u.norm for u in group.units):
                break
            group.last = True
        return parts

    def _end_of_map(self, units: list[Unit]) -> int:
        """How many units there are up to the last map or tokens; a pooling by attention comes after it."""

        def spatial(u: Unit) -> bool:
            pools = any(within(u.path, pooling) for pooling in self._cut.poolings)
            return not pools and (not u.vector or (u.block and len(u.output) != 2))

        end = max((i + 1 for i, u in enumerate(units) if spatial(u)), default=len(units))
        return (
            end if any(u.block for u in units[:end]) else max([end, *(i + 1 for i, u in enumerate(units) if u.block)])
        )

    def _end_of_stem(self, units: list[Unit], first: int) -> int:
        """How many units are the stem: those before the first block, corrected by the library's first group.

        That may hold a few blocks; or end early, in the same child of the network as the first block.
        """
        labels = [self._given.get(u.parameters[0]) for u in units]
        stop = next((i for i, label in enumerate(labels) if label != labels[0]), len(units))
        inside = sum(u.block for u in units[:stop])
        if 0 < inside <= _STEM_BLOCKS and _STEM_BLOCKS * inside < sum(u.block for u in units):
            return stop
        while not inside and first > stop and _same_child(units[first - 1], units[first]):
            first -= 1
        return first

    def _label(self, unit: Unit) -> int | None:
        return self._labels.get(unit.parameters[0]) if self._labels else None

    def _body(self, units: list[Unit]) -> list[Group]:
        """A group per block, with what leads to it; without blocks, a group per convolution with its norm."""
        if any(u.block for u in units):
            return [Group(self._name(run), run) for run in until_block(units, self._cut.stages)]
        if not self._labels:
            return pairs(units)
        return joined_norms([Group(self._name(run), run) for run in runs(units, [self._label(u) for u in units])])

    def _name(self, units: list[Unit]) -> str:
        blocks = outermost([u for u in units if u.block])
        return blocks[0].path if len(blocks) == 1 else shared_path(units, self._cut)

    def _stem(self) -> list[Group]:
        return [Group("stem", self._parts.stem)] if self._parts.stem else []

    def _blocks(self) -> list[Group]:
        return [*self._stem(), *self._parts.body, *self._parts.tail]

    def _stages(self) -> list[Group]:
        stages = self._stages_by_resolution()
        if self._rises():
            by_child = self._stages_by_child()
            stages = by_child if len(by_child) < len(self._parts.body) else stages
        norm = [group for group in self._parts.tail if group.last]
        for group in self._parts.tail:
            if not group.last:
                stages[-1].units += group.units
        for i, name in enumerate(stage_names(stages, self._cut)):
            stages[i].name = name
        return [*self._stem(), *stages, *norm]

    def _stages_by_resolution(self) -> list[Group]:
        stages: list[Group] = []
        before = 0.0
        for group in self._parts.body:
            now = positions(group.units[-1].output, self._seen.image)
            if not stages or (now and now <= before / 2):
                stages.append(Group("", []))
            stages[-1].units += group.units
            before = now or before
        return stages

    def _rises(self) -> bool:
        """Whether a unit takes or gives more positions than there were: data go up again, or came from elsewhere."""
        before = 0.0
        for unit in (u for group in self._parts.body for u in group.units):
            taken, given = (positions(s, self._seen.image) for s in (self._seen.inputs.get(unit.path, ()), unit.output))
            if before and max(taken, given) > _RISE * before:
                return True
            before = given or before
        return False

    def _stages_by_child(self) -> list[Group]:
        """Groups whose last block lies in the same child of the trunk."""
        body = self._parts.body
        children = [path for path, _ in self._children("", _core([u for group in body for u in group.units]))]
        holds = [next((c for c in children if within(group.name, c)), group.name) for group in body]
        stages: list[Group] = []
        for i, group in enumerate(body):
            if not i or holds[i] != holds[i - 1]:
                stages.append(Group("", []))
            stages[-1].units += group.units
        return stages

    def _modules(self) -> list[Group]:
        """The trunk's direct children; one that holds every block is opened, and so is the trunk of a plain network."""
        parts = self._parts
        inside = [u for group in [*parts.body, *parts.tail] for u in group.units]
        units = sorted([*parts.stem, *inside], key=lambda u: u.start or 0)
        last = {u.path for group in parts.tail if group.last for u in group.units}
        groups: list[Group] = []
        for path, listed in self._children("", _core(inside)):
            mine = [u for u in units if within(u.path, path)]
            if mine or listed:
                final = bool(mine) and all(u.path in last for u in mine) and not listed
                if groups and self._embeds(mine):  # a table beside the patch embedding is as far from the head
                    groups[-1].units += mine
                else:
                    groups.append(Group(path, mine, last=final))
        return groups

    def _embeds(self, units: list[Unit]) -> bool:
        """Whether units before the first block hold nothing but embeddings."""
        names = {name for u in units for name in u.parameters}
        kinds = {p.kind for p in self._parameters if p.name in names}
        return kinds == {"embedding"} and all(u in self._parts.stem for u in units)

    def _children(self, path: str, core: list[Unit]) -> list[tuple[str, bool]]:
        """Paths in execution order, each with whether it counts without parameters (its parent is a sequence)."""
        parent = self._net.get_submodule(path)
        found: list[tuple[str, bool]] = []
        for name, child in parent.named_children():
            below = f"{path}.{name}" if path else name
            if len(core) > 1 and all(u.path.startswith(f"{below}.") for u in core):
                found += self._children(below, core)
            elif not any(within(head, below) for head in self._heads):
                listed = isinstance(parent, nn.Sequential) and path != ""
                if any(True for _ in child.parameters()) or (listed and below in self._seen.order):
                    found.append((below, listed))
        starts = {u.path: u.start for u in self._cut.units if u.start is not None}
        return sorted(found, key=lambda item: first_start(item[0], starts))

    def _ends(self) -> list[Group]:
        heads = [u for u in self._cut.units if u.path in self._heads]
        groups = [Group(self._heads[0], heads, "head", last=True)]
        if self._parts.classifier:
            name = shared_path(self._parts.classifier, self._cut, also=heads)
            groups.insert(0, Group(name, self._parts.classifier, "classifier", last=True))
        return groups

    def _layer(self, index: int, groups: list[Group], owner: Owner) -> Layer:
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


def _same_child(one: Unit, other: Unit) -> bool:
    """Whether they lie in the same child of the network."""
    return one.path.partition(".")[0] == other.path.partition(".")[0]


def _core(units: list[Unit]) -> list[Unit]:
    """What marks the trunk: its blocks, those aside that are a child of the network itself beside others below."""
    blocks = [u for u in units if u.block]
    return [u for u in blocks if "." in u.path] or blocks or units


def _fitting(net: nn.Module, seen: Trace, heads: Sequence[str], labels: Labels | None) -> tuple[Cut, Labels | None]:
    """The library's labels in a network without blocks (MobileNetV1), where they follow execution order."""
    plain = cut(net, seen, heads)
    if labels and not any(u.block for u in plain.units):
        pieces = cut(net, seen, heads, labels)
        running = [u for u in pieces.units if u.parameters and u.start is not None and u.path not in heads]
        order = [labels[u.parameters[0]] for u in sorted(running, key=lambda u: u.start or 0)]
        if order == sorted(order) and len(set(order)) > 1:
            return pieces, labels
    return plain, None


def _described(net: nn.Module, idle: Collection[str], auxiliary: Collection[str]) -> tuple[Parameter, ...]:
    listed = getattr(net, "no_weight_decay", None)
    exempt = frozenset(listed()) if callable(listed) else frozenset()
    return tuple(
        Parameter(
            name,
            tuple(p.shape),
            kind(net.get_submodule(name.rpartition(".")[0]), name, exempt),
            idle=name in idle or not p.requires_grad,  # a fixed position embedding stays fixed
            auxiliary=name in auxiliary,
        )
        for name, p in net.named_parameters()
    )
