"""Ways to read a state dict as the values of a network: as it is, unwrapped, converted by the network's library."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tlx.base.errors import UserError
from tlx.models.weights.positions import Positions

State = dict[str, torch.Tensor]
Convert = Callable[[State, nn.Module], State]

_WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
"""What DistributedDataParallel, torch.compile and the like put into the names of what they wrap."""


@dataclass(frozen=True)
class Reading:
    """One way to read a state dict.

    Attributes:
        state: tensors by the network's names, if this is the right way.
        origins: such a name -> the names in the file that its values come from.
        resized: position embeddings that were put on the network's grid here.
    """

    state: State
    origins: Mapping[str, Collection[str]]
    resized: frozenset[str] = frozenset()


def readings(
    net: nn.Module,
    state: State,
    wanted: Collection[str],
    convert: Convert | None,
    positions: Positions | None = None,
) -> Iterator[Reading]:
    """The ways that make sense, the plainest first.

    Args:
        wanted: names of the network without its classifiers.
        convert: the library's own way to read other layouts and sizes.
        positions: the network's position embeddings; where they are not of its library they are read as they are.

    Raises:
        UserError: the network is in the file twice, under two prefixes; position embeddings on a grid that cannot be
            known.
    """
    seen: list[set[str]] = []
    for names in _renamings(list(state), wanted):
        if set(names) in seen:
            continue
        seen.append(set(names))
        plain = Reading({new: state[old] for new, old in names.items()}, {new: (old,) for new, old in names.items()})
        if positions is not None:
            plain = _placed(plain, positions.placed(plain.state, net, remaining=False))
        yield plain
        converted = _converted(plain, net, convert) if convert else None
        if converted and positions is not None:
            converted = _settled(converted, plain, state, net, positions)
        if converted:
            yield converted


def _placed(reading: Reading, tables: State) -> Reading:
    return replace(reading, state={**reading.state, **tables}, resized=reading.resized.union(tables))


def _settled(converted: Reading, plain: Reading, state: State, net: nn.Module, positions: Positions) -> Reading:
    """A conversion whose position embeddings are on the network's grid.

    A library takes a table of as many places as the network's for one on the same grid, or on that of its own weights:
    what was known before it is what holds. Tables that it has renamed or left at another size are placed now.
    """
    shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
    known, left = {}, {}
    for table in positions.tables:
        name, shape = table.name, shapes[table.name]
        if name in plain.state and plain.state[name].shape == shape:
            known[name] = plain.state[name]
        elif name in converted.state:
            given = converted.state[name]
            sizes = [state[origin].numel() for origin in converted.origins[name]]
            if given.shape != shape or (name not in plain.state and sizes == [given.numel()]):
                left[name] = given
    placed = positions.placed(left, net, remaining=True, beside=plain.state)
    resized = plain.resized.intersection(known).union(placed)
    return replace(converted, state={**converted.state, **known, **placed}, resized=resized)


def _renamings(names: list[str], wanted: Collection[str]) -> Iterator[dict[str, str]]:
    """New name -> name in the file, without the names that are not the network's."""
    yield {name: name for name in names}
    bare = {".".join(part for part in name.split(".") if part not in _WRAPPERS): name for name in names}
    if len(bare) < len(names):  # two of them became one: these parts of names are the network's own
        return
    yield bare
    for prefix in (_prefix(bare, wanted), _common(bare)):
        yield {name.removeprefix(prefix): old for name, old in bare.items() if name.startswith(prefix)}


def _prefix(names: Collection[str], wanted: Collection[str]) -> str:
    """Under which prefix (``backbone.``, ``encoder_q.``) most names of the network are found."""
    known = {name for name in wanted if not name.endswith("num_batches_tracked")}  # which old files have not
    counts = Counter({"": 0})
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in known:
                counts["".join(f"{part}." for part in parts[:i])] += 1
    best = max(counts.values())
    full = [prefix for prefix, count in counts.items() if count == best]
    if "" in full:
        return ""
    if len(full) > 1 and best == len(known):
        both, one = " and ".join(full), full[0].rstrip(".")
        raise UserError(
            f"the network is in there {len(full)} times, under {both}",
            todo=f"set backbone.weights_key to the one that is meant: {one}",
        )
    return full[0]


def _common(names: Collection[str]) -> str:
    """The prefix that all names share."""
    first, *rest = ([*name.split(".")[:-1]] for name in names) if names else ([],)
    depth = len(first)
    for parts in rest:
        depth = next((i for i, (a, b) in enumerate(zip(first, parts, strict=False)) if a != b), min(depth, len(parts)))
        first = first[:depth]
    return "".join(f"{part}." for part in first)


def _converted(plain: Reading, net: nn.Module, convert: Convert) -> Reading | None:
    followed = _Followed(plain)
    try:
        with torch.no_grad(), warnings.catch_warnings(), followed:
            warnings.simplefilter("ignore")  # of old habits in the libraries' code
            state = convert(dict(plain.state), net)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError):  # made for other files
        return None
    if not all(isinstance(t, torch.Tensor) for t in state.values()):
        return None
    origins = {n: followed.origins.get(id(t)) or plain.origins.get(n, ()) for n, t in state.items()}
    return Reading(state, origins)


class _Followed(TorchFunctionMode):
    """Which names of the file the values of each tensor come from, through whatever is done to them inside."""

    def __init__(self, plain: Reading) -> None:
        super().__init__()
        self.origins: dict[int, set[str]] = {}
        self._alive = list(plain.state.values())  # so that no id is used twice
        for name, tensor in plain.state.items():
            self.origins.setdefault(id(tensor), set()).update(plain.origins[name])

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        taken = _tensors((args, kwargs))
        names = {name for tensor in taken for name in self.origins.get(id(tensor), ())}
        for tensor in _tensors(result) if result is not None else taken[:1]:  # tensor[...] = other returns nothing
            self.origins.setdefault(id(tensor), set()).update(names)
            self._alive.append(tensor)
        return result


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
