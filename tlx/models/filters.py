"""The rows of the catalogue that are wanted: first by what the libraries say, then by what building shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from tlx.base.errors import UserError, did_you_mean
from tlx.models import ORDERS, Only, Row
from tlx.models import source as find
from tlx.models.catalogue import row as full_row
from tlx.models.libraries import from_outside
from tlx.models.libraries.counts import count
from tlx.models.libraries.facts import facts
from tlx.models.libraries.names import LIBRARIES
from tlx.models.libraries.sources import Source


@dataclass(frozen=True)
class Candidate:
    """A network and what is known of it; no source where a package's own cannot be imported."""

    source: Source | None
    row: Row


@dataclass
class Sieve:
    """What is left, and what each filter left, so that an empty list can say which one took the last."""

    left: list[Any]
    story: list[str]

    def keep(self, test: Callable[[Any], bool], said: str) -> None:
        self.left = [one for one in self.left if test(one)]
        if not self.left:
            raise UserError(f"no backbone is left: {', '.join(self.story)}, none {said}", todo="loosen the last one")
        self.story.append(f"{len(self.left)} {said}")


def rows(names: Sequence[str], pattern: str, only: Only, *, order: str, details: int, counted: int) -> Iterator[Row]:
    """See :func:`tlx.models.search`."""
    _check(only, order)
    shell = _shell(pattern)
    found = [n for n in names if fnmatchcase(n, shell) or fnmatchcase(n.partition("/")[2], shell)]
    if not found:
        raise UserError(f'no backbone matches "{pattern}"', todo='try a shorter pattern, such as "*resnet*"')
    sieve = Sieve(found, [f'{len(found)} match "{pattern}"'])
    if only.library:
        sieve.keep(lambda name: name.startswith(f"{only.library}/"), f"of {only.library}")
    sieve.left = [_candidate(name, only) for name in sieve.left]
    _by_facts(sieve, only, names)
    low, high = only.parameters
    asked = (low, high) != (None, None)
    if asked or order == "params" or len(sieve.left) <= counted:
        sieve.left = _counted(sieve.left)
    if asked:
        sieve.keep(lambda one: _within(one.row.parameters, low, high), f"of {_range(low, high)} parameters")
    wanted = sieve.left if len(sieve.left) > details else _in_full(sieve.left)
    yield from sorted((one.row for one in wanted), key=_KEYS[order])


def _by_facts(sieve: Sieve, only: Only, names: Sequence[str]) -> None:
    if only.family:
        family = only.family
        if not any(_of(one, family) for one in sieve.left):
            _check_family(only, names)
        sieve.keep(lambda one: _of(one, family), f"of family {family}")
    if only.pretrained:
        sieve.keep(lambda one: bool(one.source and one.source.tags()), "with pretrained weights")
    if only.weights:
        sieve.keep(lambda one: bool(one.row.weights), f'with weights "{only.weights}"')
    if only.size != (None, None):
        low, high = only.size
        sieve.keep(
            lambda one: one.row.input is not None and all(_within(side, low, high) for side in one.row.input.size),
            f"for images of {_range(low, high)} pixels",
        )


def _candidate(name: str, only: Only) -> Candidate:
    """With the weights that are wanted; facts are those of the first of them."""
    try:
        source = find(name) if "/" in name else from_outside.find(name)
    except UserError:
        return Candidate(None, Row(name, ()))
    tags = source.tags()
    if only.weights:
        shell = _shell(only.weights.lower())
        tags = tuple(tag for tag in tags if fnmatchcase(tag.lower(), shell))
    said = facts(source, tags[0] if tags else None)
    return Candidate(
        source,
        Row(name, tags, said.parameters, input=said.input, family=said.family, accuracy=said.accuracy),
    )


def _counted(candidates: Sequence[Candidate]) -> list[Candidate]:
    unknown = [(i, one.source) for i, one in enumerate(candidates) if one.source and one.row.parameters is None]
    numbers = count([(source, next(iter(candidates[i].row.weights), None)) for i, source in unknown])
    found = list(candidates)
    for (i, _), number in zip(unknown, numbers, strict=True):
        found[i] = replace(found[i], row=replace(found[i].row, parameters=number))
    return found


def _in_full(candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    for one in candidates:
        if one.source is None:
            yield one
            continue
        said, seen = one.row, full_row(one.source)
        parameters, spec = said.parameters or seen.parameters, said.input or seen.input
        yield replace(
            one,
            row=replace(
                seen,
                weights=said.weights,
                parameters=parameters,
                input=spec,
                family=said.family,
                accuracy=said.accuracy,
            ),
        )


_KEYS: dict[str, Callable[[Row], Any]] = {
    "name": lambda row: row.name,
    "params": lambda row: (row.parameters is None, row.parameters or 0, row.name),
    "accuracy": lambda row: (row.accuracy is None, -(row.accuracy or 0.0), row.name),
}


def _check(only: Only, order: str) -> None:
    if order not in ORDERS:
        raise UserError(f'there is no order "{order}"{did_you_mean(order, ORDERS)}')
    if only.library and only.library not in LIBRARIES:
        raise UserError(f'there is no library "{only.library}"{did_you_mean(only.library, LIBRARIES)}')


def _of(candidate: Candidate, family: str) -> bool:
    return fnmatchcase(candidate.row.family or "", family)


def _check_family(only: Only, names: Sequence[str]) -> None:
    """Whether there is such a family at all, in any network of the library."""
    of_library = [n for n in names if not only.library or n.startswith(f"{only.library}/")]
    everybody = [_candidate(name, Only()) for name in of_library]
    if only.family and not any(_of(one, only.family) for one in everybody):
        families = sorted({one.row.family for one in everybody if one.row.family})
        raise UserError(
            f'there is no family "{only.family}"{did_you_mean(only.family, families)}',
            todo="tlx models shows the family of each network",
        )


def _shell(pattern: str) -> str:
    """A shell pattern; a plain word is a part of what it matches."""
    return pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"


def _within(value: int | None, low: int | None, high: int | None) -> bool:
    return value is not None and (low is None or value >= low) and (high is None or value <= high)


def _range(low: int | None, high: int | None) -> str:
    if low is None or high is None:
        return f"at most {high:,}" if low is None else f"at least {low:,}"
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
