"""The folder of a run: what is in it, and whether this command may go on in it."""

from __future__ import annotations

import contextlib
import json
import platform
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from tlx import __version__
from tlx.config import Config, dump
from tlx.errors import UserError
from tlx.extend import FUTURE, Extend, Extension, adopted, no_run, planned
from tlx.files import json_text, write_whole
from tlx.launcher import environment, requeued_job
from tlx.older_meaning import refuse_other_meaning
from tlx.parsing import from_json, from_yaml_file
from tlx.run_lock import RunLock, holder
from tlx.written_config import changes, essential, without_directions

Status = Literal["running", "done", "resumable", "user-error", "fault"]
JOBS = "slurm"
"""The folder of scripts and logs of Slurm's jobs; it stays where it is when a run is moved aside."""

PROMISED = {"name", "step", "samples_seen", "phases", "best", "unreadable", "replaced", "wall_time_s", "world"}
"""Of result.json, what a person is shown."""


@dataclass(frozen=True)
class Start:
    """How a training is started.

    Attributes:
        fresh: an earlier run folder is moved aside.
        extend: the run goes on by a longer plan, where what it has trained stays the same.
        rest: and where that would have been trained at other rates, by the rest of the new ones.

    Raises:
        UserError: both at once.
    """

    fresh: bool = False
    extend: bool = False
    rest: bool = False

    def __post_init__(self) -> None:
        if self.fresh and self.extends:
            raise UserError("--fresh begins anew and --extend goes on: one of the two")

    @property
    def extends(self) -> bool:
        return self.extend or self.rest

    @property
    def words(self) -> tuple[str, ...]:
        """Of a command."""
        said = {"--fresh": self.fresh, "--extend": self.extend, "--rest": self.rest}
        return tuple(word for word, wanted in said.items() if wanted)


@dataclass(frozen=True)
class Claim:
    """What a start finds in the folder that it holds now.

    Attributes:
        config: to train by.
        result: of a run that is done; else None.
        extension: to be committed before the first step; None where the run goes on as it is.
    """

    config: Config
    result: dict[str, Any] | None = None
    extension: Extension | None = None


@dataclass
class RunFolder:
    """Holds everything needed to resume, to understand and to reproduce one training.

    Attributes:
        spares_resumable: a mistake is none of the run's, which may go on without it, such as a refused extension.
        lock: while this process trains in it.
    """

    path: Path
    spares_resumable: bool = False
    lock: RunLock | None = field(default=None, init=False)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def prepare(self, config: Config, *, fresh: bool, extend: Extend | None = None) -> Claim:
        """Makes the folder, or goes on in it, and holds it.

        Raises:
            UserError: the configuration is not the one of this run, nor one that it may be extended to; another
                training is in the folder, or it cannot be written.
        """
        if extend is not None and not (self.path / "config.yaml").exists():
            raise no_run(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = RunLock.take(self.path)
            if fresh and not self._is_fresh():
                self._move_aside()
                self._note_fresh()
            config = adopted(self.path, config)
            extension = self.extension(config, extend) if extend is not None else None
            if extension is not None:
                return Claim(extension.config, extension=extension)
            self.refuse_changes(config)
            for left in self.path.glob(".*.tmp"):  # of a process that was killed
                left.unlink(missing_ok=True)
            result = self.result()
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
        return Claim(config, result=result if finished else None)

    def extension(self, config: Config, extend: Extend) -> Extension | None:
        """How the run goes on by another configuration; None where that is its own. Looks, and changes nothing.

        Raises:
            UserError: it does not.
        """
        return planned(self.path, adopted(self.path, config), extend)

    def say(self, status: Status, **about: Any) -> None:
        """Writes status.json, which batch scripts read."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        write_whole(self.path / "status.json", json.dumps({"status": status, **about, "id": self.id, "time": now}))

    def say_if_there(self, status: Status, **about: Any) -> None:
        """The same for a command that failed: it must not fail once more, nor make a folder, nor speak for a training
        that runs here, nor for one that is done."""
        with contextlib.suppress(OSError):
            if self.path.is_dir() and not self.done and (self.lock is not None or holder(self.path) is None):
                known = (self._read("status.json") or {}).get("status")
                if not (self.spares_resumable and known == "resumable"):
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
        return (self.result() or {}).get("finished") is True

    def result(self) -> dict[str, Any] | None:
        """result.json; None where there is none that can be read."""
        return self._read("result.json")

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        write_whole(self.path / "plan.json", json_text(plan))

    def write_result(self, result: Mapping[str, Any]) -> None:
        write_whole(self.path / "result.json", json_text(result))

    def _is_fresh(self) -> bool:
        """Whether an earlier start of this Slurm job has begun anew here already."""
        job = requeued_job()
        return job is not None and (self.path / JOBS / f"{job}.fresh").exists()

    def _note_fresh(self) -> None:
        if job := environment().job:
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
            written = essential(from_yaml_file(file))
        except ValueError as error:
            raise UserError(
                f"is not what tlx wrote: {str(error).splitlines()[0]}",
                where=str(file),
                todo="remove it, if the folder's checkpoints are of this configuration; or --fresh",
            ) from error
        changed = changes(without_directions(written), adopted(self.path, config), done=self.done)
        if changed:
            longer = "--extend, which goes on from here by the new plan; " if _of_plan(changed) else ""
            raise UserError(
                "this run was started with another configuration:\n    " + "\n    ".join(changed),
                where=str(self.path),
                todo=f"{longer}set run to another folder, take the changes back, or --fresh, which moves the old folder"
                " aside",
            )
        if not self.done:
            refuse_other_meaning(self.path, config, written)

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            content = from_json((self.path / name).read_bytes())
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None


def _of_plan(changed: Sequence[str]) -> bool:
    return all(line.startswith(FUTURE) for line in changed)


def threads() -> int:
    """That a rank computes with on the CPU (OMP_NUM_THREADS): another number sums in another order, which changes the
    last bits of results."""
    import torch

    return torch.get_num_threads()


def versions() -> dict[str, str]:
    """Of everything that decides the numbers."""
    found = {"python": platform.python_version(), "tlx": __version__}
    for package in ("torch", "torchvision", "timm", "accelerate", "numpy", "webdataset"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
