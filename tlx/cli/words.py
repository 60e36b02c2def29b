"""Words of a command line that several commands take: a configuration, its changes, paths."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tlx.base.errors import UserError, did_you_mean
from tlx.base.launcher import rank
from tlx.base.paths import expanded_path
from tlx.base.terminal import be_quiet, remark

FORWARDED = {"ignore_unknown_options": True}
"""Settings of a command that takes changes: ``--seed=1``, which sweep agents write, comes to them as a word."""

_CHANGE = re.compile(r"--(?P<key>[A-Za-z_][\w.\-]*)(?P<value>=.*)?", re.DOTALL)


def path(word: str) -> Path:
    """A path, ``~`` and variables filled in, where no shell has done so (``--out=~/x``, a word from a script)."""
    return expanded_path(word)


def place(word: str) -> str:
    """The same of a folder or a URL, which stays as it is."""
    from tlx.base.location import place as of_shards

    return str(of_shards(word))


def config_path(word: str) -> Path:
    """The file of a configuration.

    Raises:
        UserError: it begins as an option and is no file.
    """
    found = expanded_path(word)
    if word.startswith("-") and not found.exists():
        raise UserError(f"there is no option {word}", todo="the configuration comes first: CONFIG key=value ...")
    return found


def _changes(context: typer.Context, words: Sequence[str] | None) -> list[str]:
    """Words ``key=value``; of words ``--key=value`` those whose key is one of the configuration's.

    Raises:
        UserError: an option that the command has not.
    """
    return [_change(context, word) if word.startswith("-") else word for word in words or ()]


def _change(context: typer.Context, word: str) -> str:
    from tlx.base.key_aliases import right_key
    from tlx.plan.config import Config

    found = _CHANGE.fullmatch(word)
    key = found["key"] if found else ""
    first = key.partition(".")[0]
    is_key = first in Config.model_fields
    if found and found["value"] and (is_key or right_key(first)):  # another code's name is told which key it is here
        return f"{key}{found['value']}"
    command = f"{context.command_path} --help"
    if is_key:
        raise UserError(f"{word} has no value", todo=f"write it into the same word: {key}=value")
    name = word.partition("=")[0]
    options = [option for parameter in context.command.params for option in parameter.opts if option.startswith("--")]
    near = did_you_mean(name, options) if _is_near(name, options) else did_you_mean(first, Config.model_fields)
    raise UserError(
        f"there is no option {name}{near}", todo=f"{command} lists them; what is trained is set by key=value"
    )


def _is_near(name: str, options: Sequence[str]) -> bool:
    return "did you mean" in did_you_mean(name, options)


def announce(text: str) -> None:
    """A line for whoever waits at a terminal: importing torch and a library of networks takes seconds."""
    if sys.stderr is not None and sys.stderr.isatty() and rank() == 0:
        remark(text)


def _hush(wanted: bool) -> bool:
    be_quiet(wanted)
    return wanted


Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Only warnings, mistakes and the result.", callback=_hush, is_eager=True)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="For instance data.batch=64; also --data.batch=64.", callback=_changes),
]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see configs/.", parser=config_path)]
