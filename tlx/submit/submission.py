"""From a request to a queued job."""

from __future__ import annotations

import functools
import itertools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tlx.base.errors import UserError
from tlx.base.files import write_whole
from tlx.base.location import without_credentials
from tlx.base.parsing import to_yaml
from tlx.plan import config as configs
from tlx.plan.config import Config
from tlx.runs.extend import Extend
from tlx.runs.run_folder import JOBS, RunFolder, Start
from tlx.submit import checks, slurm
from tlx.submit import job as jobs
from tlx.submit import site as sites
from tlx.submit.checks import Findings
from tlx.submit.job import Job, SubmitOptions
from tlx.submit.script import script
from tlx.submit.template import MARKER, Template, locate

if TYPE_CHECKING:
    from tlx.plan.plan import Plan


@dataclass(frozen=True)
class Submission:
    """A job that nothing speaks against, or what does.

    Attributes:
        text: of the script; empty where it cannot be made.
        arguments: of the script.
        config: the whole configuration as it is now, for the job to read whenever it starts; None where it cannot be
            written down, since its URLs hold credentials.
        done: the run has come to its end already; there is nothing to submit.
        about: lines for people.
    """

    job: Job | None
    text: str
    arguments: tuple[str, ...]
    findings: Findings
    config: str | None = None
    done: bool = False
    about: tuple[str, ...] = ()

    @property
    def head(self) -> str:
        """The script down to the line below which nothing is this job's own."""
        return self.text.partition(MARKER)[0]

    def words(self, file: Path) -> tuple[str, ...]:
        """The script's file and its arguments, as sbatch is given them; the whole configuration is beside it."""
        if self.config is None:
            return (str(file), *self.arguments)
        return (str(file), str(file.with_suffix(".yaml")), *(word for word in self.arguments if word.startswith("--")))


def prepare(
    file: Path,
    overrides: Sequence[str],
    asked: SubmitOptions,
    *,
    site: Path | None,
    command: Sequence[str],
    start: Start,
    dry: bool = False,
) -> Submission:
    """Checks everything that can be known on this machine. Nothing is left in the run's folder.

    Args:
        file, overrides: the configuration, as for `tlx train`.
        site: a site file; None to look for one.
        command: what was typed.
        start: how the job starts the training.
        dry: nothing is to be sent, so Slurm need not answer.
    """
    findings = Findings()
    arguments = (_not_an_option(file), *start.words, *overrides)
    config = findings.of(lambda: configs.load(file, overrides))
    found = findings.of(lambda: sites.find(site))
    template = Template.read(locate())
    job = None
    if found is not None:
        run = config.run if config is not None else Path("unknown")  # the job's own mistakes are wanted all the same
        job = findings.of(lambda: jobs.make(asked, found[0], template, run, node_cpus=slurm.node_cpus))
    if config is None or job is None or found is None:
        return Submission(None, "", arguments, findings)
    about = [f"site: {found[1]}"] if found[1] is not None else []
    ranks = job.world
    longer = findings.of(lambda: _extends(config, start, ranks)) if start.extends else False
    if RunFolder(config.run).done and not start.fresh and longer is False:
        ended = Findings()
        ended.of(lambda: RunFolder(config.run).refuse_changes(config))
        return Submission(job, script(job, template, command), arguments, ended, done=not ended.problems.errors)
    made = checks.check_training(config, job, findings)
    frozen = _written(config, file, overrides)
    findings.warnings += checks.check_words(overrides, frozen=frozen is not None)
    checks.check_folder(config, job, findings, changed=start.fresh or start.extends)
    text = script(job, template, command)
    about += _about(config, job, made)
    if slurm.there() and checks.check_queue(job, findings, dry=dry) and not findings.problems.errors:
        said = findings.of(lambda: slurm.tried(text, job.options))
        about += [f"sbatch --test-only: {said}"] if said else []
    return Submission(job, text, arguments, findings, config=frozen, about=tuple(about))


def _extends(config: Config, start: Start, ranks: int) -> bool:
    """Whether the job would extend the run; False where the configuration is the run's own.

    Raises:
        UserError: it would be refused.
    """
    from tlx.train.build import plans_of

    extend = Extend(functools.partial(plans_of, ranks=ranks), rest=start.rest)
    return RunFolder(config.run).extension(config, extend) is not None


def send(submission: Submission) -> tuple[str, Path]:
    """Keeps the script in the run's folder and submits it; the job's id and the script's file.

    Raises:
        UserError: problems were found; there is no Slurm here; sbatch refuses; the folder cannot be written.
    """
    if not slurm.there():
        submission.findings.problems.add(slurm.absent())
    submission.findings.refuse()
    assert submission.job is not None
    file = _kept(submission.job.run / JOBS, submission.text)
    config = file.with_suffix(".yaml")
    if submission.config is not None:  # who edits the original meanwhile means the next training
        write_whole(config, submission.config)
    try:
        return slurm.queued(submission.words(file), submission.job.options), file
    except slurm.Unsure:
        raise
    except UserError:
        for made in (file, config):
            made.unlink(missing_ok=True)
        raise


def follow(job: str, run: Path) -> str:
    """How to go on from here, one command a line."""
    said, log = shlex.quote(str(run)), shlex.quote(f"{run}/{JOBS}/{job}.out")
    lines = {
        f"squeue -j {job}": "where it stands in the queue",
        f"tail -F {log}": "what the script says; the nodes' output is beside it",
        f"tlx status {said}": "how far the training is",
        f"scancel {job}": "end it; a checkpoint is left, and the same command goes on",
        f"scancel --batch -s USR1 {job}": "a checkpoint, and back into the queue",
    }
    width = max(map(len, lines))
    return "\n".join(f"  {command:<{width}}  {what}" for command, what in lines.items())


def _written(config: Config, file: Path, overrides: Sequence[str]) -> str | None:
    """The configuration as the job will read it; None where it would hold credentials. The cache's folder stays as it
    was written, since a variable in it (`$TMPDIR`) is another folder on each node."""
    places = [place for place in (config.data.train, config.data.val, config.data.test) if place]
    if any(without_credentials(place) != place for place in places):
        return None
    content, raw = configs.plain(config), configs.read(file, overrides)
    cache = (raw.get("data") or {}).get("cache")
    if isinstance(cache, dict) and cache.get("folder") is not None:
        content["data"]["cache"]["folder"] = str(cache["folder"])
    return to_yaml(content)


def _kept(folder: Path, text: str) -> Path:
    """A new file ``submitted-N.sbatch``."""
    files = (folder / f"submitted-{number}.sbatch" for number in itertools.count(1))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = next(file for file in files if not file.exists())
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except OSError as error:
        what, todo = f"cannot be written: {error.strerror or error}", "set run to a writable folder"
        raise UserError(what, where=str(folder), todo=todo) from error
    return file


def _about(config: Config, job: Job, made: Plan | None) -> list[str]:
    if made is None:
        return [str(job)]
    phases = "; ".join(
        f"{p.name} {'<= ' * (p.plateau is not None)}{(p.stop - p.start) / made.steps_per_epoch:g} epochs "
        f"({p.stop - p.start:,} steps)"
        for p in made.phases
    )
    return [
        str(job),
        f"{made.samples:,} training samples, global batch {made.batch}, {-(-made.batch // job.world)} on a rank, "
        f"{made.steps_per_epoch:,} steps per epoch",
        phases,
    ]


def _not_an_option(file: Path) -> str:
    return f"./{file}" if str(file).startswith("-") else str(file)
