"""What pydantic finds wrong, as mistakes that a user can act on: one for each thing that is wrong, with its key."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import ValidationError

from tlx.base.errors import UserError, below

_MAPPING = ("model_type", "model_attributes_type", "dict_type", "mapping_type", "dataclass_type")
_LIST = ("list_type", "tuple_type", "set_type", "frozen_set_type", "sequence_type")
_WANTED = {
    **dict.fromkeys(_MAPPING, "input should be a mapping of keys to values"),
    **dict.fromkeys(_LIST, "input should be a list"),
    **dict.fromkeys(("string_type", "path_type"), "input should be text"),
}
_LENGTH, _MOST = 200, 50  # characters of a value that are shown; mistakes

Suggest = Callable[[Sequence[str | int]], str]


def mistakes(error: ValidationError, given: Any, *, suggest: Suggest = lambda _: "") -> list[UserError]:
    """The mistakes that a validation met.

    A value that may have several forms, a length or a mapping for one, fails as each of them. Told is what is wrong
    with the form that it has; where it has none of them, what they are.

    Args:
        given: what was validated.
        suggest: a clause for an unknown key, by the keys that lead there.
    """
    found = [_Found.of(one, given) for one in error.errors(include_url=False)]
    told = [mistake for one in _without_other_forms(found) for mistake in one.mistakes(suggest)]
    return told if len(told) <= _MOST else [*told[:_MOST], UserError(f"and {len(told) - _MOST:,} more")]


@dataclass(frozen=True)
class _Found:
    """One of pydantic's errors.

    Attributes:
        key: the steps that lead to what is wrong.
        forms: how many steps lead to a value that may have several forms -> the form that this error is of.
        error: as pydantic tells it.
        or_else: what other forms would want.
    """

    key: tuple[str | int, ...]
    forms: Mapping[int, str]
    error: Mapping[str, Any]
    or_else: tuple[str, ...] = ()

    @staticmethod
    def of(error: Any, given: Any) -> _Found:
        """Pydantic's location holds the names of forms, which are no keys: those are what the value does not hold."""
        key, forms, node = list[str | int](), dict[int, str](), given
        *before, last = error["loc"] or (None,)
        for step in before:
            if _holds(node, step):
                key.append(step)
                node = node[step]
            else:
                forms[len(key)] = str(step)
        if last is not None and last != "[key]":
            if _holds(node, last) or (error["type"] == "missing" and isinstance(node, Mapping)):
                key.append(last)
            else:
                forms[len(key)] = str(last)
        return _Found(tuple(key), forms, error)

    @property
    def is_of_form(self) -> bool:
        """Whether the value has another form altogether."""
        return str(self.error["type"]).endswith(("_type", "_parsing", "literal_error", "is_instance_of"))

    @property
    def text(self) -> str:
        kind, said = self.error["type"], str(self.error["msg"]).removeprefix("Value error, ")
        if kind == "missing":
            return "missing"
        return _WANTED.get(kind, said[:1].lower() + _short(said[1:], 1000))

    def mistakes(self, suggest: Suggest) -> list[UserError]:
        where = _short(".".join(map(str, self.key)))
        cause = getattr(self.error.get("ctx", {}).get("error"), "__cause__", None)
        if isinstance(cause, UserError):
            return below(cause, where)
        if self.error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            return [UserError(f"unknown key{suggest(self.key)}", where=where)]
        if self.error["type"] == "missing":
            return [UserError("missing", where=where)]
        given = self.error.get("input")
        is_told = isinstance(given, str) and repr(given)[:100] in self.text
        is_short = isinstance(given, str | int | float | bool) and not is_told
        shown = f" (given: {_short(repr(given))})" if is_short else ""
        others = "".join(f", or {text.removeprefix('input should be ')}" for text in self.or_else)
        is_number = _is_number_for_text(self.error["type"], given) and not self.or_else
        quote = f'write "{given}" in quotes' if is_number else None
        return [UserError(f"{self.text}{others}{shown}", where=where or None, todo=quote)]


def _without_other_forms(found: list[_Found]) -> list[_Found]:
    """Of values with several forms only the errors of one; the outermost first."""
    places = {(depth, one.key[:depth]) for one in found for depth in one.forms}
    for depth, place in sorted(places, key=lambda p: p[0]):
        here = [one for one in found if one.key[:depth] == place and depth in one.forms]
        kept = _of_one_form(here, depth)
        found = [one for one in found if one not in here]
        found += kept
    return found


def _of_one_form(here: list[_Found], depth: int) -> list[_Found]:
    deeper = [one.forms[depth] for one in here if len(one.key) > depth]
    if deeper:  # it has the form, and something in it is wrong
        return [one for one in here if one.forms[depth] == deeper[0]]
    told = [one for one in here if not one.is_of_form]
    if told:
        return [one for one in told if one.forms[depth] == told[0].forms[depth]]
    first, *others = here
    texts = dict.fromkeys(one.text for one in others if one.text != first.text)
    return [_Found(first.key, first.forms, first.error, tuple(texts))]


def _holds(node: Any, step: str | int) -> bool:
    if isinstance(node, Mapping):
        return step in node
    return isinstance(node, list | tuple) and isinstance(step, int) and 0 <= step < len(node)


def _is_number_for_text(kind: str, given: Any) -> bool:
    return kind in ("string_type", "path_type") and isinstance(given, int | float)


def _short(text: str, length: int = _LENGTH) -> str:
    return text if len(text) <= length else f"{text[:length]} ..."


def refuse_truth(value: Any, annotation: Any) -> Any:
    """The value; pydantic takes true for 1.

    Raises:
        ValueError: it is true or false, and only a number would do.
    """
    if isinstance(value, bool) and _takes(annotation, int, float) and not _takes(annotation, bool):
        raise ValueError("input should be a number, not true or false")
    return value


def _takes(annotation: Any, *kinds: type) -> bool:
    if isinstance(annotation, type):
        return issubclass(annotation, kinds) and (annotation is not bool or bool in kinds)
    return any(_takes(inner, *kinds) for inner in get_args(annotation))
