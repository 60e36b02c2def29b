"""A configuration for programs that compare runs key by key (W&B, MLflow): each key has one kind of value."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from tlx.base.location import shown
from tlx.plan.config import Config
from tlx.plan.parts import Part


def comparable(raw: Mapping[str, Any], model: type[BaseModel] = Config) -> dict[str, Any]:
    """Of plain data such as ``config.yaml`` holds: a part is always a mapping with its `name`, also where a name alone
    says all of it, and of a list of parts a mapping by place: ``{"0": {"name": "resize"}, ...}``. Addresses lose
    their credentials. Other values stay as they are; nothing is looked up or refused.

    Args:
        model: what the data are of.
    """
    known = model.model_fields
    return {
        str(key): _said(_value(value, known[key].annotation) if key in known else value) for key, value in raw.items()
    }


def _said(value: Any) -> Any:
    """Without the credentials of addresses: it goes to others' servers."""
    if isinstance(value, Mapping):
        return {str(key): _said(of) for key, of in value.items()}
    if isinstance(value, list):
        return [_said(of) for of in value]
    return shown(value) if isinstance(value, str) else value


def _value(value: Any, hint: Any) -> Any:
    if value is None:
        return None
    kinds = list(_kinds(hint))
    if Part in kinds and _holds_parts(hint):
        return _parts(value)
    model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    if model is None or model is Part or not isinstance(value, Mapping):
        return value
    if typing.get_origin(_bare(hint)) is dict:
        return {str(key): comparable(of, model) if isinstance(of, Mapping) else of for key, of in value.items()}
    return comparable(value, model)


def _parts(value: Any) -> Any:
    """A part, or a list of them."""
    if isinstance(value, list):
        return {str(place): _parts(one) for place, one in enumerate(value)}
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, Mapping) and set(value) == {"name", "args"} and isinstance(value["args"], Mapping):
        return {"name": value["name"], **value["args"]}
    return value


def _holds_parts(hint: Any) -> bool:
    """A part, a list of them, either or nothing: no mapping whose values are parts."""
    return typing.get_origin(_bare(hint)) is not dict


def _bare(hint: Any) -> Any:
    """Without ``Annotated`` and ``| None``."""
    while True:
        if typing.get_origin(hint) is typing.Annotated:
            hint = typing.get_args(hint)[0]
            continue
        own = [one for one in typing.get_args(hint) if one is not type(None)]
        if type(None) in typing.get_args(hint) and len(own) == 1:
            hint = own[0]
            continue
        return hint


def _kinds(hint: Any) -> typing.Iterator[Any]:
    """The types that a hint is made of, those in front first."""
    yield hint
    for inner in typing.get_args(hint):
        yield from _kinds(inner)
