"""A network filled from a state dict: completely, but for what the user allows to differ, or not at all."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from glob import escape

import torch
from torch import nn

from tlx.base.errors import UserError, did_you_mean
from tlx.base.terminal import escaped
from tlx.models import WeightsOptions
from tlx.models.weights.files import Given, in_fp32
from tlx.models.weights.formats import listed
from tlx.models.weights.positions import Positions
from tlx.models.weights.state_dict_formats import Convert, Reading, State, readings

_NOT_FINITE = "not finite or no real numbers"
_BATCHES_TRACKED = "num_batches_tracked"  # which old files have not
_OFFERED = 12  # patterns of `backbone.allow` in an error; more would let a file of another network in
_COMPARED = 2000  # names that a pattern is compared with for a suggestion


@dataclass(frozen=True)
class Filled:
    """What `fill` did.

    Attributes:
        taken: names of the network that got values.
        resized: those of `taken` whose values were resized.
        left: names of the file that were not taken.
        notes: what else people should know of it.
        classifier: what the file has in the classifiers' places, by the network's names; not taken.
    """

    taken: frozenset[str]
    resized: tuple[str, ...]
    left: tuple[str, ...]
    notes: tuple[str, ...] = ()
    classifier: Mapping[str, torch.Tensor] = field(default_factory=dict)


def fill(
    net: nn.Module,
    given: Given,
    *,
    name: str,
    heads: Collection[str],
    convert: Convert | None = None,
    positions: Positions | None = None,
    options: WeightsOptions = WeightsOptions(),  # noqa: B008  # frozen
) -> Filled:
    """Loads `given` into `net` completely, its classifiers left out; every precision becomes fp32.

    Names may carry what DataParallel and torch.compile add, and a prefix under which the whole network is found.
    Counters (``n_averaged``, ``num_batches_tracked``) may be there or not.

    Args:
        name: of the network, for messages.
        heads: paths of modules whose values stay as they are and may be of any shape or absent in `given`.
        convert: the library's own way to read other layouts and sizes; tried when `given` does not fit as it is.
        positions: the network's position embeddings, and what is known of the file's.
        options: `new` and `unused` are what may be absent from the file, and what may be left in it.

    Raises:
        UserError: parameters missing, unknown, of another shape or not numbers, listed; a pattern that matches nothing.
    """
    state = {name: in_fp32(tensor) for name, tensor in given.state.items()}
    wanted = {n: t for n, t in net.state_dict().items() if not _under(n, heads)}
    misfits: list[tuple[dict[str, list[str]], Reading]] = []
    fitting: list[Reading] = []
    try:
        for reading in readings(net, state, wanted, convert, positions):
            misfit = _misfit(wanted, reading, _strange(net, wanted, reading, heads), options)
            if misfit:
                misfits.append((misfit, reading))
                continue
            fitting.append(reading)
            if not options.patterns:
                break
    except UserError as error:
        raise UserError(error.what, where=error.where or given.where, todo=error.todo) from error
    if not fitting:
        worst, reading = min(misfits, key=lambda found: sum(len(names) for names in found[0].values()))
        todo = _advice(worst, wanted, reading, _strange(net, wanted, reading, heads))
        raise UserError(f"does not fit {name}: {_counted(worst)}", where=given.where, todo=todo)
    best = max(fitting, key=lambda reading: len(_usable(wanted, reading)))  # the plainest of equals
    filled = _fill(wanted, given, state, best, positions)
    left = [*filled.left, *(n for n in best.state if n not in filled.taken)]
    _refuse_idle("unused", options.unused, left, " that is left in the file")
    if wanted and not filled.taken:
        raise UserError(f"contains no weights for {name}", where=given.where)
    return replace(filled, classifier={n: t for n, t in best.state.items() if _under(n, heads)})


def take_head(net: nn.Module, given: Given, paths: Collection[str], *, name: str) -> frozenset[str]:
    """Loads the head of `given`, a file of tlx, whose names are the network's; returns the names that got values.

    Args:
        paths: of the modules that make the classes, auxiliary ones included.

    Raises:
        UserError: another head is in there, or none.
    """
    wanted = {n: t for n, t in net.state_dict().items() if _under(n, paths)}
    state = {n: in_fp32(t) for n, t in given.state.items()}
    misfit = _misfit(wanted, Reading({n: state[n] for n in wanted if n in state}, {}), (), WeightsOptions())
    if misfit:
        raise UserError(
            f"its head does not fit that of {name}: {_counted(misfit)}",
            where=given.where,
            todo="head.keep goes on with the same head, of the same arguments; without it the head is new",
        )
    with torch.no_grad():
        for one, tensor in wanted.items():
            tensor.copy_(state[one])
    return frozenset(wanted)


def take_projection(net: nn.Module, map_: str, filled: Filled, paths: Sequence[str], given: Given) -> Filled:
    """Loads into the linear layer `map_` of the new head what the file has in the classifier's place: the projection of
    a CLIP tower.

    Args:
        paths: of the network's own classifiers, before the head took their place.

    Raises:
        UserError: it has none there, or one of another width than the class vectors.
    """
    layer = net.get_submodule(map_)
    assert isinstance(layer, nn.Linear)
    found = {n: t for n, t in filled.classifier.items() if _under(n, paths[:1])}
    weight = next((t for n, t in found.items() if n == f"{paths[0]}.weight"), None)
    bias = next((t for n, t in found.items() if n == f"{paths[0]}.bias"), None)
    where, todo = given.where, "a CLIP tower's file, and class vectors of its own text encoder; without init it is new"
    if weight is None:
        raise UserError("it has no projection (head.init: projection)", where=where, todo=todo)
    if weight.shape != layer.weight.shape:
        features, width = weight.shape[1], weight.shape[0]
        what = f"its projection makes {width} of {features} numbers, and class vectors have {layer.out_features}"
        raise UserError(what, where=where, todo=todo)
    if bias is not None and bool(bias.any()) and layer.bias is None:
        raise UserError("its projection has a bias", where=where, todo="head.bias: true")
    with torch.no_grad():
        layer.weight.copy_(in_fp32(weight))
        if layer.bias is not None:
            layer.bias.copy_(torch.zeros_like(layer.bias) if bias is None else in_fp32(bias))
    taken = filled.taken | {f"{map_}.{name}" for name, _ in layer.named_parameters()}
    return replace(filled, taken=taken, left=tuple(n for n in filled.left if n not in found))


def refuse_unknown(net: nn.Module, options: WeightsOptions, *, name: str) -> None:
    """
    Raises:
        UserError: a pattern of what may keep its initial values matches nothing in the network.
    """
    _refuse_idle("new", options.new, list(net.state_dict()), f" of {name}")


def _refuse_idle(which: str, patterns: Sequence[str], names: Sequence[str], whose: str) -> None:
    for pattern in patterns:
        if not _matches(names, (pattern,)):
            near = did_you_mean(pattern, names[:_COMPARED])
            raise UserError(
                f'no parameter{whose} matches "{escaped(pattern)}"{near}',
                where=f"backbone.allow.{which}",
                todo="a pattern is that of a shell: decoder_*, blocks.11.*",
            )


def _matches(names: Collection[str], patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _fill(wanted: State, given: Given, state: State, reading: Reading, positions: Positions | None) -> Filled:
    taken = _usable(wanted, reading)
    used: set[str] = set()
    resized = []
    with torch.no_grad():
        for name in taken:
            wanted[name].copy_(reading.state[name])
            used |= set(reading.origins[name])
            sizes = [state[origin].numel() for origin in reading.origins[name]]
            if name in reading.resized or (len(sizes) == 1 and sizes[0] != wanted[name].numel()):
                resized.append(name)
    assumed = positions.assumed if positions is not None else {}
    notes = [
        f"{name} read as {rows} x {columns} places, which the file does not say (backbone.weights_size)"
        for name, (rows, columns) in assumed.items()
        if name in taken
    ]
    notes += _low_precision([given.precision.get(name, given.state[name].dtype) for name in used])
    left = tuple(name for name in state if name not in used)
    return Filled(frozenset(taken), tuple(resized), left, (*given.notes, *notes))


def _low_precision(stored: Sequence[torch.dtype]) -> list[str]:
    """What was lost before the file was written, by the precisions that it has."""
    kinds = [kind for kind in stored if kind.is_floating_point and kind.itemsize < 4]
    return [
        f"{kinds.count(kind)} of {len(stored)} tensors are stored as {str(kind).removeprefix('torch.')}, which rounds "
        f"by up to {torch.finfo(kind).eps / 2:.2g} of a value"
        for kind in dict.fromkeys(kinds)
    ]


def _usable(wanted: State, reading: Reading) -> list[str]:
    """The names of the network that a reading has values for."""
    have = reading.state
    return [n for n, t in wanted.items() if n in have and have[n].shape == t.shape and _numbers(have[n], like=t)]


def _strange(net: nn.Module, wanted: State, reading: Reading, heads: Collection[str]) -> list[str]:
    """Names of a reading that are neither the network's nor a head's, counters left out."""
    names = (n for n in reading.state if n not in wanted and not _is_counter(n, reading.state[n]))
    return [n for n in names if not _under(n, heads) and not _foreign_head(n, net)]


def _misfit(wanted: State, reading: Reading, strange: Sequence[str], options: WeightsOptions) -> dict[str, list[str]]:
    """What is wrong -> names."""
    have = reading.state
    want = [n for n in wanted if not _matches((n,), options.new)]
    there = [n for n in want if n in have]
    other = [n for n in there if have[n].shape != wanted[n].shape]
    lists = {
        "missing": [n for n in want if n not in have and not n.endswith(_BATCHES_TRACKED)],
        "not in the network": [n for n in strange if not _matches((n, *reading.origins[n]), options.unused)],
        "of another shape": [f"{n} {tuple(have[n].shape)} instead of {tuple(wanted[n].shape)}" for n in other],
        _NOT_FINITE: [n for n in there if not _numbers(have[n], like=wanted[n])],
    }
    return {what: names for what, names in lists.items() if names}


def _counted(misfit: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{len(names)} {what} ({listed(names)})" for what, names in misfit.items())


def _is_counter(name: str, tensor: torch.Tensor) -> bool:
    """Bookkeeping of an average or a training (``n_averaged``, ``initted``): one whole number or truth, no weight."""
    counts = not tensor.is_floating_point() and not tensor.is_complex() and tensor.numel() == 1
    return counts or name.endswith(_BATCHES_TRACKED)


def _numbers(given: torch.Tensor, *, like: torch.Tensor) -> bool:
    """Whether values can stand for those of a tensor of the network."""
    if not like.is_floating_point():
        return not (given.is_floating_point() or given.is_complex())
    return given.dtype == torch.float32 and bool(given.isfinite().all())


def _advice(misfit: Collection[str], wanted: State, reading: Reading, strange: Sequence[str]) -> str:
    usual = "the file must come from this network with the same backbone.args; only the classifier may differ"
    if list(misfit) == ["of another shape"]:
        usual = "backbone.args must be those that the weights were trained with (img_size, channels ...)"
    if _NOT_FINITE in misfit:
        return "values that are no numbers are of a training that failed, or of a damaged file: take an earlier one"
    fits, have = _usable(wanted, reading), reading.state
    absent = [
        n for n, t in wanted.items() if (have[n].shape != t.shape if n in have else not n.endswith(_BATCHES_TRACKED))
    ]
    if len(absent) > len(fits) or len(strange) > _COMPARED:
        return usual
    lists = {"new": _patterns(absent, fits), "unused": _patterns(strange, fits)}
    if not 0 < sum(map(len, lists.values())) <= _OFFERED:
        return usual
    said = ", ".join(f"{which}: {json.dumps(patterns)}" for which, patterns in lists.items() if patterns)
    return f"{usual}; where the difference is meant, set backbone.allow: {{{said}}}"


def _patterns(names: Sequence[str], others: Collection[str]) -> list[str]:
    """Shell patterns that match these names and none of the others, as few as their first words allow."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        starts = (".".join(parts[:depth]) + "." for depth in range(1, len(parts)))
        start = next((s for s in starts if not any(other.startswith(s) for other in others)), None)
        found[f"{escape(start)}*" if start is not None else escape(name)] = None
    return list(found)


def _under(name: str, paths: Collection[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


def _foreign_head(name: str, net: nn.Module) -> bool:
    """A head that tlx put on when it wrote the file."""
    return name.startswith(("head.new.", "new_head.")) or (name.startswith("head.") and not hasattr(net, "head"))
