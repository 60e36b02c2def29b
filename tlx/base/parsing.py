"""YAML and JSON that anybody may have written: plain data or ValueError, in memory that the text accounts for.

YAML is read, and written, by the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema). PyYAML's own
is that of YAML 1.1, which takes ``010`` for 8, ``12:30`` for 750, ``no`` for false, ``2001-01-01`` for a date and
``1e-3`` for a text. Here they are 10, two texts, a text and a number. Merge keys (``<<``) are known, as everywhere.
"""

from __future__ import annotations

import errno
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LONGEST = 1 << 22
"""Characters of a YAML text; a configuration has a few thousand, a written-out plan up to a million."""

_VALUES, _DEPTH = 100_000, 50  # that a YAML text may stand for, its aliases written out, and how deep they may lie
_DIGITS = 20  # of a number of 64 bits, its sign counted
_LONE = re.compile(r"\\u[dD][89a-fA-F]")
_TAG = "tag:yaml.org,2002:"
_CORE = {
    "null": re.compile(r"(~|null|Null|NULL|)\Z"),
    "bool": re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"),
    "int": re.compile(r"([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"),
    "float": re.compile(
        r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z"
    ),
}
_RESOLVERS: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {
    None: [(_TAG + kind, form) for kind, form in {**_CORE, "merge": re.compile(r"<<\Z")}.items()]
}
_OPENING = "{[\"'"  # what begins a mapping, a list or a quoted text
_NO_TEXT = re.compile("[^\t\n\r -~\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_BREAK = re.compile("[\n\r\x85\u2028\u2029\ufeff]")
_HINTS = {
    "found character '\\t'": "a tab; YAML is indented by spaces alone",
    "mapping values are not allowed here": 'a second ": " on a line; put the text that holds it in quotes',
    "found unexpected end of stream": "a quote that does not end",
}


def from_yaml(text: str) -> Any:
    """The value of a YAML text. Of its tags only those of plain data are known: nothing is imported or called.

    Aliases may stand for aliases (``a: &a [x, x]``, ``b: [*a, *a]``), so that a short text would fill the memory of
    whoever prints or copies its value. They are counted, and a text that stands for too much is refused.

    Raises:
        ValueError: it is not YAML, too long, nested too deep, says a key twice, or holds what no file could be written
            of again; with the line.
    """
    node = _composed(text)
    return None if node is None else _Reader({}).made(node).value


def from_yaml_file(file: Path) -> Any:
    """The value of a YAML file in UTF-8; see :func:`from_yaml`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8, or not YAML.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(4 * LONGEST + 1)
    except ValueError:
        raise OSError(errno.EINVAL, "no file can have this name", ascii(str(file))) from None
    try:
        return from_yaml(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError("its text is UTF-16; save it as UTF-8") from None
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line}: the byte {content[error.start]:#04x} is not UTF-8; save it as UTF-8") from None


def from_word(text: str) -> Any:
    """The value that a word of a command line stands for: a mapping or list in YAML's flow style (``{a: 1}``, ``[1]``),
    a quoted text, a number, true, false or null; anything else is a text and taken whole, so that ``runs/exp #3`` and
    ``a: b`` are texts.

    Raises:
        ValueError: it begins as a mapping, a list or a quoted text and is none; it is not text.
    """
    bare = text.strip()
    if bare.startswith(tuple(_OPENING)):
        node = _composed(bare)
        if node is None or node.start_mark.index or node.end_mark.index != len(bare) or _is_block(node):
            raise ValueError("something follows the closing quote or bracket")
        return _Reader({}).made(node).value
    _refuse_characters(text)
    value = scalar(bare)
    return text if isinstance(value, str) else value


def scalar(text: str) -> str | int | float | bool | None:
    """What a plain (not quoted) scalar means by YAML 1.2's core schema.

    Raises:
        ValueError: a number of more than 64 bits.
    """
    found: str | int | float | bool | None
    found = _read(next((kind for kind, form in _CORE.items() if form.match(text)), "str"), text)
    return found


def to_yaml(value: Any, *, flow: bool = False) -> str:
    """YAML of plain data that :func:`from_yaml` reads back to the same, and any reader of YAML 1.1 too: what either
    would take for something else than a text is quoted.

    Args:
        flow: on one line, as a word of a command line may hold it.
    """
    text = io.StringIO()
    width = 1 << 20 if flow else 80
    dumper = yaml.SafeDumper(text, default_flow_style=flow, width=width, sort_keys=False, allow_unicode=True)
    theirs = yaml.SafeDumper.yaml_implicit_resolvers
    dumper.yaml_implicit_resolvers = {**theirs, None: [*theirs.get(None, []), *_RESOLVERS[None]]}
    representers: dict[type, Any] = {**yaml.SafeDumper.yaml_representers, str: _text}
    dumper.yaml_representers = representers  # type: ignore[misc]
    dumper.ignore_aliases = lambda data: True  # type: ignore[method-assign]
    try:
        dumper.open()  # type: ignore[no-untyped-call]
        dumper.represent(value)
        dumper.close()  # type: ignore[no-untyped-call]
    finally:
        dumper.dispose()  # type: ignore[no-untyped-call]
    return text.getvalue().removesuffix("...\n").strip() if flow else text.getvalue()


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # PyYAML writes the line breaks of Unicode as they are, and reads other ones back
    return dumper.represent_scalar(f"{_TAG}str", text, style='"' if _BREAK.search(text) else None)


def _composed(text: str) -> yaml.Node | None:
    """The nodes of the only document in a text."""
    if len(text) > LONGEST:
        raise ValueError(f"longer than {LONGEST:,} characters")
    text = text.removeprefix("\ufeff")
    _refuse_characters(text)
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        loader.yaml_implicit_resolvers = _RESOLVERS
        return loader.get_single_node()
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except yaml.MarkedYAMLError as error:
        raise ValueError(_in_words(error)) from None
    except (ValueError, OverflowError):
        raise ValueError("an escape in it (\\U, \\x or %) is of no character") from None
    finally:
        if loader is not None:
            loader.dispose()


def _in_words(error: yaml.MarkedYAMLError) -> str:
    mark, said = error.problem_mark or error.context_mark, error.problem or error.context or "not YAML"
    said = f"{error.context}, {said}" if said.startswith("but ") else said
    said = next((hint for sign, hint in _HINTS.items() if said.startswith(sign)), said)
    return f"{_line(mark)}, column {mark.column + 1}: {said}" if mark is not None else said


def _line(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}"


def _refuse_characters(text: str) -> None:
    odd = _NO_TEXT.search(text)
    if odd is None:
        return
    code = ord(odd[0])
    what = "the control character" if code < 0xA0 else "the character"
    if 0xD800 <= code < 0xE000:
        what = "a byte that is not UTF-8, or half of a character (a lone surrogate),"
    elif code == 0xFEFF:
        what = "a byte order mark"
    before = text[: odd.start()]
    place = f"line {before.count(chr(10)) + 1}, column {odd.start() - before.rfind(chr(10))}"
    raise ValueError(f"{place}: {what} U+{code:04X} cannot stand in a text; remove it")


def _is_block(node: yaml.Node) -> bool:
    return isinstance(node, yaml.CollectionNode) and node.flow_style is not True


@dataclass(frozen=True)
class _Made:
    """A value; how many it is and how deep they lie, its aliases written out."""

    value: Any
    size: int = 1
    height: int = 1


@dataclass(frozen=True)
class _Reader:
    """Makes values of nodes, of each once. `made_of`: by the identity of a node; None while it is being made."""

    made_of: dict[int, _Made | None]

    def made(self, node: yaml.Node) -> _Made:
        if id(node) in self.made_of:
            known = self.made_of[id(node)]
            if known is None:
                raise ValueError(f"{_line(node.start_mark)}: an alias in it stands for what it is in")
            return known
        self.made_of[id(node)] = None
        try:
            found = self._new(node)
        except RecursionError:
            raise ValueError("it is nested too deep") from None
        if found.size > _VALUES:
            raise ValueError(f"it stands for more than {_VALUES:,} values")
        if found.height > _DEPTH:
            raise ValueError("it is nested too deep")
        self.made_of[id(node)] = found
        return found

    def _new(self, node: yaml.Node) -> _Made:
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.ScalarNode) and kind in ("str", *_CORE):
            return _Made(_scalar_of(node, kind))
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            parts = [self.made(below) for below in node.value]
            return _whole([part.value for part in parts], parts)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node)
        raise ValueError(f"{_line(node.start_mark)}: {_tagged(node)} has no meaning here")

    def _mapping(self, node: yaml.MappingNode) -> _Made:
        own: dict[Any, Any] = {}
        merged: dict[Any, Any] = {}
        lines: dict[Any, int] = {}
        parts = []
        for key_node, below in node.value:
            key, part = self._key(key_node), self.made(below)
            line = key_node.start_mark.line + 1
            if key in lines:
                raise ValueError(
                    f'line {line}: the key "{key}" was said in line {lines[key]} already; keep one of them'
                )
            lines[key] = line
            parts += [_Made(key), part]
            if key_node.tag == f"{_TAG}merge":
                for name, value in _merged(part.value, line).items():
                    merged.setdefault(name, value)
            else:
                own[key] = part.value
        return _whole({**merged, **own}, parts)

    def _key(self, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            raise ValueError(f"{_line(node.start_mark)}: a key that is a list or a mapping")
        return node.value if node.tag == f"{_TAG}merge" else self.made(node).value


def _whole(value: Any, parts: list[_Made]) -> _Made:
    return _Made(value, 1 + sum(part.size for part in parts), max((part.height + 1 for part in parts), default=1))


def _merged(value: Any, line: int) -> Mapping[Any, Any]:
    """What ``<<: *name`` or ``<<: [*one, *other]`` brings; the first of several wins."""
    found: dict[Any, Any] = {}
    for one in value if isinstance(value, list) else [value]:
        if not isinstance(one, dict):
            raise ValueError(f"line {line}: << takes a mapping, or a list of them")
        found = {**one, **found}
    return found


def _scalar_of(node: yaml.ScalarNode, kind: str) -> Any:
    line, text = _line(node.start_mark), node.value
    if kind in _CORE and not _CORE[kind].match(text):
        raise ValueError(f"{line}: {_tagged(node)} cannot be {text[:100]!r}")
    if "\0" in text:
        raise ValueError(f"{line}: a text with a NUL character (U+0000), which nothing can be named by")
    if not _has_an_encoding(text):
        raise ValueError(f"{line}: a text with half of a character (a lone surrogate)")
    try:
        return _read(kind, text)
    except ValueError as error:
        raise ValueError(f"{line}: {error}") from None


def _tagged(node: yaml.Node) -> str:
    tag = node.tag if len(node.tag) < 100 else f"{node.tag[:100]}..."
    return f"the tag !!{tag.removeprefix(_TAG)}" if tag.startswith(_TAG) else f"the tag {tag}"


def _read(kind: str, text: str) -> Any:
    """A text of this form of the core schema."""
    if kind == "str":
        return text
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    digits = text[2:] if base != 10 else text
    value = int(digits, base) if len(digits.lstrip("+-0")) < _DIGITS else 1 << 64
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError("a number of more than 64 bits")
    return value


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
