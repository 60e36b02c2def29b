"""``tlx track sync``: sends to W&B what it lacks of a run, from the run folder alone."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tlx.base import plug
from tlx.base.errors import UserError
from tlx.base.launcher import environment
from tlx.base.parsing import from_yaml_file
from tlx.plan.comparable import comparable
from tlx.plan.parts import Part
from tlx.runs.history import read_history
from tlx.runs.run_files import RunFiles
from tlx.runs.run_lock import holder
from tlx.tracking import wandb_run, wandb_service
from tlx.tracking.tracker import TrackingError
from tlx.tracking.wandb_run import Extras, Target, WandbRun
from tlx.tracking.wandb_target import PROJECT, Asked, Record, choose

SEND_S = 600.0
"""How long the server may take for all of it."""

PATIENCE = 10.0
"""Seconds. The workers of a training that was killed hold its lock until they notice."""


@dataclass(frozen=True)
class Synced:
    """What was sent, or written.

    Attributes:
        steps: those that were sent, one row each; before: the first that the server lacked.
        left_out: the last step of a training that was killed, which may yet get its evaluation when it goes on.
        to: the run's page, or the offline folder.
        models: weights that were sent. not_sent: what the run folder lacks, in words.
    """

    folder: Path
    steps: tuple[int, ...]
    before: int
    left_out: int | None
    to: str
    offline: bool
    models: tuple[str, ...] = ()
    not_sent: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        rows = f"{len(self.steps)} step{'s' * (len(self.steps) != 1)}"
        if self.offline:
            said = f"{rows} written to {self.to}\n  upload it once, where there is a network: wandb sync {self.to}"
        elif self.steps:
            said = f"{rows} sent, {self.steps[0]} to {self.steps[-1]}: {self.to}"
        else:
            known = f"all up to step {self.before - 1}" if self.before else "nothing, and there is nothing yet"
            said = f"W&B has {known}; nothing was sent: {self.to}"
        if self.left_out is not None:
            said += (
                f"\n  left out: step {self.left_out}, the last of a training that was broken off; its evaluation may "
            )
            said += "come when that goes on"
        said += f"\n  sent, too: {', '.join(self.models)}" if self.models else ""
        said += "".join(f"\n  not sent: {what}" for what in self.not_sent)
        return f"{self.folder}: {said}"


def sync(folder: Path, *, project: str | None = None, entity: str | None = None, offline: bool = False) -> Synced:
    """Sends what W&B lacks of one run.

    Args:
        project, entity: by default those that the run was logged to, or is configured with.
        offline: write a fresh offline folder with the whole run in place of sending.

    Raises:
        UserError: not a run folder, nothing in it yet, a training is in it, no project, no key, no network.
    """
    rows, target = _rows(folder), _target(folder, project, entity)
    end = time.monotonic() + PATIENCE
    while (who := holder(folder)) is not None:
        if time.monotonic() > end:
            raise UserError(
                f"a training runs in this folder: {who}",
                where=str(folder),
                todo="its tracker sends what it can; wait for its end, or stop it",
            )
        time.sleep(0.1)
    result = RunFiles(folder).result
    finished, status = result.get("finished") is True, RunFiles(folder).status.get("status")
    ended = finished or status == "pruned"
    whole = ended or status == "resumable"
    wandb_service.forget_empty_variables()
    if offline:
        _refuse_twice(folder, target)
    elif not wandb_service.has_key():
        raise UserError("there is no key for Weights & Biases", todo=f"wandb login, or set WANDB_API_KEY; {_elsewhere}")
    try:
        run = wandb_run.begin(target, "offline" if offline else "online", rows, send_s=SEND_S)
        if whole:
            run.flush()
        if finished and not run.has_summary(result):
            run.summarise(result)
        models, not_sent = _send_models(run) if finished else ([], [])
        place = Path(run.handle.dir).parent if offline else run.handle.url
        run.close("finished" if ended else "stopped" if whole else "failed")
    except Exception as error:  # the service may die here too
        wandb_service.let_go()
        said = str(error) or type(error).__name__
        raise UserError(said, where=str(folder), todo=f"the same command goes on; {_elsewhere}") from error
    last = rows[-1]["step"]
    return Synced(
        folder=folder,
        steps=tuple(run.sent),
        before=run.first,
        left_out=None if whole or last < run.first else last,
        to=str(place),
        offline=offline,
        models=tuple(models),
        not_sent=(*not_sent, *run.without),
    )


def _send_models(run: WandbRun) -> tuple[list[str], list[str]]:
    """Sends the weights that W&B lacks; which, and what could not be sent, in words."""
    sent, not_sent = [], []
    for model in run.missing():
        what = f"the {' and '.join(model.aliases)} weights"
        try:
            run.upload(model)
            sent.append(what)
        except TrackingError as error:
            not_sent.append(f"{what} ({error})")
    return sent, not_sent


_elsewhere = "or --offline writes a folder to upload elsewhere"


def _rows(folder: Path) -> list[dict[str, Any]]:
    read_history(folder)  # refuses what is not a run folder, and names those that are near
    found = RunFiles(folder).rows()
    if not found:
        raise UserError("there are no metrics yet", where=str(folder / "metrics.jsonl"), todo="train first")
    return found


def _target(folder: Path, project: str | None, entity: str | None) -> Target:
    run_id = RunFiles(folder).status.get("id")
    if not run_id:
        raise UserError("no status.json says the id of this run", where=str(folder), todo="is it complete?")
    config, record = _config(folder / "config.yaml"), Record.read(folder)
    said = _arguments(config)
    env = {name: environment().get(name) for name in ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_DIR")}
    if said is None and not (project or record.id or env["WANDB_PROJECT"]):
        raise UserError(
            "this run was never logged to W&B",
            where=str(folder),
            todo=f"tlx track sync {folder} --project NAME makes a W&B run of it",
        )
    said = said or {}
    named = {key: said.get(key) for key in ("project", "entity", "group", "job_type", "notes")}
    asked = Asked(**named, name=said.get("run_name"), tags=[str(tag) for tag in said.get("tags") or ()])
    choice = choose(asked, record, env, run_id=str(run_id), name=folder.resolve().name)
    wanted = {"project": project or choice.project or PROJECT, "entity": entity or choice.entity}
    extras = Extras(**{key: said[key] for key in ("artifacts", "registry", "code", "console") if said.get(key)})
    whole = dataclasses.replace(choice, **wanted)  # type: ignore[arg-type]
    return Target(folder, whole, comparable(config), extras=extras)


def _refuse_twice(folder: Path, target: Target) -> None:
    """``wandb sync`` sends a folder whole, also what the server has."""
    record = Record.read(folder)
    if record.url and (record.id, record.project) == (target.choice.run_id, target.choice.project):
        raise UserError(
            f"a part of this run is on the server already ({record.url}); an offline folder would repeat it",
            where=str(folder),
            todo="without --offline, where there is a network; a copy of the folder without checkpoints will do",
        )


def _arguments(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Of the W&B tracker in a configuration; None where it has none."""
    track = config.get("track")
    trackers = track.get("trackers") if isinstance(track, Mapping) else None
    for raw in trackers if isinstance(trackers, list) else ():
        with contextlib.suppress(ValidationError):
            part = Part.model_validate(raw)
            if part.name == "wandb":
                return plug.defaults(plug.find("tracker", "wandb")) | part.args
    return None


def _config(file: Path) -> dict[str, Any]:
    try:
        content = from_yaml_file(file)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot be read: {why}", where=str(file)) from error
    return content if isinstance(content, dict) else {}
