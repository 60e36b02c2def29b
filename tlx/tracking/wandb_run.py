"""One W&B run per training, however often it was started, each step in it once.

The W&B step of a row is its training step, and rows of one step go as one. On resuming, W&B goes on after the last step
that the server has; what the server lacks, because the training or the network died before it was sent, comes from
``metrics.jsonl``, and what the training does again after it went back to a checkpoint is not sent again.
"""

from __future__ import annotations

import contextlib
import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tlx.base.launcher import environment
from tlx.base.metrics import Metric
from tlx.runs.run_files import RunFiles, within
from tlx.runs.stop import prune
from tlx.tracking import surroundings
from tlx.tracking.phase_end import PhaseEnd, phase_ends
from tlx.tracking.tracker import TrackingError, of_test, warn
from tlx.tracking.trained import Artifacts, TrainedModel, trained_models
from tlx.tracking.wandb_service import Heard, Mode, let_go, listen, reason, stage_in
from tlx.tracking.wandb_target import Choice, Record, keep, note

End = Literal["finished", "stopped", "failed"]
"""How a run ended; one that was stopped goes on later, and W&B calls it preempted."""

INIT_S = 30.0
"""How long W&B may take to begin."""

SEND_S = 30.0
"""How long it may take at the end to send what waits. Below the guard's own bound, so that it is W&B that gives up."""

CONSOLE = "log.txt"
"""What the training said on its console."""

UPLOAD_S = 900.0
"""The same where weights are uploaded."""


@dataclass(frozen=True)
class Extras:
    """What goes to W&B beside numbers, tables and pictures; see :func:`tlx.tracking.trackers.wandb`."""

    artifacts: Artifacts = "none"
    registry: str | None = None
    code: surroundings.Code = "commit"
    console: bool = False
    alerts: bool = False


@dataclass(frozen=True)
class Target:
    """Which run it is to be, of a run folder. `command`: what started it, without credentials."""

    folder: Path
    choice: Choice
    config: Mapping[str, Any]
    command: str | None = None
    extras: Extras = Extras()

    @property
    def whole_config(self) -> dict[str, Any]:
        """With what the run folder tells of the plan and of what the training ran in."""
        files = RunFiles(self.folder)
        ran_in = surroundings.read(self.folder)
        code = {name: ran_in.pop(name) for name in ("commit", "modified") if name in ran_in}
        plan = {"steps": files.plan.get("steps"), "steps_per_epoch": files.plan.get("steps_per_epoch")}
        phases = {str(p.get("name")): {of: p.get(of) for of in ("start", "stop")} for p in within(files.plan, "phases")}
        own = {"environment": ran_in, "code": code if self.extras.code != "none" else {}}
        own["plan"] = {**plan, "phases": phases} if phases else {}
        return {**dict(self.config), **{name: of for name, of in own.items() if of}}

    @property
    def later(self) -> str:
        return f"what W&B lacks is sent by: tlx track sync {shlex.quote(str(self.folder))}"


def begin(target: Target, mode: Mode, rows: Iterable[Mapping[str, Any]], *, send_s: float | None = None) -> WandbRun:
    """Starts or resumes the run, and sends what the server lacks of `rows`, those before this start.

    Raises:
        TrackingError: W&B does not answer, refuses, or cannot start its service.
    """
    import wandb as library

    heard, choice, root = listen(mode), target.choice, target.choice.folder or target.folder
    extras, config = target.extras, target.whole_config
    patience_s = send_s or (UPLOAD_S if extras.artifacts != "none" else SEND_S)
    # where the environment is an agent's, W&B would drop our id, project and entity for the environment's
    library.setup().settings.sweep_id = None
    settings: Any = library.Settings(
        console="off", silent=True, finish_timeout=patience_s, finish_timeout_raises=True, sweep_id=choice.sweep,
        init_timeout=float(environment().get("WANDB_INIT_TIMEOUT") or INIT_S),
        # W&B would take sys.argv, git's difference and the program as they are; addresses in them may hold passwords.
        x_disable_meta=True, disable_git=True, save_code=False, git_commit=config.get("code", {}).get("commit"),
        stop_fn=lambda: _prune(target.folder),  # its own would be a Ctrl-C
    )  # fmt: skip
    if mode != "disabled":
        keep(target.folder, {"id": choice.run_id, "project": choice.project, "entity": choice.entity}, choice)
    try:
        handle = library.init(
            mode=mode, project=choice.project, entity=choice.entity, tags=list(choice.tags), id=choice.run_id,
            name=choice.name, group=choice.group, job_type=choice.job_type, notes=choice.notes, config=config,
            dir=root, resume="allow", settings=settings,
        )  # fmt: skip
        stage_in(Path(handle.settings.root_dir) / "wandb" / "staging")
        handle.define_metric("step")
        handle.define_metric("*", step_metric="step")
        if target.command is not None:
            handle.summary["command"] = target.command
        run = WandbRun(target, handle, heard)
        run.upload_code()
        for end in phase_ends(target.folder):
            run.phase_ended(end)
        for row in rows:
            run.log(row)
    except Exception as error:
        let_go()  # the service would hold the run's id
        raise TrackingError(reason(error), todo=target.later) from error
    if mode != "disabled":
        page = handle.url if mode == "online" else None  # offline, W&B warns of the question
        came = {"id": handle.id, "project": handle.project, "entity": handle.entity, "url": page}
        keep(target.folder, came, choice)
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


