"""One W&B run per training, however often it was started, each step in it once.

The W&B step of a row is its training step, and rows of one step go as one. On resuming, W&B goes on after the last step
that the server has; what the server lacks, because the training or the network died before it was sent, comes from
``metrics.jsonl``, and what the training does again after it went back to a checkpoint is not sent again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import shlex
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tlx.base.files import write_whole
from tlx.base.launcher import environment, withdraw
from tlx.base.location import without_credentials
from tlx.base.metrics import Metric
from tlx.base.reachable import reachable
from tlx.runs.stop import prune
from tlx.tracking.tracker import TrackingError, of_test, warn
from tlx.tracking.wandb_target import RECORD, Choice, Record

Mode = Literal["online", "offline", "disabled"]

End = Literal["finished", "stopped", "failed"]
"""How a run ended; one that was stopped goes on later, and W&B calls it preempted."""

KNOCK_S = 2.0
"""How long its server may take to accept a connection, where nobody has said whether there is a network."""

INIT_S = 30.0
"""How long W&B may take to begin."""

SEND_S = 30.0
"""How long it may take at the end to send what waits. Below the guard's own bound, so that it is W&B that gives up."""

LEAVE_S = 20.0
"""How long a run that was abandoned in this process may take until it is gone."""


@dataclass(frozen=True)
class Target:
    """Which run it is to be, of a run folder. `command`: what started it, without credentials."""

    folder: Path
    choice: Choice
    config: Mapping[str, Any]
    command: str | None = None

    @property
    def later(self) -> str:
        return f"what W&B lacks is sent by: tlx track sync {shlex.quote(str(self.folder))}"


@dataclass
class Heard:
    """What W&B would have put on the terminal; it knows some failures by nothing else."""

    warnings: list[str] = field(default_factory=list)

    def info(self, text: str) -> None:
        pass

    def warning(self, text: str) -> None:
        plain = re.sub(r"\x1b\[[0-9;]*m|\b(wandb: |WARNING |ERROR )", "", text)
        self.warnings.append(plain.partition(". ")[0])  # the rest advises `wandb sync`, which would send steps twice

    error = warning


def forget_empty_variables() -> None:
    """A batch script's ``export WANDB_MODE=`` is an error to wandb, and means "not set" to its author."""
    for name, value in environment().variables.items():
        if name.startswith("WANDB_") and not value:
            withdraw(name)


def has_key() -> bool:
    """Whether there are credentials for the server; it is not asked."""
    import wandb as library

    end = time.monotonic() + LEAVE_S
    while library.run is not None and time.monotonic() < end:  # W&B answers "no" while a run is active here
        time.sleep(0.05)  # a run that was abandoned is still being torn down
    _listen("online")  # WANDB_MODE=offline would answer for the key
    return bool(library.login(prompt=False, verify=False))


def unreachable() -> str | None:
    """Why the server cannot be asked from here; None where something answers at its address.

    W&B itself would look up its name, or knock, for all of its 30 s, and a start of the training would wait for that.
    """
    import wandb as library

    settings: Any = library.setup().settings
    url = str(settings.base_url)
    proxy = settings.https_proxy if url.startswith("https") else settings.http_proxy
    if reachable(str(proxy or url), within_s=KNOCK_S):
        return None
    return f"W&B: {without_credentials(str(proxy or url))} does not answer"


