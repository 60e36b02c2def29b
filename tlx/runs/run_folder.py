"""The folder of a run: what is in it, and whether this command may go on in it."""

from __future__ import annotations

import contextlib
import json
import platform
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tlx import __version__
from tlx.base import verdict
from tlx.base.errors import TlxError, UserError
from tlx.base.files import json_text, why_not_writable, write_whole, written_beside
from tlx.base.launcher import environment, requeued_job
from tlx.base.parsing import from_yaml_file
from tlx.base.terminal import say
from tlx.base.verdict import Status
from tlx.plan.config import Config, dump
from tlx.plan.saved_config import changes, essential, without_directions
from tlx.runs.extend import DEFAULTS, FUTURE, Extend, Extension, adopted, earlier, left_to_table, no_run, planned
from tlx.runs.extend import FILE as EXTENSIONS
from tlx.runs.older_meaning import refuse_other_meaning
from tlx.runs.run_files import RunFiles
from tlx.runs.run_lock import RunLock, wait_until_free

JOBS = "slurm"
"""The folder of scripts and logs of Slurm's jobs; it stays where it is when a run is moved aside."""

AVERAGED = "averaged"
"""The key of result.json, and of a model's provenance, that says of which networks the weights are an average: the run
was never trained."""

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
    """What a start finds where its run is to be, and would do there.

    Attributes:
        config: to train by.
        result: of a run that is done; else None.
        extension: to be made before the first step; None where the run goes on as it is.
        aside: what lies there is another run's, or came to nothing, and is moved aside.
        fresh: and that because --fresh asked for it.
        seen: status.json of a run that is to be extended.
        table: what is left to the table of defaults; None where the run goes on by what it has noted down.
    """

    config: Config
    result: dict[str, Any] | None = None
    extension: Extension | None = None
    aside: bool = False
    fresh: bool = False
    seen: Mapping[str, Any] | None = None
    table: Mapping[str, Any] | None = None


