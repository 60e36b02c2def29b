"""What is asked of Slurm for one training."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tlx.base.errors import UserError
from tlx.submit import times
from tlx.submit.site import Launcher, Site, expanded, words
from tlx.submit.slurm import MARK
from tlx.submit.template import Template

WARN_S = 180
_OURS = {
    **dict.fromkeys(("nodes", "time", "partition", "account", "qos", "constraint"), "it is an option of tlx submit"),
    **dict.fromkeys(("gpus", "gpus-per-node", "gres"), "set --gpus or --gpus-per-node, and gpu_type in the site file"),
    **dict.fromkeys(("gpus-per-task", "ntasks", "ntasks-per-node", "ntasks-per-gpu"), "each node runs one launcher"),
    **dict.fromkeys(("gpu-bind", "gpus-per-socket"), "each launcher gets all GPUs of its node"),
    **dict.fromkeys(("cpus-per-task", "cpus-per-gpu"), "set --cpus-per-gpu of tlx submit"),
    **dict.fromkeys(
        ("signal", "requeue", "no-requeue", "open-mode"), "checkpoints and requeues rest on it; see --warn"
    ),
    **dict.fromkeys(("output", "error", "comment"), "tlx looks for the job by it"),
    **dict.fromkeys(("array", "wrap", "parsable", "test-only", "wait", "job-name"), "tlx submit sets it where it must"),
    "chdir": "start tlx submit in that folder",
    "clusters": "tlx looks for the job where it is submitted: start tlx submit on a login node of that cluster",
}
"""Options of sbatch that --option may not set to anything else than the job has, with the reason."""
_MEMORY = ("mem", "mem-per-cpu", "mem-per-gpu")


@dataclass(frozen=True)
class Wish:
    """What the command line says; None and empty where it says nothing. `gpus` is of the whole job."""

    nodes: int | None = None
    gpus: int | None = None
    gpus_per_node: int | None = None
    ranks_per_node: int | None = None
    cpus_per_gpu: int | None = None
    time: str | None = None
    launcher: Launcher | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    name: str | None = None
    stage: str | None = None
    warn: int = WARN_S
    options: tuple[str, ...] = ()


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
    launcher: Launcher
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


def make(wish: Wish, site: Site, template: Template, run: Path, *, node_cpus: int | None = None) -> Job:
    """The job that a wish becomes: the command line before the site file before slurm/train.sbatch.

    Args:
        run: the run's folder.
        node_cpus: of the largest node, which slurm/train.sbatch's CPUs are lowered to; None where nothing is known.

    Raises:
        UserError: GPUs that do not divide by the nodes, a limit that is none, names that no script can hold.
    """
    run = run.absolute()
    wish, further = _of_options(wish, site.options + wish.options)
    nodes, gpus = _shape(wish, site, template)
    ranks = _ranks(wish, gpus)
    each = wish.cpus_per_gpu or site.cpus_per_gpu
    cpus = (each or _cpus_per_gpu(template, ranks, node_cpus)) * ranks
    time = _time(wish.time or site.time or template.options["time"] or "")
    if not 1 <= wish.warn < time:
        raise UserError(
            f"a warning {wish.warn} s before a limit of {times.written(time)}", where="--warn", todo="a longer --time"
        )
    gpu_type = f"{site.gpu_type}:" if site.gpu_type else ""
    said: dict[str, str | None] = {
        **template.options,
        "job-name": wish.name or run.name,
        "nodes": str(nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": f"{gpu_type}{gpus}",
        "cpus-per-task": str(cpus),
        "mem": site.memory,
        "time": times.written(time),
        "partition": wish.partition or site.partition,
        "account": wish.account or site.account,
        "qos": wish.qos or site.qos,
        "constraint": wish.constraint or site.constraint,
        "signal": f"B:USR1@{wish.warn}",
        "output": f"{run}/slurm/%j.out",
        "comment": f"{MARK}{run}",
    }
    left = {key for key in ("mem", "partition", "account", "qos", "constraint") if said[key] is None}
    left |= {"gpus-per-node"} if not gpus else set()
    options = _with({key: value for key, value in said.items() if key not in left}, further, gpus)
    launcher = wish.launcher or site.launcher or "torchrun"
    stage = _stage(wish.stage) or site.stage
    python = site.python or (("python3",) if site.container else _own_python())
    settings = {
        "LAUNCHER": launcher,
        "PYTHON": " ".join([*site.container, *python]),
        "TLX_RUN": str(run),
        "RANKS_PER_NODE": str(ranks),
        "STAGE": stage or "",
        "SRUN_OPTIONS": " ".join(site.srun),
        "CHAIN": "yes",  # the script holds all that sbatch is told
    }
    _check_texts(run, options, settings)
    return Job(run, nodes, gpus, ranks, cpus, time, launcher, options, settings, site.modules, site.setup)


def _own_python() -> tuple[str, ...]:
    try:
        return tuple(words([sys.executable]))
    except ValueError as error:
        raise UserError(str(error), where="python", todo="name one in the site file") from error


def _stage(folder: str | None) -> str | None:
    try:
        return folder if folder is None else expanded(folder)
    except ValueError as error:
        raise UserError(str(error), where="--stage") from error


def _shape(wish: Wish, site: Site, template: Template) -> tuple[int, int]:
    """Nodes, and GPUs of each."""
    usual, total, each = site.gpus_per_node, wish.gpus, wish.gpus_per_node
    nodes = wish.nodes
    if total is None:
        if each is None:
            each = usual or int(template.options["gpus-per-node"] or 1)
        nodes = nodes or 1
    else:
        if nodes is None and each:
            nodes = -(-total // each)
        elif nodes is None:
            nodes = -(-total // usual) if usual and total else 1
        if total % nodes:
            raise UserError(
                f"{total} GPUs do not divide by {nodes} nodes",
                where="--gpus",
                todo=f"it is the number of the whole job: --gpus {-(-total // nodes) * nodes}, or --gpus-per-node",
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


def _ranks(wish: Wish, gpus: int) -> int:
    """Of each node."""
    if gpus and wish.ranks_per_node not in (None, gpus):
        raise UserError(
            f"each of the {gpus} GPUs of a node has one rank, so there are not {wish.ranks_per_node}",
            where="--ranks-per-node",
            todo="leave it out; it is for --gpus 0, nodes without GPUs",
        )
    return gpus or wish.ranks_per_node or 1


def _cpus_per_gpu(template: Template, ranks: int, node_cpus: int | None) -> int:
    cpus, gpus = (int(template.options.get(key) or 1) for key in ("cpus-per-task", "gpus-per-node"))
    return max(min(cpus // gpus, (node_cpus or cpus * ranks) // ranks), 1)


def _time(text: str) -> int:
    try:
        return times.read(text)
    except ValueError as error:
        raise UserError(str(error), where="--time") from error


def _of_options(wish: Wish, given: Sequence[str]) -> tuple[Wish, dict[str, str | None]]:
    """Options of sbatch, by name, the last of each; what tlx submit has a word for becomes that word.

    Raises:
        UserError: --cpus-per-gpu is said twice, otherwise.
    """
    found: dict[str, str | None] = {}
    for option in given:
        name, equals, value = option.removeprefix("--").partition("=")
        found[name] = value if equals else None
    said = found.pop("cpus-per-gpu", None) or ""
    if said.isdecimal() and int(said) and wish.cpus_per_gpu in (None, int(said)):
        wish = replace(wish, cpus_per_gpu=int(said))
    elif said:
        other = f", and of tlx submit {wish.cpus_per_gpu}" if wish.cpus_per_gpu else ""
        raise UserError(f"{said[:100]!a}{other}: one number", where="--option --cpus-per-gpu")
    return wish, found


def _with(options: Mapping[str, str | None], further: Mapping[str, str | None], gpus: int) -> dict[str, str | None]:
    """The job's options with further ones. They are judged by what they ask for: the same as the job has, or nothing
    that its script rests on, is taken.

    Raises:
        UserError: one asks for something else.
    """
    made, memory = dict(options), [key for key in further if key in _MEMORY]
    for name, value in further.items():
        if name == "gres" and not _gpus_of(value or ""):
            made[name] = value
        elif name == "gres" and _gpus_of(value or "") == gpus:  # as some clusters want it written
            made.pop("gpus-per-node", None)
            made[name] = value
        elif name == "signal" and re.fullmatch(r"B:USR1@[1-9]\d*", value or "", flags=re.ASCII):
            made[name] = value
        elif name not in options or options[name] != value:
            ours = name if name in _OURS else next((key for key in _OURS if key.startswith(name)), None)
            if ours is not None:  # sbatch takes abbreviations
                asked = f"--{name}" + ("" if value is None else f"={value}")
                raise UserError(f"--{ours} is not for --option ({_OURS[ours]})", where=f"--option {asked[:100]!r}")
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
