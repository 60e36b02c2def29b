"""A network cut into units: the smallest pieces that freeze together, in the order in which data pass them.

A **block** is where the data fork and join (residual and transformer blocks, inception and dense layers); its class is
a block wherever it stands, also where an instance happens to have no shortcut. What holds blocks or the classifier is
opened, and so are plain sequences; everything else (a patch embedding, a conv with its norm) is one unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from tlx.models.trace import Shape, Trace

Labels = Mapping[str, int]
"""Parameter name -> number of its group, where the library itself groups parameters."""


@dataclass(frozen=True)
class Unit:
    """A module that is not cut further.

    Attributes:
        path: of the module.
        parameters: full names, those below included.
        start: when it first ran; None if it never did in evaluation mode (auxiliary branches, unused identities).
        output: shape of what it returned.
        block: whether data fork and join inside.
        norm: whether it does nothing but normalise.
    """

    path: str
    parameters: tuple[str, ...]
    start: int | None
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
    """Every parameter of the network: in one unit or loose. Units stand in the order of the network's source."""

    units: tuple[Unit, ...]
    loose: tuple[Loose, ...]


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
        joining = {type(net.get_submodule(path)) for path in seen.joins if path}
        self._blocks = {t for t in joining if not issubclass(t, _SEQUENCES)}
        self._units: list[Unit] = []
        self._loose: list[Loose] = []

    def run(self) -> Cut:
        self._open("", self._net)
        return Cut(tuple(self._units), tuple(self._loose))

    def _open(self, path: str, module: nn.Module) -> None:
        own = [_join(path, name) for name, _ in module.named_parameters(recurse=False)]
        self._loose += [Loose(name, self._seen.used.get(name)) for name in own]
        for name, child in module.named_children():
            below = _join(path, name)
            (self._open if self._opens(below, child) else self._add)(below, child)

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
        return isinstance(module, _SEQUENCES) or any(type(m) in self._blocks for m in module.modules())

    def _add(self, path: str, module: nn.Module) -> None:
        from tlx.models.kinds import is_norm

        inside = [_join(path, name) for name, _ in module.named_modules()]
        names = tuple(_join(path, name) for name, _ in module.named_parameters())
        starts = [self._seen.order[p] for p in inside if p in self._seen.order]
        starts += [self._seen.used[n] for n in names if n in self._seen.used]
        self._units.append(
            Unit(
                path=path,
                parameters=names,
                start=min(starts, default=None),
                output=self._seen.outputs.get(path, ()),
                block=type(module) in self._blocks,
                norm=is_norm(module),
            )
        )


_SEQUENCES = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _join(path: str, name: str) -> str:
    return ".".join(part for part in (path, name) if part)
