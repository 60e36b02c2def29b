"""The command that started this training, as a person typed it: launcher, ranks and all."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tlx.base.launcher import environment, launched
from tlx.base.location import command_line

_SCRIPTS = ("tlx", "torchrun", "accelerate")
_MODULES = (
    *("tlx", "torch.distributed.run", "torch.distributed.launch"),
    *("accelerate.commands.launch", "accelerate.commands.accelerate_cli"),
)
_OPTION = re.compile(r"--?[\w-]+=")
_ASSIGNED = re.compile(r"(--?[\w-]+=)?[A-Za-z_]\w*=")
_SECRET = re.compile("key|secret|token|password", re.IGNORECASE)


def command(run: Path) -> str:
    """The command, quoted for a shell, without the secrets of addresses in it; where tlx was called from Python, in a
    notebook or a script, that call.

    Args:
        run: the run folder, whose config.yaml is what trained.
    """
    own = _own_words(sys.argv)
    if own is None:
        return f"tlx.train.command.train(tlx.plan.config.load({str(run / 'config.yaml')!r}), fresh=False)"
    return command_line([*_launcher(own), *own])


def reproducing(run: Path, threads: int) -> str:
    """What trains an extended run again, from its first step, in a folder beside; the command that was typed would only
    extend it.

    Args:
        run: the run folder, whose config.yaml is that of the whole training.
        threads: that a rank computed with.
    """
    config, other = str(run / "config.yaml"), f"run={run}-again"
    own = _own_words(sys.argv)
    if own is None:
        return (
            f"tlx.train.command.train(tlx.plan.config.load({config!r}, [{other!r}]))  # with OMP_NUM_THREADS={threads}"
        )
    return f"OMP_NUM_THREADS={threads} {command_line([*_launcher(own), 'train', config, other])}"


def commit() -> str | None:
    """Of the working folder's repository, where it is one of git: that of the configuration and of own parts."""
    try:
        said = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip()


def _launcher(own: Sequence[str]) -> list[str]:
    """The words before tlx's own."""
    words = _of_ancestor(own) or _rebuilt(own, environment().variables)
    return [*_srun(environment().variables), *words[: len(words) - len(own)]]


def _own_words(words: Sequence[str]) -> list[str] | None:
    """What follows ``tlx`` in a command; None in a process that is another program."""
    program = Path(words[0]) if words else Path()
    is_ours = program.name == "tlx" or (program.name == "__main__.py" and program.parent.name == "tlx")
    return list(words[1:]) if is_ours else None


def _of_ancestor(own: Sequence[str]) -> list[str] | None:
    """The uppermost launcher above that was given the same words. What else may stand above (env, sudo, a container's
    program) is left out: the words of it are not known here, and environments with secrets are among them."""
    import psutil

    found = None
    try:
        for process in psutil.Process().parents():
            words = process.cmdline()
            if own and len(words) > len(own) and words[-len(own) :] == list(own):
                found = _typed(words[: -len(own)]) or found
    except (psutil.Error, OSError):  # it is gone, or another user's
        pass
    return [*_masked(found), *own] if found else None


def _typed(words: Sequence[str]) -> list[str] | None:
    """Of a launcher, or of tlx: without the interpreter's path, and that of a script which the shell has found. None of
    any other program."""
    program, *rest = words
    name = Path(program).name
    if name in _SCRIPTS:
        return [name, *rest]
    if not name.startswith("python"):
        return None
    if rest and Path(rest[0]).name in _SCRIPTS:
        return [Path(rest[0]).name, *rest[1:]]
    at = rest.index("-m") + 1 if "-m" in rest else len(rest)
    return ["python", *rest] if at < len(rest) and rest[at] in _MODULES else None


def _masked(words: Sequence[str]) -> list[str]:
    """Without the values of variables, and of options that are named after a secret."""
    made: list[str] = []
    for before, word in zip(("", *words), words, strict=False):
        if before.startswith("-") and "=" not in before and _SECRET.search(before) and not word.startswith("-"):
            made.append("...")
        elif assigned := _ASSIGNED.match(word) or (_SECRET.search(word) and _OPTION.match(word)):
            made.append(f"{assigned[0]}...")
        else:
            made.append(word)
    return made


def _rebuilt(own: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """From what a launcher says in the environment, where no process above tells."""
    ranks = environment.get("WORLD_SIZE", "1")
    if not launched() and (ranks == "1" or "SLURM_SRUN_COMM_HOST" in environment):
        return ["python", "-m", "tlx", *own] if Path(sys.argv[0]).name != "tlx" else ["tlx", *own]
    nodes = environment.get("GROUP_WORLD_SIZE", "1")
    several = [f"--nnodes={nodes}"] if nodes != "1" else []
    return ["torchrun", *several, f"--nproc-per-node={environment.get('LOCAL_WORLD_SIZE', ranks)}", "-m", "tlx", *own]


def _srun(environment: Mapping[str, str]) -> list[str]:
    """Slurm's part: srun is not above its tasks, but says what it was asked for."""
    if "SLURM_SRUN_COMM_HOST" not in environment:
        return []
    asked = (("--nodes", "SLURM_STEP_NUM_NODES"), ("--ntasks", "SLURM_STEP_NUM_TASKS"))
    return ["srun", *(f"{option}={environment[name]}" for option, name in asked if environment.get(name))]
