"""A network cut into units: the smallest pieces that freeze together, in the order in which data pass them.

A **block** is where the data fork and join (residual and transformer blocks, inception and dense layers, the branches
of HRNet's modules and CrossViT's): what runs side by side between fork and join is one block. Its class is a block
wherever it stands, also where an instance happens to have no shortcut. Two refinements: where only one branch holds
blocks in a row (a cross-stage partial network, a class token put in front of a stage), the module is a stage and its
blocks are blocks; and a repeated module made of several joining parts (MaxViT's convolution, window and grid attention)
is one block. What holds blocks or the classifier is opened, and so are plain sequences; everything else (a patch
embedding, a conv with its norm) is one unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from tlx.models.layers.kinds import is_norm
from tlx.models.layers.trace import SEQUENCES, Shape, Trace

Labels = Mapping[str, int]
"""Parameter name -> number of its group, where the library itself groups parameters."""


@dataclass(frozen=True)
class Unit:
    """A module that is not cut further.

    Attributes:
        path: of the module.
        parameters: full names, those below included.
        start, stop: when it first ran; None if it never did in evaluation mode (auxiliary branches, unused identities).
        output: shape of what it returned.
        block: whether data fork and join inside.
        norm: whether all its parameters are those of norms.
    """

    path: str
    parameters: tuple[str, ...]
    start: int | None
    stop: int | None
    output: Shape
    block: bool
    norm: bool

    @property
    def vector(self) -> bool:
        """Whether it returned one vector per image rather than a map or tokens."""
        return all(n == 1 for n in self.output[2:])


@dataclass(frozen=True)
class Loose:
    """A parameter that belongs directly to a module which was opened (class token, position embedding)."""

    name: str
    start: int | None


@dataclass(frozen=True)
class Cut:
    """Every parameter of the network: in one unit or loose. Units stand in the order of the network's source.

    Attributes:
        stages: paths of joining modules that were opened because they hold a row of blocks.
        poolings: paths of modules that join data and hold a head, such as a pooling by attention that ends in it.
    """

    units: tuple[Unit, ...]
    loose: tuple[Loose, ...]
    stages: tuple[str, ...] = ()
    poolings: tuple[str, ...] = ()


def cut(net: nn.Module, seen: Trace, heads: Sequence[str], labels: Labels | None = None) -> Cut:
    """Opens modules from the root down as described above.

    Args:
        heads: paths that must become units of their own.
        labels: a module whose parameters carry several labels is opened too.
    """
    return _Cutter(net, seen, heads, labels or {}).run()


class _Cutter:
    def __init__(self, net: nn.Module, seen: Trace, heads: Sequence[str], labels: Labels) -> None:
        self._net, self._seen, self._heads, self._labels = net, seen, heads, labels
        self._blocks, self._stages = block_and_stage_classes(net, seen)
        self._units: list[Unit] = []
        self._loose: list[Loose] = []

    def run(self) -> Cut:
        self._open("", self._net)
        around = dict.fromkeys(a for head in self._heads for a in ancestors(head))
        poolings = tuple(a for a in around if type(self._net.get_submodule(a)) in self._blocks)
        stages = tuple(path for path, m in self._net.named_modules() if type(m) in self._stages)
        return Cut(tuple(self._units), tuple(self._loose), stages, poolings)

    def _open(self, path: str, module: nn.Module) -> None:
        own = [_join(path, name) for name, _ in module.named_parameters(recurse=False)]
        self._loose += [Loose(name, self._seen.used.get(name)) for name in own]
        for name, child in module.named_children():
            below = _join(path, name)
            (self._open if self._opens(below, child) else self._add)(below, child)

    def _owner(self, parameter: str) -> nn.Module:
        return self._net.get_submodule(parameter.rpartition(".")[0])

    def _opens(self, path: str, module: nn.Module) -> bool:
        if path in self._heads or not any(True for _ in module.children()):
            return False
        if any(head.startswith(f"{path}.") for head in self._heads):
            return True
        labels = {self._labels.get(_join(path, name)) for name, _ in module.named_parameters()}
        if len(labels) > 1:
            return True
        if type(module) in self._blocks:
            return False
        return isinstance(module, SEQUENCES) or any(type(m) in self._blocks for m in module.modules())

    def _add(self, path: str, module: nn.Module) -> None:
        inside = [_join(path, name) for name, _ in module.named_modules()]
        names = tuple(_join(path, name) for name, _ in module.named_parameters())
        starts = [self._seen.order[p] for p in inside if p in self._seen.order]
        starts += [self._seen.used[n] for n in names if n in self._seen.used]
        self._units.append(
            Unit(
                path=path,
                parameters=names,
                start=min(starts, default=None),
                stop=self._seen.ended.get(path, max(starts, default=None)),
                output=self._seen.outputs.get(path, ()),
                block=type(module) in self._blocks,
                norm=bool(names) and all(is_norm(self._owner(name)) for name in names),
            )
        )


def block_and_stage_classes(net: nn.Module, seen: Trace) -> tuple[set[type[nn.Module]], set[type[nn.Module]]]:
    """The classes whose instances are blocks, and those that join data but hold a row of blocks."""
    modules = dict(net.named_modules())
    joining = {type(modules[path]) for path in seen.joins if path and not is_norm(modules[path])} - set(SEQUENCES)
    numbered = [path for path, m in modules.items() if isinstance(m, SEQUENCES) and _first_name(m).isdigit()]
    stages = _stages(modules, joining, [path for path in numbered if _alike(modules[path], joining)])
    blocks = joining - stages
    blocks |= _composite(modules, blocks, numbered)
    return blocks | _beside(modules, blocks, numbered), stages


def _first_name(sequence: nn.Module) -> str:
    return next(iter(sequence._modules), "")


def _alike(sequence: nn.Module, joining: set[type[nn.Module]]) -> bool:
    """Whether two of the children are joining modules of one class."""
    kinds = [type(child) for child in sequence.children() if type(child) in joining]
    return len(set(kinds)) < len(kinds)


def _stages(
    modules: Mapping[str, nn.Module], joining: set[type[nn.Module]], rows: Sequence[str]
) -> set[type[nn.Module]]:
    """Joining classes with one row of blocks inside: of their branches only one is made of blocks."""
    inside: dict[type[nn.Module], int] = {}
    for path, module in modules.items():
        if type(module) in joining:
            nested = [row for row in rows if row.startswith(f"{path}.")]
            inside[type(module)] = max(inside.get(type(module), 0), len(nested))
    return {kind for kind, count in inside.items() if count == 1}


def _composite(
    modules: Mapping[str, nn.Module], blocks: set[type[nn.Module]], numbered: Sequence[str]
) -> set[type[nn.Module]]:
    """Classes that stand repeated in numbered sequences, hold blocks, and have no such sequence of blocks inside."""

    def holds(module: nn.Module) -> bool:
        return any(type(m) in blocks for m in module.modules())

    def inside(path: str) -> bool:
        return any(type(modules[a]) in blocks for a in ancestors(path))

    rows = {path for path in numbered if holds(modules[path]) and not inside(path)}
    found: dict[type[nn.Module], list[str]] = {}
    for path, module in modules.items():
        if path.rpartition(".")[0] in rows and not isinstance(module, SEQUENCES) and holds(module):
            found.setdefault(type(module), []).append(path)
    closed = (
        kind
        for kind, paths in found.items()
        if len(paths) > 1 and kind not in blocks and not any(r.startswith(f"{p}.") for p in paths for r in rows)
    )
    return set(closed)


def _beside(
    modules: Mapping[str, nn.Module], blocks: set[type[nn.Module]], numbered: Sequence[str]
) -> set[type[nn.Module]]:
    """Classes of what makes up a sequence without blocks, where the sequences beside it are rows of blocks.

    The first of EfficientNet's stages is one separable convolution, whose class has no shortcut in that network.
    """

    def holds(module: nn.Module) -> bool:
        return any(type(m) in blocks for m in module.modules())

    found: set[type[nn.Module]] = set()
    for path in numbered:
        rows = list(modules[path].children())
        if all(type(row) in SEQUENCES for row in rows) and sum(map(holds, rows)) > 1:
            lone = (child for row in rows if not holds(row) for child in row.children())
            found |= {type(c) for c in lone if not isinstance(c, SEQUENCES) and any(True for _ in c.children())}
    return found


def ancestors(path: str) -> Iterator[str]:
    """The modules around a path, the nearest first, the root left out."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _join(path: str, name: str) -> str:
    return ".".join(part for part in (path, name) if part)
