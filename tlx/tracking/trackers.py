"""The trackers that come with tlx; each library is imported when its tracker is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tlx.base.invocation import command
from tlx.base.launcher import environment, export
from tlx.base.plug import needs
from tlx.base.terminal import say
from tlx.runs.metrics_file import read_rows
from tlx.runs.run_files import RunFiles
from tlx.tracking import mlflow_run, surroundings, wandb_run, wandb_service
from tlx.tracking.phase_end import phase_ends
from tlx.tracking.surroundings import Code
from tlx.tracking.tensorboard_run import TensorBoardRun
from tlx.tracking.tracker import RunInfo, Tracker, TrackingError, warn
from tlx.tracking.trained import Artifacts
from tlx.tracking.wandb_service import Mode
from tlx.tracking.wandb_target import Asked, Record, choose


@needs("wandb", install="pip install wandb")
def wandb(
    run: RunInfo,
    *,
    project: str | None = None,
    entity: str | None = None,
    group: str | None = None,
    job_type: str | None = None,
    run_name: str | None = None,
    notes: str | None = None,
    tags: Sequence[str] = (),
    mode: Mode | None = None,
    artifacts: Artifacts = "none",
    registry: str | None = None,
    code: Code = "commit",
    console: bool = False,
    alerts: bool = False,
) -> Tracker:
    """Weights & Biases: one run per training, however often it was resumed, and each step in it once. What is not said
    here, W&B's variables say (WANDB_PROJECT, WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_JOB_TYPE, WANDB_NAME, WANDB_NOTES,
    WANDB_TAGS, WANDB_MODE); what is said here wins.

    WANDB_RUN_ID and WANDB_DIR count, too. A note tells which of them won and which did not. Without any, the project is
    "tlx", and the run is online where credentials are configured, offline, with a warning, where not, where nothing
    answers at the server's address within two seconds, and where W&B has not begun within 30.
    ``tlx track sync RUN`` sends later what W&B lacks.

    Args:
        artifacts: weights that are uploaded at the end of a training: none, for they may be gigabytes and nobody has
            asked; the best; all: the best and the last. Versions of the artifact model-ID, with these aliases.
        registry: where they are linked, such as wandb-registry-model/flowers.
        code: the commit of the working folder, or also the difference from it, which may hold secrets.
        console: RUN/log.txt, in the run's Logs.
        alerts: at the end and on a fault, as W&B's settings of the user send them.

    Raises:
        TrackingError: W&B cannot begin.
    """
    rows = read_rows(run.folder / "metrics.jsonl")
    wandb_service.forget_empty_variables()
    surroundings.record(run.folder, code)
    asked = Asked(project, entity, tags, mode, group=group, job_type=job_type, name=run_name, notes=notes)
    record = Record.read(run.folder)
    choice = choose(asked, record, environment().variables, run_id=run.run_id, name=run.name, here=Path.cwd())
    if choice.note is not None:
        say(f"note: {choice.note}", error=True)
    extras = wandb_run.Extras(artifacts, registry, code, console, alerts)
    target = wandb_run.Target(run.folder, choice, run.config, command(run.folder), extras)
    if choice.mode is not None:
        return wandb_run.begin(target, choice.mode, rows)  # type: ignore[arg-type]
    why: str | None = "there is no key for Weights & Biases"
    if wandb_service.has_key() and (why := wandb_service.unreachable()) is None:
        try:
            return wandb_run.begin(target, "online", rows)
        except TrackingError as error:
            why = str(error)
    tracker = wandb_run.begin(target, "offline", rows)
    warn(f"{why}; this start is logged offline\n  -> {target.later}")
    return tracker


@needs("tensorboard", install="pip install 'tlx[tensorboard]'")
def tensorboard(run: RunInfo, *, folder: Path = Path("tensorboard")) -> Tracker:
    """TensorBoard event files in `folder` of the run folder; after a resume, later points are taken back. Scalars, the
    configuration and the plan as text, and of each phase tables, confusions and pictures with what was told of them;
    hyperparameters with the best and the test's values.

    Raises:
        TrackingError: TensorBoard cannot be imported.
    """
    rows = read_rows(run.folder / "metrics.jsonl") if run.resumed else []
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrackingError(f"TensorBoard cannot be imported: {error}") from error
    first = max((row["step"] for row in rows), default=-1) + 1
    writer = SummaryWriter(run.folder / folder, purge_step=first)  # type: ignore[no-untyped-call]
    made = TensorBoardRun(run, writer, RunFiles(run.folder).plan, {str(row.get("phase")) for row in rows})
    for end in phase_ends(run.folder) if rows else ():
        if end.step == first - 1:  # a start that was killed there has perhaps not come to tell it
            made.phase_ended(end)
    return made


@needs("mlflow", install="pip install 'tlx[mlflow]'")
def mlflow(
    run: RunInfo,
    *,
    uri: str | None = None,
    experiment: str | None = None,
    run_name: str | None = None,
    tags: dict[str, str] | None = None,
    artifacts: Artifacts = "none",
    code: Code = "commit",
) -> Tracker:
    """MLflow: one run per training, each step once; a later start goes on with the run that the tag tlx.run_id names.

    Args:
        uri: of the tracking store; else MLFLOW_TRACKING_URI, else MLflow's default, a database in the working folder.
        experiment: else MLFLOW_EXPERIMENT_NAME, else "tlx".
        run_name: else the run folder's name.
        artifacts: weights that are uploaded at the end of a training; see the tracker wandb.
        code: the commit of the working folder, as a tag, or also the difference from it, which may hold secrets.

    Raises:
        TrackingError: MLflow cannot be imported, or its store does not answer.
    """
    rows = read_rows(run.folder / "metrics.jsonl")
    surroundings.record(run.folder, code)
    env = environment()
    export("MLFLOW_DISABLE_TELEMETRY", "true", replace=False)  # a training tells nobody else of itself
    export("MLFLOW_LOGGING_LEVEL", "WARNING", replace=False)
    try:
        from mlflow.tracking import MlflowClient

        client = MlflowClient(uri or env.get("MLFLOW_TRACKING_URI") or None)
        named = {"mlflow.runName": run_name or run.name, **{str(k): str(v) for k, v in (tags or {}).items()}}
        place = experiment or env.get("MLFLOW_EXPERIMENT_NAME") or "tlx"
        return mlflow_run.begin(run, client, mlflow_run.Wanted(place, named, artifacts, code), rows)
    except Exception as error:  # of its store, and of what that is made of
        raise TrackingError(f"MLflow: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
