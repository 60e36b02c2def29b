"""The folder of a run: what is in it, and whether this command may go on in it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import yaml

from tlx.config import Config, dump, parse
from tlx.differences import differences, flat
from tlx.errors import ConfigError, UserError
from tlx.files import json_text, write_whole
from tlx.launcher import requeued_job
from tlx.parsing import from_json, from_yaml
from tlx.run_lock import RunLock, holder

Status = Literal["running", "done", "resumable", "user-error", "fault"]
MAY_CHANGE = (
    *("world", "track", "checkpoint", "run", "stop_after", "data.workers", "data.cache", "data.expected"),
    *("loop.micro_batch", "loop.fit_micro_batch", "loop.nonfinite"),
)
"""Keys that do not change what is trained, so that a run goes on when they do."""

BEFORE_THEY_CAME: Mapping[str, tuple[str, Any]] = {"loop.ema.ramp": ("loop.ema.decay", False)}
"""Keys whose default is not what tlx did before they came: a key of that time that they belong to, and what it did. A
configuration that tlx wrote says every key that there was."""

JOBS = "slurm"
"""The folder of scripts and logs of Slurm's jobs; it stays where it is when a run is moved aside."""

PROMISED = {"name", "step", "samples_seen", "phases", "best", "unreadable", "replaced", "wall_time_s", "world"}
"""Of result.json, what a person is shown."""


@dataclass
class RunFolder:
    """Holds everything needed to resume, to understand and to reproduce one training.

    Attributes:
        lock: while this process trains in it.
    """

    path: Path
    lock: RunLock | None = field(default=None, init=False)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def prepare(self, config: Config, *, fresh: bool) -> dict[str, Any] | None:
        """Makes the folder, or goes on in it, and holds it; the result, if the run is done.

        Raises:
            UserError: the configuration is not the one of this run, another training is in the folder, or it cannot be
                written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = RunLock.take(self.path)
            if fresh and not self._is_fresh():
                self._move_aside()
                self._note_fresh()
            self.refuse_changes(config)
            for left in self.path.glob(".*.tmp"):  # of a process that was killed
                left.unlink(missing_ok=True)
            result = self._read("result.json")
            finished = result is not None and result.get("finished") is True
            if finished and result is not None and not result.keys() >= PROMISED:
                raise UserError(
                    "is not what tlx wrote", where=str(self.path / "result.json"), todo="remove it, or --fresh"
                )
            if not finished:
                write_whole(self.path / "config.yaml", dump(config))
        except OSError as error:
            raise UserError(
                f"cannot be written: {error.strerror or error}",
                where=str(self.path),
                todo="set run to a writable folder",
            ) from error
        return result if finished else None

    def say(self, status: Status, **about: Any) -> None:
        """Writes status.json, which batch scripts read."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        write_whole(self.path / "status.json", json.dumps({"status": status, **about, "id": self.id, "time": now}))

    def say_if_there(self, status: Status, **about: Any) -> None:
        """The same for a command that failed: it must not fail once more, nor make a folder, nor speak for a training
        that runs here."""
        with contextlib.suppress(OSError):
            if self.path.is_dir() and (self.lock is not None or holder(self.path) is None):
                self.say(status, **about)

    def release(self) -> None:
        """Others may train here."""
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    @property
    def id(self) -> str:
        """The same for every start of this run."""
        found = (self._read("status.json") or {}).get("id")
        return str(found) if found else secrets.token_hex(4)

    @property
    def done(self) -> bool:
        """Whether the run has come to its end."""
        return (self._read("result.json") or {}).get("finished") is True

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        write_whole(self.path / "plan.json", json_text(plan))

    def write_result(self, result: Mapping[str, Any]) -> None:
        write_whole(self.path / "result.json", json_text(result))

    def _is_fresh(self) -> bool:
        """Whether an earlier start of this Slurm job has begun anew here already."""
        job = requeued_job()
        return job is not None and (self.path / JOBS / f"{job}.fresh").exists()

    def _note_fresh(self) -> None:
        if job := os.environ.get("SLURM_JOB_ID"):
            (self.path / JOBS).mkdir(exist_ok=True)
            (self.path / JOBS / f"{job}.fresh").touch()

    def _move_aside(self) -> None:
        if {entry.name for entry in self.path.iterdir()} <= {".lock", JOBS}:
            return
        stamp = time.strftime("%Y%m%d-%H%M%S")
        taken = len(list(self.path.parent.glob(f"{self.path.name}.before-{stamp}*")))
        aside = self.path.with_name(f"{self.path.name}.before-{stamp}" + (f"-{taken}" if taken else ""))
        self.path.rename(aside)
        self.release()
        self.path.mkdir()
        if (aside / JOBS).is_dir():  # the job that runs here logs there, and Slurm opens the log anew after a requeue
            (aside / JOBS).rename(self.path / JOBS)
        self.lock = RunLock.take(self.path)

    def refuse_changes(self, config: Config) -> None:
        """Looks, and changes nothing.

        Raises:
            UserError: the run was started with another configuration, which is more than MAY_CHANGE allows.
        """
        file = self.path / "config.yaml"
        if not file.exists():
            return
        try:
            before = essential(from_yaml(file.read_text(encoding="utf-8")))
        except ValueError as error:
            raise UserError(
                f"is not what tlx wrote: {str(error).splitlines()[0]}",
                where=str(file),
                todo="remove it, if the folder's checkpoints are of this configuration; or --fresh",
            ) from error
        changed = changes(before, config)
        if changed:
            raise UserError(
                "this run was started with another configuration:\n    " + "\n    ".join(changed),
                where=str(self.path),
                todo="set run to another folder, take the changes back, or --fresh, which moves the old folder aside",
            )

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            content = from_json((self.path / name).read_bytes())
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None


