"""What is asked of Slurm for one training."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from tlx.base.errors import UserError, did_you_mean
from tlx.submit import times
from tlx.submit.site import Launcher, Site, expanded, words
from tlx.submit.slurm import MARK
from tlx.submit.template import Template

_REFUSED = {
    **dict.fromkeys(("nodes", "time"), "it is an option of tlx submit"),
    **dict.fromkeys(
        ("dry-run", "fresh", "extend", "rest", "site", "stage", "launcher", "ranks-per-node"),
        "it is an option of tlx submit: it stands before the --",
    ),
    **dict.fromkeys(("gpus", "gres"), "set --gpus, and gpu_type in the site file"),
    **dict.fromkeys(("gpus-per-node", "cpus-per-gpu"), "write its name in full, and one number"),
    **dict.fromkeys(("gpus-per-task", "ntasks", "ntasks-per-node", "ntasks-per-gpu"), "each node runs one launcher"),
    **dict.fromkeys(("gpu-bind", "gpus-per-socket"), "each launcher gets all GPUs of its node"),
    "cpus-per-task": "set --cpus-per-gpu",
    "signal": "checkpoints before the time limit depend on it; --signal=B:USR1@600 asks for them 600 s before",
    **dict.fromkeys(("requeue", "no-requeue", "open-mode"), "requeueing depends on it"),
    **dict.fromkeys(("output", "error", "comment"), "tlx looks for the job by it"),
    **dict.fromkeys(("array", "wrap", "parsable", "test-only", "wait"), "tlx submit sets it where it must"),
    "chdir": "start tlx submit in that folder",
    "clusters": "tlx looks for the job where it is submitted: start tlx submit on a login node of that cluster",
}
"""Options of sbatch that nobody may set to anything else than the job has, with the reason."""
_READ = ("partition", "account", "qos", "constraint")
"""Options that the site file may have too."""
NodeCpus = Callable[[str | None], int | None]
_SIGNAL = re.compile(r"B:USR1@([1-9]\d*)", flags=re.ASCII)
_MEMORY = ("mem", "mem-per-cpu", "mem-per-gpu")


@dataclass(frozen=True)
class SubmitOptions:
    """What the command line says; None and empty where it says nothing.

    Attributes:
        gpus: of the whole job.
        sbatch: further options of sbatch, ``--name`` or ``--name=value``.
    """

    nodes: int | None = None
    gpus: int | None = None
    ranks_per_node: int | None = None
    time: str | None = None
    launcher: str | None = None
    stage: str | None = None
    sbatch: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """
    Attributes:
        run: the run's folder, absolute.
        gpus, ranks, cpus: of each node.
        time: seconds.
        options: of sbatch, all of them, without their dashes; None where one has no value.
        settings: variables of slurm/train.sbatch.
        setup: lines of the site's own, which come before the settings.
    """

    run: Path
    nodes: int
    gpus: int
    ranks: int
    cpus: int
    time: int
    launcher: str
    options: Mapping[str, str | None]
    settings: Mapping[str, str]
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()

    @property
    def world(self) -> int:
        return self.nodes * self.ranks

    def __str__(self) -> str:
        of_cpus = f"{self.ranks} rank{'s' * (self.ranks != 1)} on CPUs"
        each = f"{self.gpus} GPU{'s' * (self.gpus != 1)}" if self.gpus else of_cpus
        total = f"{self.world} rank{'s' * (self.world != 1)}"
        return (
            f"{self.nodes} node{'s' * (self.nodes != 1)} x {each} = {total} by {self.launcher}, "
            f"{self.cpus // self.ranks} CPUs to each, {times.written(self.time)} at a time"
        )


def make(
    asked: SubmitOptions, site: Site, template: Template, run: Path, *, node_cpus: NodeCpus = lambda _: None
) -> Job:
    """The job that is asked for: the command line before the site file before slurm/train.sbatch.

    Args:
        run: the run's folder.
        node_cpus: of the largest node of a partition, which slurm/train.sbatch's CPUs are lowered to; None where that
            is not known.

    Raises:
        UserError: GPUs that do not divide by the nodes, a limit that is none, names that no script can hold.
    """
    run = run.absolute()
    further = _by_name(site.options + asked.sbatch)
    nodes, gpus = _shape(asked, _number(further, "gpus-per-node"), site, template)
    ranks = _ranks(asked, gpus)
    each = _number(further, "cpus-per-gpu") or site.cpus_per_gpu
    if each is None:
        each = _cpus_per_rank(template, ranks, node_cpus(further.get("partition") or site.partition))
    time: int = _checked(times.read, asked.time or site.time or template.options["time"], "--time")
    gpu_type = f"{site.gpu_type}:" if site.gpu_type else ""
    said: dict[str, str | None] = {
        **template.options,
        "job-name": run.name,
        "nodes": str(nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": f"{gpu_type}{gpus}" if gpus else None,
        "cpus-per-task": str(each * ranks),
        "mem": site.memory,
        "time": times.written(time),
        **{name: getattr(site, name) for name in _READ},
        "output": f"{run}/slurm/%j.out",
        "comment": f"{MARK}{run}",
    }
    flags = [name for name, value in template.options.items() if value is None]
    options = {name: value for name, value in said.items() if value is not None or name in flags}
    options = _merged(options, {k: v for k, v in further.items() if k != "cpus-per-gpu"}, gpus)
    warned = _SIGNAL.fullmatch(options.get("signal") or "")
    if warned is None:  # of a copy of the script whose header was changed
        raise UserError(
            f"a signal such as B:USR1@180 is needed, not {(options.get('signal') or 'none')[:100]!a}",
            where="--signal",
            todo="#SBATCH --signal=B:USR1@180 in the script's header: checkpoints before the time limit depend on it",
        )
    warn = int(warned[1])
    if warn >= time:
        what = f"a warning {warn} s before a limit of {times.written(time)}"
        raise UserError(what, where="--signal", todo="a longer --time")
    launcher = asked.launcher or site.launcher or "torchrun"
    if launcher not in get_args(Launcher):
        near = did_you_mean(launcher, get_args(Launcher))
        raise UserError(f'there is no launcher "{launcher}"{near}', where="--launcher")
    python = site.python or (["python3"] if site.container else None)
    if python is None:
        python = _checked(words, [sys.executable], "python", "name one in the site file")
    settings = {
        "LAUNCHER": launcher,
        "PYTHON": " ".join([*site.container, *python]),
        "TLX_RUN": str(run),
        "RANKS_PER_NODE": str(ranks),
        "STAGE": _checked(expanded, asked.stage, "--stage") if asked.stage else site.stage or "",
        "SRUN_OPTIONS": " ".join(site.srun),
        "CHAIN": "yes",  # the script holds all that sbatch is told
    }
    _check_texts(run, options, settings)
    return Job(run, nodes, gpus, ranks, each * ranks, time, launcher, options, settings, site.modules, site.setup)


def _checked(act: Callable[[Any], Any], value: Any, where: str, todo: str | None = None) -> Any:
    try:
        return act(value)
    except ValueError as error:
        raise UserError(str(error), where=where, todo=todo) from error


def _shape(asked: SubmitOptions, each: int | None, site: Site, template: Template) -> tuple[int, int]:
    """Nodes, and GPUs of each.

    Args:
        each: GPUs of a node, where sbatch is told.
    """
    usual, total, nodes = site.gpus_per_node, asked.gpus, asked.nodes
    if total is None:
        each = each or usual or int(template.options["gpus-per-node"] or 1)
        nodes = nodes or 1
    else:
        per_node = each or usual
        nodes = nodes or (-(-total // per_node) if per_node and total else 1)
        if total % nodes:
            raise UserError(
                f"{total} GPUs do not divide by {nodes} nodes",
                where="--gpus",
                todo=f"it is the number of the whole job: --gpus {-(-total // nodes) * nodes}",
            )
        if each is not None and each * nodes != total:
            raise UserError(
                f"{nodes} nodes with {each} GPUs each are {nodes * each}, not {total}",
                where="--gpus",
                todo="it is the number of the whole job; leave it or --gpus-per-node out",
            )
        each = total // nodes
    if usual is not None and each > usual:
        fits = f"--nodes {-(-each * nodes // usual)}"
        raise UserError(f"a node has {usual} GPUs here (site file), not {each}", where="--gpus", todo=fits)
    return nodes, each


def _ranks(asked: SubmitOptions, gpus: int) -> int:
    """Of each node."""
    if gpus and asked.ranks_per_node not in (None, gpus):
        raise UserError(
            f"each of the {gpus} GPUs of a node has one rank, so there are not {asked.ranks_per_node}",
            where="--ranks-per-node",
            todo="leave it out; it is for --gpus 0, nodes without GPUs",
        )
    return gpus or asked.ranks_per_node or 1


def _cpus_per_rank(template: Template, ranks: int, node_cpus: int | None) -> int:
    cpus, gpus = (int(template.options.get(key) or 1) for key in ("cpus-per-task", "gpus-per-node"))
    return max(min(cpus // gpus, (node_cpus or cpus * ranks) // ranks), 1)


def _by_name(given: Sequence[str]) -> dict[str, str | None]:
    """Options of sbatch, the last of each name."""
    words = [option.removeprefix("--").partition("=") for option in given]
    return {name: value if equals else None for name, equals, value in words}


def _number(options: Mapping[str, str | None], name: str) -> int | None:
    """Of an option such as ``--cpus-per-gpu=4`` or ``--gpus-per-node=a100:4``; None where it is not said."""
    if name not in options:
        return None
    said = (options[name] or "").rpartition(":")[2]
    if not said.isdecimal() or not int(said):
        raise UserError(f"{(options[name] or '')[:100]!a}: one number", where=f"--{name}")
    return int(said)


def _merged(options: Mapping[str, str | None], further: Mapping[str, str | None], gpus: int) -> dict[str, str | None]:
    """The job's options with further ones. They are judged by what they ask for: the same as the job has, or nothing
    that its script rests on, is taken.

    Raises:
        UserError: one asks for something else.
    """
    made, memory = dict(options), [key for key in further if key in _MEMORY]
    for name, value in further.items():
        if name == "gres" and _gpus_of(value or "") == gpus:  # as some clusters want it written
            made.pop("gpus-per-node", None)
        elif name == "gpus-per-node" and ":" not in (value or ""):  # without a type: of the site's
            continue
        elif not (
            (name == "gres" and not _gpus_of(value or ""))
            or (name == "signal" and _SIGNAL.fullmatch(value or ""))
            or name == "gpus-per-node"
            or (name in options and options[name] == value)
        ):
            # sbatch takes abbreviations
            refused = name if name in _REFUSED else next((key for key in _REFUSED if key.startswith(name)), None)
            whole = next((key for key in _READ if key.startswith(name) and key != name), None)
            if whole is not None and name not in options:
                raise UserError("its name in full is needed", where=f"--{name[:100]}", todo=f"--{whole}")
            if refused is not None:
                asked = f"--{name}" + ("" if value is None else f"={value}")
                what = f"--{refused} is not for tlx submit to hand on ({_REFUSED[refused]})"
                raise UserError(what, where=f"{asked[:100]!r}")
        made[name] = value
    for name in set(_MEMORY) - set(memory[-1:]) if memory else ():  # one excludes the others
        made.pop(name, None)
    return made


def _gpus_of(gres: str) -> int:
    """How many GPUs of a node ``gpu:a100:4,nvme:1`` asks for; 0 of other things."""
    parts = [part.split(":") for part in gres.split(",")]
    counts = [words[-1] for words in parts if words[0] == "gpu"]
    return sum(int(count) if count.isdecimal() else 1 for count in counts)


def _check_texts(run: Path, options: Mapping[str, str | None], settings: Mapping[str, str]) -> None:
    """Whether each is one line, and the folder's name one that Slurm reads as it is."""
    if not str(run).isprintable() or any(c in str(run) for c in "%\\"):
        raise UserError(
            f"Slurm cannot write logs into a folder of this name: {str(run)!a}",
            where="run",
            todo="a name without % and \\ and characters that cannot be printed",
        )
    for name, value in [*((f"--{key}", value) for key, value in options.items()), *settings.items()]:
        if value is not None and not value.isprintable():
            raise UserError(f"{value[:200]!a} cannot stand in one line of a script", where=name)