def begin(target: Target, mode: Mode, rows: Iterable[Mapping[str, Any]], *, send_s: float | None = None) -> WandbRun:
    """Starts or resumes the run, and sends what the server lacks of `rows`, those before this start.

    Raises:
        TrackingError: W&B does not answer, refuses, or cannot start its service.
    """
    import wandb as library

    heard, choice, root = _listen(mode), target.choice, target.choice.folder or target.folder
    # where the environment is an agent's, W&B would drop our id, project and entity for the environment's
    library.setup().settings.sweep_id = None
    settings: Any = library.Settings(
        console="off", silent=True, finish_timeout=send_s or SEND_S, finish_timeout_raises=True, sweep_id=choice.sweep,
        init_timeout=float(environment().get("WANDB_INIT_TIMEOUT") or INIT_S),
        # W&B would take sys.argv, git's difference and the program as they are; addresses in them may hold passwords.
        x_disable_meta=True, disable_git=True, save_code=False,
        stop_fn=lambda: _prune(target.folder),  # its own would be a Ctrl-C
    )  # fmt: skip
    if mode != "disabled":
        _keep(target.folder, {"id": choice.run_id, "project": choice.project, "entity": choice.entity}, choice.sweep)
    try:
        handle = library.init(
            mode=mode, project=choice.project, entity=choice.entity, tags=list(choice.tags), id=choice.run_id,
            name=choice.name, config=dict(target.config), dir=root, resume="allow", settings=settings,
        )  # fmt: skip
        handle.define_metric("step")
        handle.define_metric("*", step_metric="step")
        if target.command is not None:
            handle.summary["command"] = target.command
        run = WandbRun(target, handle, heard)
        for row in rows:
            run.log(row)
    except Exception as error:
        let_go()  # the service would hold the run's id
        raise TrackingError(_said(error), todo=target.later) from error
    if mode != "disabled":
        page = handle.url if mode == "online" else None  # offline, W&B warns of the question
        came = {"id": handle.id, "project": handle.project, "entity": handle.entity, "url": page}
        _keep(target.folder, came, choice.sweep)
    elsewhere = Path(handle.settings.root_dir)
    if mode != "disabled" and elsewhere.resolve() != root.resolve():
        heard.warnings.clear()
        warn(
            f"{root} cannot be written by W&B, which keeps its files in {elsewhere}; training goes on, and "
            f"metrics.jsonl has everything\n  -> {target.later}"
        )
    return run


STOPPED = "stopped at W&B"
"""Why a training is pruned that its sweep's early_terminate, or somebody on its page, has stopped."""


_STOPPED = """
query RunStoppedStatus($entity: String, $project: String, $run: String!) {
    project(name: $project, entityName: $entity) { run(name: $run) { shouldStop stopped } }
}
"""


def _prune(folder: Path) -> None:
    with contextlib.suppress(OSError):
        prune(folder, STOPPED)


def _keep(folder: Path, came: Mapping[str, Any], sweep: str | None) -> None:
    """Writes wandb.json: before the start what was chosen, so that a start that comes to nothing is known, too; then
    what W&B has made of it. Offline it names no page, and perhaps no entity: those of an earlier start stay."""
    known = {key: value for key, value in dataclasses.asdict(Record.read(folder)).items() if value}
    if known.get("id") != came["id"] or known.get("project") != (came["project"] or known.get("project")):
        known = {}  # of another run
    record = {**known, **{key: str(value) for key, value in came.items() if value}, "sweep": sweep}
    with contextlib.suppress(OSError):
        write_whole(folder / RECORD, json.dumps(record) + "\n")