def changes(before: Mapping[str, Any], config: Config) -> list[str]:
    """What differs in meaning between a configuration that tlx wrote and one of now, a line each.

    Both are read by the schema of now: a key that has gone since, such as `evaluate.mode`, and a default that has come
    since are no differences.

    Args:
        before: as :func:`essential` gives it.
    """
    now = yaml.safe_load(dump(config))
    if before == essential(now):
        return []
    later = {key: value for key, (needs, value) in BEFORE_THEY_CAME.items() if needs in before and key not in before}
    try:
        then = essential(yaml.safe_load(dump(_reread({**before, **later}, now))))
    except ConfigError as error:
        return [*differences(before, essential(now)), *error.problems]
    hints = {
        key: f", a key that came later: {key}={json.dumps(value)} goes on as it began" for key, value in later.items()
    }
    return [line + hints.get(line.partition(":")[0], "") for line in differences(then, essential(now))]


def _reread(before: Mapping[str, Any], now: Mapping[str, Any]) -> Config:
    """The configuration that `before` says, flat, with what `now` says of the keys that may change."""
    paths = dict(_paths(now))
    raw: dict[str, Any] = {}
    for key, value in {**_changeable(now), **before}.items():
        *parents, last = paths.get(key, tuple(key.split(".")))  # names, such as layers', may hold dots themselves
        node = raw
        for parent in parents:
            below = node.setdefault(parent, {})
            if not isinstance(below, dict):  # a damaged file; the differences will tell
                raise ConfigError([f"{key}: under a key that is no mapping"])
            node = below
        node[last] = value
    return parse(raw)


def _changeable(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flat(config).items() if key.startswith(MAY_CHANGE)}


def _paths(node: Any, key: str = "", steps: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every key of nested mappings as :func:`flat` joins it, and the steps that lead there."""
    if not isinstance(node, Mapping):
        yield key, steps
        return
    for name, below in node.items():
        yield from _paths(below, f"{key}.{name}".strip("."), (*steps, str(name)))


def essential(config: Any) -> dict[str, Any]:
    """Of a configuration as plain data, what decides the training, keys joined by dots."""
    return {key: value for key, value in flat(config).items() if not key.startswith(MAY_CHANGE)}


def versions() -> dict[str, str]:
    """Of everything that decides the numbers."""
    found = {"python": platform.python_version()}
    for package in ("tlx", "torch", "torchvision", "timm", "accelerate", "numpy", "webdataset"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
