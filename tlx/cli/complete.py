"""What <Tab> offers after `tlx ...`: commands, options, files, keys of configurations and their values.

It is asked for at every <Tab>, and importing the commands would take longer than a person waits: so it imports nothing
but the standard library, and reads :func:`tlx.cli.completion.table` from a file that is made anew whenever tlx is
another one. The shells' scripts are in :mod:`tlx.cli.completion`.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FILES = "*"
"""Offers the files of a folder, which the shell knows best."""

_TLX = Path(__file__).parents[1]
_MADE_FROM = ("__init__.py", "cli/*.py", "plan/*.py", "base/plug.py")


def answer(line: str) -> list[str]:
    """What may follow at the end of a command line, in whole words; with `FILES` among them, also files.

    A word that ends in ``=`` or ``.`` goes on.
    """
    words, current = _words(line)
    known = _table()
    command, options, typed = _command(known, words)
    if command is None:
        return [name for name in options if name.startswith(current)]
    if current.startswith("-"):
        return [option for option in command["options"] if option.startswith(current)]
    last = words[-1] if words else ""
    if command["options"].get(last):  # which takes a value
        return [FILES]
    config = next((word for word in typed if word.lower().endswith((".yaml", ".yml"))), None)
    if command["takes"] == "keys" or (command["takes"] == "changes" and typed):
        found = list(_keys(known, current, config, whole=command["takes"] == "keys"))
        return found or [FILES]
    if command["choices"]:
        return [word for word in command["choices"] if word.startswith(current)]
    return [FILES]


def _words(line: str) -> tuple[list[str], str]:
    """The whole words after `tlx`, and the one that is being typed."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="")
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    try:
        words.extend(lexer)
    except ValueError:  # a quote that is still open
        words = line.split()
    current = words.pop() if words and not line[-1:].isspace() else ""
    return words[1:], current


def _command(known: Mapping[str, Any], words: Sequence[str]) -> tuple[Any, list[str], list[str]]:
    """The command that is typed, or None and the words that may come; its arguments so far."""
    commands = known["commands"]
    for count, word in enumerate(words):
        if word.startswith("-"):
            continue
        if word not in commands:
            return None, [], []
        found = commands[word]
        if "commands" not in found:
            return found, [], [one for one in words[count + 1 :] if not one.startswith("-")]
        commands = found["commands"]
    return None, [*commands, *(["--help", "--version"] if commands is known["commands"] else ["--help"])], []


def _keys(known: Mapping[str, Any], current: str, config: str | None, *, whole: bool) -> Iterator[str]:
    """Keys with the steps typed so far, a step further; values of a key that has choices."""
    key, equals, value = current.partition("=")
    if equals:
        for choice in _at(known, key).get("values", []):
            if choice.startswith(value):
                yield f"{key}={choice}"
        return
    *before, begun = key.split(".")
    node = _at(known, ".".join(before)) if before else known["keys"]
    names = [*node.get("below", {})] if before else [*node]
    if "NAME" in names:
        names = [name for name in names if name != "NAME"] + list(_phases(known, config))
    for name in names:
        if name.startswith(begun):
            place = ".".join([*before, name])
            found = _at(known, place)
            if found.get("value", True):
                yield place if whole else f"{place}="
            if found.get("below"):
                yield f"{place}."


def _at(known: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    node: Mapping[str, Any] = {"below": known["keys"]}
    for step in key.split("."):
        below = node.get("below", {})
        node = below.get(step) or below.get("NAME") or {}
    return node


def _phases(known: Mapping[str, Any], config: str | None) -> Iterator[str]:
    """Names of phases: those of the file, and those that schedules have."""
    names = list(known["phases"])
    if config is not None:
        try:
            from tlx.base.parsing import from_yaml_file

            said = from_yaml_file(Path(config).expanduser()) or {}
            names += [str(name) for root in ("phases", "further") for name in said.get(root) or {}]
        except Exception:  # whatever is wrong with it, <Tab> is not the moment to say so
            pass
    yield from dict.fromkeys(names)


def _table() -> Any:
    """What there is, from the file, or made anew."""
    made_from = [file for pattern in _MADE_FROM for file in sorted(_TLX.glob(pattern))]
    version = [[file.name, file.stat().st_mtime_ns] for file in made_from] + [[str(_TLX), sys.version_info[1]]]
    file = Path(os.path.expanduser("~/.cache/tlx/completion.json"))
    try:
        kept = json.loads(file.read_text("utf-8"))
        if kept["version"] == version:
            return kept["table"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    from tlx.cli.completion import table

    made = table()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f"{file.name}.{os.getpid()}")
        beside.write_text(json.dumps({"version": version, "table": made}), encoding="utf-8")
        beside.replace(file)
    except OSError:
        pass
    return made