class WandbRun:
    """A run that W&B has begun.

    Attributes:
        first: the first step that the server lacks.
        sent: steps that were handed to W&B.
    """

    def __init__(self, target: Target, handle: Any, heard: Heard) -> None:
        self.target, self.handle, self._heard = target, handle, heard
        self.todo = target.later
        self.first = int(handle.starting_step or 0)
        self.sent: list[int] = []
        self._held: dict[str, Any] = {}
        self._best: dict[str, float] = {}
        self._told: set[str] = set()  # in rows, where it is the better of raw and averaged weights
        self._warned = False

    def log(self, row: Mapping[str, Any]) -> None:
        """Takes a row; it goes when the next step begins, with all that belongs to its own.

        A row of an earlier step is one that came from the file already.
        """
        if self._held and row["step"] < self._held["step"]:
            return
        if self._held and row["step"] != self._held["step"]:
            self._send()
        self._held |= row
        if self._heard.warnings and not self._warned:
            self._warned = True
            warn(f"W&B: {self._heard.warnings[0]}\n  -> {self.todo}")

    def finish(self, result: Mapping[str, Any]) -> None:
        """Ends the run, with the summary. The last step of a training that goes on later waits for that: it may yet get
        its evaluation.

        Raises:
            TrackingError: not all of it was sent.
        """
        finished = result.get("finished", True) or result.get("pruned") is not None
        if finished:
            self.flush()
        self.summarise(result)
        self.close("finished" if finished else "failed" if result.get("fault") else "stopped")

    def pruned(self) -> str | None:
        """Why the server wants no more of it: it has told the agent, whose signal comes before W&B's client hears of it
        with its next rows. There is no public way to ask."""
        import wandb as library

        if self.target.choice.sweep is None or self.handle.offline:
            return None
        variables = {"entity": self.handle.entity, "project": self.handle.project, "run": self.handle.id}
        said = library.Api()._service_api.execute_graphql(_STOPPED, variables=variables)
        found = ((said or {}).get("project") or {}).get("run") or {}
        return STOPPED if found.get("shouldStop") or found.get("stopped") else None

    def flush(self) -> None:
        """Sends the last step: it is whole."""
        if self._held:
            self._send()

    def summarise(self, result: Mapping[str, Any]) -> None:
        """Shows on the run's page what result.json holds."""
        from tlx.runs.history import ACCURACY, accuracies, phases_of, shown_metric  # read what this package writes

        said = {k: v for k, v in result.items() if k not in ("classes", "lists", "versions", "step", "fault", "test")}
        said |= of_test(result)
        phases = phases_of(result)
        metric = shown_metric(phases, str((result.get("best") or {}).get("metric", ACCURACY)))
        name = "accuracy" if metric == ACCURACY else metric.removeprefix("val/")
        for found in accuracies(phases, metric=metric):
            both = (("best", found.best), ("last", found.last))
            said |= {f"{name}/{found.phase}/{which}": value for which, value in both if value is not None}
        self.handle.summary.update(said)

    def close(self, end: End) -> None:
        """Sends what waits, and says how the run ended.

        Raises:
            TrackingError: not all of it was sent.
        """
        # counted here, from all rows: W&B's own minimum starts anew with each start of a run, and one NaN ends it
        found = {f"best/{name}": value for name, value in self._best.items()}
        self.handle.summary.update({name: value for name, value in found.items() if name not in self._told})
        try:
            if end == "stopped":
                self.handle.mark_preempting()  # with an exit code other than 0, W&B has it wait for its next start
            self.handle.finish(exit_code=int(end != "finished"))
        except TimeoutError as error:
            let_go()
            raise TrackingError("the network or the server is too slow: not all was sent", todo=self.todo) from error
        if self._heard.warnings and not self._warned:
            raise TrackingError(f"W&B: {self._heard.warnings[0]}", todo=self.todo)

    def has_summary(self, result: Mapping[str, Any]) -> bool:
        """Whether the server has the summary of a finished run, and not that of before the run was extended."""
        known = self.handle.summary
        return known.get("finished") is True and known.get("samples_seen") == result.get("samples_seen")

    def abandon(self) -> None:
        let_go()

    def _send(self) -> None:
        row, self._held = self._held, {}
        self._told |= {name for name in row if name.startswith("best/")}
        self._best |= {name: row[name] for name in row if self._leads(name, row[name])}
        if row["step"] >= self.first:
            self.handle.log(row, step=row["step"], commit=True)
            self.sent.append(row["step"])

    def _leads(self, name: str, value: Any) -> bool:
        metric = Metric.of(name)
        number = isinstance(value, (int, float))
        return number and metric.judges and metric.improves(value, self._best.get(name, math.nan))


def let_go() -> None:
    """Ends W&B's service in this process by force: one that hangs would hold up the interpreter's end."""
    import psutil
    import wandb as library

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name() == "wandb-core":
                child.kill()
    with contextlib.suppress(AttributeError, RuntimeError):  # a thread that would miss the service, with a traceback
        library.run._run_status_checker.stop()  # type: ignore[union-attr]
    with contextlib.suppress(Exception, SystemExit):  # it ends the process with the code of the service
        library.teardown()
    library.run = None  # what is left of the run would keep the next one in this process from its key


def _listen(mode: Mode) -> Heard:
    """Starts the service; W&B speaks to us from here on, not to the terminal."""
    import wandb as library

    heard = Heard()
    settings = library.Settings(mode=mode, silent=True, show_warnings=False, show_errors=False)
    library.setup(settings)
    library.termsetup(settings, heard)
    return heard


def _said(error: Exception) -> str:
    first = str(error).splitlines()[0][:200] if str(error) else ""
    return f"W&B: {first or type(error).__name__}"
