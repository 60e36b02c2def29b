"""YAML and JSON that anybody may have written: plain data or ValueError, in memory that the text accounts for."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

LONGEST = 1 << 22
"""Characters of a YAML text; a configuration has a few thousand, a written-out plan up to a million."""

_VALUES, _DEPTH = 100_000, 50  # that a YAML text may stand for, its aliases written out, and how deep they may lie
_LONE = re.compile(r"\\u[dD][89a-fA-F]")


def from_yaml(text: str) -> Any:
    """The value of a YAML text. Of its tags only those of plain data are known: nothing is imported or called.

    Aliases may stand for aliases (``a: &a [x, x]``, ``b: [*a, *a]``), so that a short text would fill the memory of
    whoever prints or copies its value. They are counted before anything is made of them.

    Raises:
        ValueError: it is not YAML, too long, nested too deep, or holds what no file could be written of again.
    """
    if len(text) > LONGEST:
        raise ValueError(f"longer than {LONGEST:,} characters")
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})
        value = loader.construct_document(node)
        _verify(value)
        return value
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except _Refused as refused:
        raise ValueError(str(refused)) from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # of the makers of dates, numbers and the like: ValueError, KeyError, AttributeError ...
        raise ValueError(f"a value in it cannot be read: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


class _Refused(Exception):
    """Well-formed, and yet nothing to go on with."""


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values a node stands for and how deep they lie, aliases written out; each node is counted once."""
    if id(node) in known:
        size, height = known[id(node)]
        if not size:
            raise _Refused("an alias in it stands for what it is in")
        return size, height
    known[id(node)] = 0, 0
    below: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        below = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    size, height = 1, 1
    for part in below:
        more, deep = _measure(part, known)
        size, height = size + more, max(height, deep + 1)
    if size > _VALUES:
        raise _Refused(f"it stands for more than {_VALUES:,} values")
    if height > _DEPTH:
        raise _Refused("it is nested too deep")
    known[id(node)] = size, height
    return size, height


def _verify(value: Any) -> None:
    if isinstance(value, dict):
        for key, below in value.items():
            _verify(key)
            _verify(below)
    elif isinstance(value, list | tuple | set):
        for below in value:
            _verify(below)
    elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise _Refused("a number in it has more than 64 bits")
    elif isinstance(value, str):
        if "\0" in value:
            raise _Refused("a text in it has a null character")
        if not (value.isascii() or _has_an_encoding(value)):
            raise _Refused("a text in it has half of a character (a lone surrogate)")


def from_json(content: bytes | str) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        ValueError: it is not JSON, nested too deep, or holds what no file could be written of again.
    """
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    try:
        value = json.loads(text)
        if _LONE.search(text) and not _has_an_encoding(json.dumps(value, ensure_ascii=False)):
            raise ValueError("a text in it has half of a character (a lone surrogate)")
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return value


def _has_an_encoding(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
