"""Parts inside a part's arguments: the tasks of a multi-task, the objective of one of them. Their annotation says the
group, by which a configuration checks and completes them; see :class:`tlx.base.plug.Group`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tlx.base import plug
from tlx.base.errors import UserError

_WANTED = "input should be a name, or a mapping of name and arguments"


def opened(value: Any) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a part as a configuration writes it: a name, or a mapping with the arguments beside it.

    Raises:
        UserError: it is neither.
    """
    if isinstance(value, str):
        return value, {}
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return value["name"], {key: of for key, of in value.items() if key != "name"}
    raise UserError(_WANTED)


def made(group: str, value: Any, *given: Any) -> Any:
    """The part itself, called with what tlx gives and its arguments.

    Raises:
        UserError: with its name, for whatever it raises.
    """
    name, arguments = opened(value)
    function, label = plug.find(group, name), f"{group} {name}"
    return plug.call(label, function, *given, **plug.arguments(function, arguments, label=label))
