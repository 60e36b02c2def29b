"""The text of a job's script."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from tlx.base.location import command_line
from tlx.base.terminal import escaped
from tlx.submit.job import Job
from tlx.submit.template import Template

_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\})", flags=re.ASCII)

EXPANDED = ("PYTHON", "STAGE", "SRUN_OPTIONS")
"""Settings in whose values ``$TMPDIR`` and the like are variables of the job."""


def script(job: Job, template: Template, command: Sequence[str]) -> str:
    """slurm/train.sbatch with another head.

    Args:
        command: what was typed, for the first comment.
    """
    said = [
        f"{name}={(_expanding if name in EXPANDED else shlex.quote)(value)}" for name, value in job.settings.items()
    ]
    kept = [line for name, line in template.settings.items() if name not in job.settings]
    lines = [
        "#!/bin/bash",
        f"# Written by: {escaped(command_line(command))}",
        f"# {job}",
        *(_directive(name, value) for name, value in job.options.items()),
        "",
        *([f"module load {shlex.join(job.modules)} || exit 1"] if job.modules else []),
        *job.setup,
        *said,
        *kept,
        "",
    ]
    return "\n".join(lines) + f"\n{template.body}"


def _directive(name: str, value: str | None) -> str:
    return f"#SBATCH --{name}" + ("" if value is None else f"={_quoted(value)}")


def _quoted(value: str) -> str:
    """As sbatch reads a line of a script: quotes hold it together, and a backslash in them takes a meaning away."""
    if re.fullmatch(r"[\w@%+=:,./~\[\]-]+", value, flags=re.ASCII):
        return value
    return '"' + re.sub(r"""(["'\\#])""", r"\\\1", value) + '"'


def _expanding(value: str) -> str:
    """As a word of the shell, in which nothing but variables (``$TMPDIR``, ``${TMPDIR}``) is expanded."""
    if not _VARIABLE.search(value):
        return shlex.quote(value)
    parts, at = [], 0
    for match in _VARIABLE.finditer(value):
        parts += [re.sub(r'([\\"$`])', r"\\\1", value[at : match.start()]), match[0]]
        at = match.end()
    return '"' + "".join(parts) + re.sub(r'([\\"$`])', r"\\\1", value[at:]) + '"'