@dataclass
class RunFolder:
    """Holds everything needed to resume, to understand and to reproduce one training.

    A start first looks (:meth:`look`), and makes the folder its own (:meth:`claim`) when nothing speaks against its
    first step any more: a start that is refused leaves no trace here.

    Attributes:
        lock: while this process trains in it.
        displaced: what happened to the folder while it was held, in words; None where nothing did.
    """

    path: Path
    lock: RunLock | None = field(default=None, init=False)
    displaced: str | None = field(default=None, init=False)
    _id: str | None = field(default=None, init=False)
    _texts: Mapping[str, str] = field(default_factory=dict, init=False)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def files(self) -> RunFiles:
        return RunFiles(self.path)

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def look(self, config: Config, *, fresh: bool = False, extend: Extend | None = None) -> Claim:
        """What a start finds here. Changes nothing.

        Raises:
            UserError: the configuration is not the one of this run, nor one that it may be extended to; another
                training is in the folder, or it cannot be written.
        """
        try:
            return self._look(config, fresh=fresh, extend=extend)
        except OSError as error:
            raise UserError(
                f"cannot be read: {error.strerror or error}",
                where=str(error.filename or self.path),
                todo="set run to a folder of yours",
            ) from error

    def _look(self, config: Config, *, fresh: bool, extend: Extend | None) -> Claim:
        if not fresh and AVERAGED in (self.result() or {}):
            raise UserError(
                "its weights are an average, made by tlx soup: there is no training to go on with",
                where=str(self.path),
                todo=f"set run to another folder, and backbone.weights={self.path} to go on from them; or --fresh,"
                " which moves this folder aside",
            )
        if extend is not None and not (self.path / "config.yaml").exists():
            raise no_run(self.path)
        wait_until_free(self.path)
        if fresh and not self._is_fresh():
            refuse_read_only(self.path)
            table = left_to_table(self.path, config, anew=True)
            return Claim(config, aside=True, fresh=True, table=table)
        given, config = config, adopted(self.path, config)
        extension = self.extension(config, extend) if extend is not None else None
        if extension is not None:
            refuse_read_only(self.path)
            table = left_to_table(self.path, given, anew=False)
            return Claim(extension.config, extension=extension, seen=self.files.status, table=table)
        aside = self.refuse_changes(config)
        result = None if aside else self.result()
        if result is None or result.get("finished") is not True:
            refuse_read_only(self.path)
            if aside or not (self.path / "config.yaml").exists():
                return Claim(given, aside=aside, table=left_to_table(self.path, given, anew=True))
            return Claim(config)
        if not result.keys() >= PROMISED:
            raise UserError("is not what tlx wrote", where=str(self.path / "result.json"), todo="remove it, or --fresh")
        return Claim(config, result=result)

    def claim(self, claim: Claim, files: Mapping[str, str] | None = None) -> None:
        """Makes the folder this training's, and holds it: what is written here is written whole, or not at all.

        Args:
            claim: as :meth:`look` gave it.
            files: what else the folder is to hold from the beginning, by name.

        Raises:
            UserError: another training is or was here meanwhile, or the folder cannot be written.
        """
        made = _made(self.path)
        try:
            for folder in made:
                folder.mkdir(exist_ok=True)
            with self._held():
                self._write(claim, files or {})
        except OSError as error:
            raise UserError(
                f"cannot be written: {error.strerror or error}",
                where=str(error.filename or self.path),
                todo="make room, or set run to a writable folder; the same command begins, and nothing was changed",
            ) from error
        finally:
            if self.lock is None:
                for folder in reversed(made):
                    with contextlib.suppress(OSError):
                        folder.rmdir()

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Takes the lock; where the body fails, what there was is there again."""
        had_lock = (self.path / ".lock").exists()
        self.lock = RunLock.take(self.path)
        try:
            yield
        except BaseException:
            self.release()
            if not had_lock:
                with contextlib.suppress(OSError):
                    (self.path / ".lock").unlink()
            raise

    def _write(self, claim: Claim, files: Mapping[str, str]) -> None:
        aside = self._move_aside() if claim.aside else None
        try:
            if aside is None:
                self._refuse_what_came_since(claim)
            elif not claim.fresh:
                say(
                    f"note: an earlier start failed before its first checkpoint; its folder was moved to {aside}",
                    error=True,
                )
            for left in self.path.glob(".*.tmp"):  # of a process that was killed
                left.unlink(missing_ok=True)
            self._id = None
            self._id = self.id
            self._texts = {"config.yaml": dump(claim.config), **files, **self._defaults(claim)}
            said = {"status.json": self._status("running")}
            with written_beside(self.path, {**self._texts, **said}) as place:
                if claim.extension is not None:
                    claim.extension.record(self.path)
                    place(*said)
                    claim.extension.remove_result(self.path)
                    place(*self._texts)
                else:
                    place(*self._texts, *said)
            if claim.fresh:
                self._note_fresh()
            if (self.path / EXTENSIONS).exists():
                self._texts = {**self._texts, EXTENSIONS: (self.path / EXTENSIONS).read_text(encoding="utf-8")}
        except BaseException:
            if aside is not None:
                self._move_back(aside)
            raise
        verdict.give("running")

    def _defaults(self, claim: Claim) -> dict[str, str]:
        """The file of what is left to the table of defaults; nothing where nothing is, nor was."""
        file = self.path / DEFAULTS
        if claim.table is None:
            return {DEFAULTS: file.read_text(encoding="utf-8")} if file.exists() else {}
        return {DEFAULTS: json_text(claim.table)} if claim.table or file.exists() else {}

    def _refuse_what_came_since(self, claim: Claim) -> None:
        """Another start may have been quicker, and have come and gone while this one looked at its parts."""
        if claim.extension is not None:
            same = self.files.status == claim.seen
        else:
            same = not self.refuse_changes(claim.config) and not self.done
        if not same:
            raise UserError(
                "another training was here while this one was starting",
                where=str(self.path),
                todo="run the same command again",
            )

    def extension(self, config: Config, extend: Extend) -> Extension | None:
        """How the run goes on by another configuration; None where that is its own. Looks, and changes nothing.

        Raises:
            UserError: it does not.
        """
        return planned(self.path, adopted(self.path, config), extend)

    def say(self, status: Status, **about: Any) -> None:
        """Writes status.json, and the verdict for whoever started this process; see :mod:`tlx.base.verdict`."""
        verdict.give(status, **about)
        self._say(status, **about)

    def _say(self, status: Status, **about: Any) -> None:
        write_whole(self.path / "status.json", self._status(status, **about))

    def _status(self, status: Status, **about: Any) -> str:
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        return json.dumps({"status": status, **about, "id": self.id, "time": now})

    def settle_done(self, result: Mapping[str, Any]) -> None:
        """status.json of a run that is done says so: a start that was killed may not have come to it, and those of
        earlier versions wrote over it. A folder that cannot be written stays as it is."""
        if self.status == "done":
            return
        with contextlib.suppress(OSError, UserError):
            self.lock = RunLock.take(self.path)
            try:
                steps = self.files.plan.get("steps", result["step"])
                self._say("done", step=result["step"], steps=steps)
            finally:
                self.release()

    def is_displaced(self) -> bool:
        """Whether the folder is no longer where this training has claimed it."""
        return self.displaced is not None or (self.lock is not None and self.lock.place() != self.lock.file.parent)

    def follow(self) -> str | None:
        """Goes with the folder to where it was renamed; where it was removed, begins a new one beside it, so that what
        is in memory has a place. What happened and what to do, in words; None where nothing has happened.

        Raises:
            TlxError: nothing can be written anywhere near.
        """
        if self.lock is None or not self.is_displaced() or self.displaced is not None:
            return self.displaced
        former, place = self.path, self.lock.place()
        if place is not None:
            self.lock, self.path = self.lock.at(place), place
            what = f"{former}: the run folder was renamed to {place} in mid-training"
            todo = f"the same command with run={place} goes on from there; or move it back"
        else:
            self.path = self._rescued()
            self.lock.release()
            self.lock = RunLock.take(self.path)
            what = f"{former}: the run folder was removed in mid-training; all that was in memory is in {self.path}"
            todo = f"mv {self.path} {former}, and the same command goes on; or add run={self.path}"
        self.displaced = f"{what}\n  -> {todo}"
        return self.displaced

    def _rescued(self) -> Path:
        """A run folder that training can go on from, once it has a checkpoint."""
        name = f"{self.path.name}.rescued-{time.strftime('%Y%m%d-%H%M%S')}"
        beside: list[Callable[[], Path]] = [
            lambda: self.path.absolute().parent,
            Path.cwd,
            lambda: Path(tempfile.gettempdir()),
        ]
        for place in beside:
            with contextlib.suppress(OSError):
                folder = place() / name
                folder.mkdir()
                for file, text in self._texts.items():
                    write_whole(folder / file, text)
                return folder
        raise TlxError(
            f"{self.path}: the run folder was removed in mid-training, and nothing can be written beside it, in the "
            "working folder or in TMPDIR; what was trained since the last checkpoint is lost"
        )

    def release(self) -> None:
        """Others may train here."""
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    @property
    def id(self) -> str:
        """The same for every start of this run."""
        if self._id is not None:
            return self._id
        found = self.files.status.get("id")
        return str(found) if found else secrets.token_hex(4)

    @property
    def status(self) -> str | None:
        """What status.json says; None where there is none that can be read."""
        found = self.files.status.get("status")
        return str(found) if found else None

    @property
    def done(self) -> bool:
        """Whether the run has come to its end."""
        return (self.result() or {}).get("finished") is True

    def result(self) -> dict[str, Any] | None:
        """result.json; None where there is none that can be read."""
        return self.files.result or None

    def write_result(self, result: Mapping[str, Any]) -> None:
        write_whole(self.path / "result.json", json_text(result))

    def _is_fresh(self) -> bool:
        """Whether an earlier start of this Slurm job has begun anew here already."""
        job = requeued_job()
        return job is not None and (self.path / JOBS / f"{job}.fresh").exists()

    def _note_fresh(self) -> None:
        if job := environment().job:
            with contextlib.suppress(OSError):
                (self.path / JOBS).mkdir(exist_ok=True)
                (self.path / JOBS / f"{job}.fresh").touch()

    def _move_aside(self) -> Path | None:
        """Where to; None where there is nothing. Ends with the lock of the new, empty folder."""
        if {entry.name for entry in self.path.iterdir()} <= {".lock", JOBS}:
            return None
        stamp = time.strftime("%Y%m%d-%H%M%S")
        taken = len(list(self.path.parent.glob(f"{self.path.name}.before-{stamp}*")))
        aside = self.path.with_name(f"{self.path.name}.before-{stamp}" + (f"-{taken}" if taken else ""))
        self.path.rename(aside)
        self.release()
        try:
            self.path.mkdir()
            if (aside / JOBS).is_dir():  # the job that runs here logs there; Slurm opens the log anew after a requeue
                (aside / JOBS).rename(self.path / JOBS)
            self.lock = RunLock.take(self.path)
        except BaseException:
            self._move_back(aside)
            raise
        return aside

    def _move_back(self, aside: Path) -> None:
        """The new run could not be begun: what was moved aside is where it was."""
        self.release()
        with contextlib.suppress(OSError):
            for name in (".lock", "config.yaml", "status.json", *self._texts):
                (self.path / name).unlink(missing_ok=True)
            if (self.path / JOBS).is_dir():
                (self.path / JOBS).rename(aside / JOBS)
            self.path.rmdir()
            aside.rename(self.path)

    def refuse_changes(self, config: Config) -> bool:
        """Whether what lies here came to nothing: it ended by a mistake before its first checkpoint, and was started
        with another configuration than this one. Looks, and changes nothing.

        Raises:
            UserError: the run was started with another configuration, which is more than MAY_CHANGE allows.
        """
        file = self.path / "config.yaml"
        if not file.exists():
            return False
        try:
            written = essential(from_yaml_file(file))
        except ValueError as error:
            raise UserError(
                f"is not what tlx wrote: {str(error).splitlines()[0]}",
                where=str(file),
                todo="remove it, if the folder's checkpoints are of this configuration; or --fresh",
            ) from error
        changed = changes(without_directions(written), adopted(self.path, config), done=self.done)
        if changed and self.status == "user-error" and not self.done and not any(self.checkpoints.glob("step-*")):
            return True
        if changed:
            longer = "--extend, which goes on from here by the new plan; " if _of_plan(changed) else ""
            raise UserError(
                "this run was started with another configuration:\n    " + "\n    ".join(changed),
                where=str(self.path),
                todo=f"{longer}set run to another folder, take the changes back, or --fresh, which moves the old folder"
                " aside",
            )
        if not self.done:
            refuse_other_meaning(self.path, config, written, extensions=earlier(self.path))
        return False


def refuse_read_only(folder: Path) -> None:
    """What :meth:`RunFolder.claim` would find out later, after parts were built for minutes. Nothing is left there.

    Raises:
        UserError: the folder, or the one to make it in, cannot be written.
    """
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists() or p.is_symlink())
    if why := why_not_writable(place):
        raise UserError(f"cannot be written: {why}", where=str(place), todo="set run to a writable folder")


def _made(path: Path) -> list[Path]:
    """Folders that are not there yet, the outermost first."""
    return [place for place in (*reversed(path.parents), path) if not place.exists()]


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
    for package in ("torch", "torchvision", "timm", "accelerate", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
