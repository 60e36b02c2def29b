"""slurm/train.sbatch, taken apart: what a site may say otherwise, and the rest, which nobody touches."""

from __future__ import annotations

import re
import site
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tlx.base.errors import TlxError, UserError

MARKER = "# == the job: nothing below differs between sites =="
_OPTION = re.compile(r"#SBATCH --([a-z-]+)(?:=(\S+))?")
_SETTING = re.compile(r': "\$\{([A-Z_]+):=.*')


@dataclass(frozen=True)
class Template:
    """
    Attributes:
        options: of sbatch, without their dashes; None where one has no value.
        settings: name of a variable -> the line that gives it a default.
        body: everything from the marker line on.
    """

    options: Mapping[str, str | None]
    settings: Mapping[str, str]
    body: str

    @classmethod
    def read(cls, file: Path) -> Template:
        """
        Raises:
            TlxError: it has no marker line.
        """
        head, marker, rest = file.read_text(encoding="utf-8").partition(f"\n{MARKER}\n")
        if not marker:
            raise TlxError(f'{file}: the line "{MARKER}" is missing')
        lines = head.splitlines()
        options = {m[1]: m[2] for m in map(_OPTION.match, lines) if m}
        return cls(options, {m[1]: m[0] for m in map(_SETTING.match, lines) if m}, f"{MARKER}\n{rest}")


def locate(name: str = "train.sbatch") -> Path:
    """The file slurm/NAME: beside the package in a checkout, else where a wheel puts it.

    Raises:
        UserError: it is nowhere.
    """
    beside = Path(__file__).parents[2] / "slurm"
    shared = [Path(base) / "share/tlx/slurm" for base in (sysconfig.get_path("data"), site.getuserbase())]
    found = next((folder / name for folder in (beside, *shared) if (folder / name).is_file()), None)
    if found is None:
        looked = ", ".join(str(folder) for folder in (beside, *shared))
        raise UserError(
            f"there is no {name} in {looked}", todo="install tlx again, or with pip install -e from a checkout"
        )
    return found
