"""The command that started this training, as a person typed it: launcher, ranks and all."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tlx.data.location import command_line
from tlx.launcher import launched

_SCRIPTS = ("tlx", "torchrun", "accelerate")


def command(run: Path) -> str:
    """The command, quoted for a shell, without the secrets of addresses in it; where tlx was called from Python, in a
    notebook or a script, that call.

    Args:
        run: the run folder, whose config.yaml is what trained.
    """
    own = _own_words(sys.argv)
    if own is None:
        return f"tlx.training.train(tlx.config.load({str(run / 'config.yaml')!r}), fresh=False)"
    return command_line([*_srun(os.environ), *(_of_ancestor(own) or _rebuilt(own, os.environ))])


def _own_words(words: Sequence[str]) -> list[str] | None:
    """What follows ``tlx`` in a command; None in a process that is another program."""
    program = Path(words[0]) if words else Path()
    is_ours = program.name == "tlx" or (program.name == "__main__.py" and program.parent.name == "tlx")
    return list(words[1:]) if is_ours else None


def _of_ancestor(own: Sequence[str]) -> list[str] | None:
    """The uppermost process above that was given the same words: a launcher, or what a person runs commands with."""
    import psutil

    found = None
    try:
        for process in psutil.Process().parents():
            words = process.cmdline()
            if own and len(words) > len(own) and words[-len(own) :] == list(own):
                found = _typed(words)
    except (psutil.Error, OSError):  # it is gone, or another user's
        pass
    return found


def _typed(words: Sequence[str]) -> list[str]:
    """Without the interpreter's path, and that of a script which the shell has found."""
    program, *rest = words
    if Path(program).name.startswith("python"):
        if rest and Path(rest[0]).name in _SCRIPTS:
            return [Path(rest[0]).name, *rest[1:]]
        program = "python"
    return [program, *rest]


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
