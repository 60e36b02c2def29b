"""What holds for every job on a cluster: one small YAML file."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, PositiveInt, ValidationError

from tlx.base.errors import ConfigError, UserError, did_you_mean
from tlx.base.launcher import environment
from tlx.base.parsing import from_yaml_file
from tlx.base.paths import expanded_path
from tlx.base.validation import mistakes
from tlx.plan.parts import Model
from tlx.submit import times

VARIABLE = "TLX_SITE"
HERE = Path("slurm/site.yaml")
HOME = Path("~/.config/tlx/site.yaml")

Launcher = Literal["torchrun", "accelerate", "srun"]
OPTION = re.compile(r"--[a-z][a-z0-9-]*(=.*)?", flags=re.ASCII)


def plain(text: str) -> str:
    """
    Raises:
        ValueError: control characters, line breaks and the like, which would end a line of the script.
    """
    if not text.isprintable():
        raise ValueError("has characters that cannot be printed, line breaks perhaps")
    return text


def expanded(text: str) -> str:
    """
    Raises:
        ValueError: ``~``, which stays as it is in a script: only variables are expanded there.
    """
    if re.match(r"(--[\w-]+=)?~", text):
        raise ValueError(f"{text[:100]!r}: ~ does nothing here; write $HOME")
    return text


def split(value: Any) -> Any:
    """A list of words, from one text as a shell reads it.

    Raises:
        ValueError: a quote that does not end.
    """
    return shlex.split(plain(value)) if isinstance(value, str) else value


def words(value: Any) -> Any:
    """The same for slurm/train.sbatch.

    Raises:
        ValueError: a quote that does not end, ``~``, or a word that slurm/train.sbatch would take apart.
    """
    given = split(value)
    for word in given if isinstance(given, list) else ():
        if isinstance(word, str):
            expanded(word)
        if isinstance(word, str) and re.search(r"[\s*?\[]", word):
            raise ValueError(
                f"{word!r}: a word with spaces or * ? [ in it does not come through; link to it by a plain name"
            )
    return given


def option(text: str) -> str:
    """
    Raises:
        ValueError: it is not ``--name`` or ``--name=value``.
    """
    if not OPTION.fullmatch(plain(text)):
        raise ValueError(f'{text[:100]!r} is not an option of sbatch; write "--mail-type=END"')
    return text


def _limit(value: Any) -> Any:
    # a number of seconds, or of minutes as Slurm has it?
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError("a time is written with its unit, 12h or 90m, or as 12:00:00")
    if isinstance(value, str):
        times.read(value)
    return value


Text = Annotated[str, AfterValidator(plain)]
Words = Annotated[tuple[Text, ...], BeforeValidator(words)]
Names = Annotated[tuple[Text, ...], BeforeValidator(split)]
Folder = Annotated[Text, AfterValidator(expanded)]
Options = Annotated[tuple[Annotated[str, AfterValidator(option)], ...], BeforeValidator(split)]
Limit = Annotated[str, BeforeValidator(_limit)]
Lines = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: value.splitlines() if isinstance(value, str) else value)
]


class Site(Model):
    """Defaults of one cluster; the command line goes before. What each key means is said in slurm/site.yaml."""

    partition: Text | None = None
    account: Text | None = None
    qos: Text | None = None
    constraint: Text | None = None
    time: Limit | None = None
    gpus_per_node: PositiveInt | None = None
    gpu_type: Text | None = None
    cpus_per_gpu: PositiveInt | None = None
    memory: Annotated[Text, BeforeValidator(lambda value: str(value) if type(value) is int else value)] | None = None
    modules: Names = ()
    setup: Lines = ()
    container: Words = ()
    python: Words = ()
    launcher: Launcher | None = None
    stage: Folder | None = None
    srun: Words = ()
    options: Options = ()


def find(named: Path | None) -> tuple[Site, Path | None]:
    """The site and its file: `named`, else that of TLX_SITE, else slurm/site.yaml here where it says anything (the one
    that comes with tlx does not), else ~/.config/tlx/site.yaml, else none.

    Raises:
        UserError: a file that was named cannot be read, or a mistake in it.
    """
    if named is None and (said := environment().get(VARIABLE)):
        named = expanded_path(said, where=VARIABLE)
    if named is not None:
        return load(named), named
    for file in (HERE, HOME.expanduser()):
        if file.is_file() and (site := load(file)) != Site():
            return site, file
    return Site(), None


def load(file: Path) -> Site:
    """
    Raises:
        UserError: it cannot be read, or is not YAML.
        ConfigError: everything that is wrong in it, together.
    """
    try:
        raw = from_yaml_file(file)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(file), todo="see slurm/site.yaml") from error
    except ValueError as error:
        raise UserError(f"is not YAML: {error}", where=str(file)) from error
    if raw is None:  # every line a comment
        raw = {}
    if not isinstance(raw, Mapping):
        raise UserError("is not a mapping of keys to values", where=str(file), todo="see slurm/site.yaml")
    try:
        return Site.model_validate(raw)
    except ValidationError as error:
        found = mistakes(error, raw, suggest=lambda steps: did_you_mean(str(steps[-1]), Site.model_fields))
        raise ConfigError(found, where=str(file)) from error
