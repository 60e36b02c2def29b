"""The layers of a network, as data: every parameter in exactly one layer, ordered from the input to the head.

No torch here: a LayerMap can be made, checked and planned on a login node or by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from typing import Literal, get_args

from tlx.base.errors import TlxError, UserError, did_you_mean

Kind = Literal["weight", "bias", "norm", "embedding", "scale"]
"""What a parameter is: a norm's weight and bias are both ``norm``; tokens, position embeddings and relative-position
tables are ``embedding``; per-channel factors such as layer scale are ``scale``."""

Granularity = Literal["stage", "block", "module"]

Role = Literal["backbone", "classifier", "head"]
ROLES = get_args(Role)


@dataclass(frozen=True)
class Parameter:
    """One parameter, by the network's own name.

    An `idle` one never trains: no gradient reaches it, or the network itself fixes it (``requires_grad`` is False).
    An `auxiliary` one, of a classifier beside the head or of the branch that leads to it, trains where its layer does
    as a whole.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    idle: bool = False
    auxiliary: bool = False

    @property
    def size(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count

    @property
    def is_bias(self) -> bool:
        """Additive terms, a norm's included (as BitFit counts them)."""
        return self.kind == "bias" or (self.kind == "norm" and self.name.endswith("bias"))


@dataclass(frozen=True)
class Layer:
    """A group of parameters that freezes and learns together.

    Attributes:
        name: unique; usually the module's own path.
        depth: 0 next to the input; layers may share one (VGG's classifier and head).
        role: ``head`` is the new part, ``classifier`` the pretrained rest of the classifier block.
        parameters: may be empty (a ReLU of VGG's trunk is listed and counts for depth).
        modules: every module owned, parameterless ones (dropout) included, by path.
        norms: those of `modules` that normalise.
        moving: those of `norms` that keep running statistics of their batches (the BatchNorms).
    """

    name: str
    depth: int
    role: Role
    parameters: tuple[Parameter, ...]
    modules: tuple[str, ...]
    norms: tuple[str, ...]
    moving: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return sum(p.size for p in self.parameters)


@dataclass(frozen=True)
class LayerMap:
    """Ordered layers, the head last.

    Raises:
        TlxError: a parameter or module in two layers, depths that fall, a name twice, or no head at the end.
    """

    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        for what, seen in (
            ("layer", [layer.name for layer in self.layers]),
            ("parameter", [p.name for layer in self.layers for p in layer.parameters]),
            ("module", [m for layer in self.layers for m in layer.modules]),
        ):
            twice = {name for name in seen if seen.count(name) > 1} if len(set(seen)) < len(seen) else set()
            if twice:
                raise TlxError(f"{what} in two places of the layer map: {', '.join(sorted(twice)[:5])}")
        depths = [layer.depth for layer in self.layers]
        if depths != sorted(depths) or (depths and depths[0] < 0):
            raise TlxError(f"depths of the layer map must not fall: {depths}")
        if not self.layers or self.layers[-1].role != "head":
            raise TlxError("the last layer of a layer map must be the head")

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)

    @property
    def depths(self) -> int:
        """How many depths there are: the head's depth plus one."""
        return self.layers[-1].depth + 1

    @property
    def head(self) -> Layer:
        return self.layers[-1]

    def match(self, pattern: str) -> tuple[Layer, ...]:
        """Layers by name, shell pattern (``features.*``) or role (``head``, ``classifier``, ``backbone``).

        A layer's own name matches it, whatever characters are in it.

        Raises:
            UserError: nothing matches.
        """
        found = tuple(y for y in self.layers if pattern in (y.name, y.role) or fnmatchcase(y.name, pattern))
        if not found:
            raise UserError(
                f'no layer matches "{pattern}"{did_you_mean(pattern, self.names)}',
                todo=f"the layers are {', '.join(self.names[:8])}{' ...' if len(self) > 8 else ''}; see tlx plan",
            )
        return found

    def only(self, layer: Layer) -> str:
        """A pattern that matches this layer alone: its name, or the name spelled so that it is no pattern or role."""
        if self.match(layer.name) == (layer,):
            return layer.name
        spelled = escape(layer.name)
        return spelled if spelled != layer.name else f"[{layer.name[0]}]{layer.name[1:]}"

    def verify(self, parameters: Iterable[str]) -> None:
        """Checks that exactly these parameters are in the map.

        Raises:
            TlxError: naming those that are missing or unknown.
        """
        have = {p.name for layer in self.layers for p in layer.parameters}
        want = set(parameters)
        if have != want:
            missing, unknown = sorted(want - have), sorted(have - want)
            raise TlxError(f"the layer map misses {missing[:5]} and knows {unknown[:5]} that the network has not")