class WandbRun:
    """A run that W&B has begun.

    Attributes:
        first: the first step that the server lacks.
        sent: steps that were handed to W&B. without: what the run folder does not have of them, in words.
    """

    def __init__(self, target: Target, handle: Any, heard: Heard) -> None:
        self.target, self.handle, self._heard = target, handle, heard
        self.todo = target.later
        self.first = int(handle.starting_step or 0)
        self.sent: list[int] = []
        self._held: dict[str, Any] = {}
        self._ends: dict[int, PhaseEnd] = {}
        self._defined: set[str] = set()
        self._best: dict[str, float] = {}
        self._told: set[str] = set()  # in rows, where it is the better of raw and averaged weights
        self._warned = False
        self._uploaded: list[str] = []
        self.without: list[str] = []
        # an offline folder holds all of it; what is on the server stands in wandb.json
        self._online = not handle.settings._offline
        has = Record.read(target.folder) if self._online else Record()
        self._logged = int(has.console or 0)  # bytes of log.txt
        self._has = set((has.models or "").split(","))

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

    def phase_ended(self, end: PhaseEnd) -> None:
        """Its tables and pictures go with the row of its last step."""
        self._ends[end.step] = end

    @property
    def finish_s(self) -> float:
        """How long the end of a training may wait."""
        return UPLOAD_S + INIT_S if self.target.extras.artifacts != "none" else 0.0

    def model_trained(self, model: TrainedModel) -> None:
        """Uploads weights, where that was asked for."""
        self.flush()  # an upload may take long
        wanted = self.target.extras.artifacts
        if wanted == "all" or (wanted == "best" and "best" in model.aliases):
            self.upload(model)

    def upload(self, model: TrainedModel) -> None:
        """Uploads weights, and links them to the registry where one was named.

        Raises:
            TrackingError: they are gone, or W&B does not take them, or not there.
        """
        if not model.file.is_file():
            raise TrackingError(f"{model.file} is not there")
        registry = self.target.extras.registry
        if registry is not None and not self._online:
            self._log_model(model)
            raise TrackingError(f"offline, W&B cannot link it to {registry}", todo=self.todo)
        try:
            made = self._log_model(model)
            if registry is not None:
                made.wait(timeout=int(UPLOAD_S))
                self.handle.link_artifact(made, registry, aliases=list(model.aliases))
        except Exception as error:  # a registry that is not there, or not theirs who train
            raise TrackingError(reason(error), todo=self.todo) from error
        self._uploaded.append(model.key)

    def _log_model(self, model: TrainedModel) -> Any:
        from tlx.tracking.wandb_content import of_model

        made = of_model(model, self.target.choice.run_id)
        return self.handle.log_artifact(made, aliases=list(model.aliases))

    def upload_code(self) -> None:
        """Uploads how files differ from the commit, where that was asked for and kept, and W&B lacks it."""
        from tlx.tracking.wandb_content import of_code

        found = of_code(self.target.folder, self.target.choice.run_id) if self.target.extras.code == "diff" else None
        if found is None or (key := f"code.{found.digest}") in self._has:
            return
        try:
            self.handle.log_artifact(found)
            self._uploaded.append(key)
        except Exception as error:  # numbers go without
            self._say_without("the difference of the code", error)

    def missing(self) -> list[TrainedModel]:
        """Weights of a training that is done that W&B lacks; what it has is in wandb.json."""
        return [m for m in trained_models(self.target.folder, self.target.extras.artifacts) if m.key not in self._has]

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
        self._alert(result)
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

    def _alert(self, result: Mapping[str, Any]) -> None:
        """Of a fault, and of the end; a training that was asked to stop knows who asked."""
        if not self.target.extras.alerts:
            return
        name, best = self.target.folder.name, result.get("best") or {}
        if result.get("finished", True):
            value = f": best {best['metric']} {best['value']:.4f} at step {best['step']}" if "metric" in best else ""
            self.handle.alert(f"{name[:40]} is done", f"{name}: {result.get('step')} steps{value}", level="INFO")
        elif fault := result.get("fault"):
            text = f"{name}: {fault} after step {result.get('step')}. status.json and log.txt of the run say more."
            self.handle.alert(f"{name[:40]} has failed", text, level="ERROR")

    def flush(self) -> None:
        """Sends the last step: it is whole."""
        if self._held:
            self._send()

    def summarise(self, result: Mapping[str, Any]) -> None:
        """Shows on the run's page what result.json holds."""
        from tlx.runs.history import ACCURACY, accuracies, phases_of, shown_metric  # read what this package writes

        left = ("classes", "lists", "versions", "step", "fault", "test")
        said = {k: v for k, v in result.items() if k not in left}
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
        own = {name: value for name, value in found.items() if name not in self._told}
        self.handle.summary.update({**self._best, **own})
        self._send_console()
        try:
            if end == "stopped":
                self.handle.mark_preempting()  # with an exit code other than 0, W&B has it wait for its next start
            self.handle.finish(exit_code=int(end != "finished"))
        except TimeoutError as error:
            let_go()
            raise TrackingError("the network or the server is too slow: not all was sent", todo=self.todo) from error
        if self._heard.warnings and not self._warned:
            raise TrackingError(f"W&B: {self._heard.warnings[0]}", todo=self.todo)
        if self._online and self._uploaded:
            note(self.target.folder, models=",".join(sorted(filter(None, {*self._has, *self._uploaded}))))

    def has_summary(self, result: Mapping[str, Any]) -> bool:
        """Whether the server has the summary of a finished run, and not that of before the run was extended."""
        known = self.handle.summary
        return known.get("finished") is True and known.get("samples_seen") == result.get("samples_seen")

    def abandon(self) -> None:
        let_go()

    def _send(self) -> None:
        row, self._held = self._held, {}
        self._told |= {name for name in row if name.startswith("best/")}
        leads = {name: row[name] for name in row if self._leads(name, row[name])}
        self._best |= leads
        if row["step"] < self.first:
            return
        self._define(row)
        self._log(row, self._of_phase(row["step"]))
        if leads:  # the runs table shows it, and W&B does not write the latest over it
            self.handle.summary.update(leads)
        self.sent.append(row["step"])
        self._send_console()

    def _log(self, row: Mapping[str, Any], beside: Mapping[str, Any]) -> None:
        """A row with what belongs to it. Tables are artifacts of their own, which the server may refuse: then the
        numbers go without."""
        try:
            self.handle.log({**row, **beside}, step=row["step"], commit=True)
        except Exception as error:
            if not beside:
                raise
            self._say_without(f"tables of phase {self._ends[row['step']].name}", error)
            self.handle.log(row, step=row["step"], commit=True)

    def _say_without(self, what: str, error: Exception) -> None:
        self.without.append(f"{what} ({reason(error)})")
        warn(f"W&B does not get {self.without[-1]}")

    def _define(self, row: Mapping[str, Any]) -> None:
        """Of metrics of evaluations the summary is ours to write: the best, by the metric's own direction, over all
        starts of the run. W&B's own ``summary="max"`` begins anew with each of them, and one NaN ends it."""
        for name in row.keys() - self._defined:
            if Metric.of(name).judges:
                self.handle.define_metric(name, step_metric="step", summary="none")
        self._defined |= row.keys()

    def _of_phase(self, step: int) -> dict[str, Any]:
        """Tables and pictures of the phase that ends with a step; what fails there costs no numbers."""
        from tlx.tracking.wandb_content import of_phase, of_phases

        end = self._ends.get(step)
        if end is None:
            return {}
        if end.last and end.predictions is None:
            self.without.append(f"tables of phase {end.name} (the run folder has no predictions of its end)")
        try:
            return {**of_phase(end), "phases": of_phases(e for e in self._ends.values() if e.step <= step)}
        except Exception as error:
            self._say_without(f"tables of phase {end.name}", error)
            return {}

    def _send_console(self) -> None:
        """What log.txt has that W&B has not, where that was asked for."""
        if not self.target.extras.console:
            return
        with contextlib.suppress(OSError), (self.target.folder / CONSOLE).open("rb") as file:
            file.seek(self._logged)
            text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            if whole:
                self.handle.write_logs(whole.decode("utf-8", "replace"))
                self._logged += len(whole)
                if self._online:
                    note(self.target.folder, console=str(self._logged))

    def _leads(self, name: str, value: Any) -> bool:
        metric = Metric.of(name)
        number = isinstance(value, (int, float))
        return number and metric.judges and metric.improves(value, self._best.get(name, math.nan))
