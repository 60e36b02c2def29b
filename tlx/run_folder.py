"""The folder of a run: what is in it, and whether this command may go on in it."""

from __future__ import annotations

import contextlib
import json
import platform
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import yaml

from tlx.config import Config, dump
from tlx.errors import UserError
from tlx.files import json_text, write_whole

Status = Literal["running", "done", "resumable", "user-error", "fault"]
MAY_CHANGE = (
    *("world", "track", "checkpoint", "run", "stop_after", "data.workers", "data.cache", "data.expected"),
    *("loop.micro_batch", "loop.fit_micro_batch", "loop.nonfinite"),
)
"""Keys that do not change what is trained, so that a run goes on when they do."""


@dataclass(frozen=True)
class RunFolder:
    """Holds everything needed to resume, to understand and to reproduce one training."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def prepare(self, config: Config, *, fresh: bool) -> dict[str, Any] | None:
        """Makes the folder, or goes on in it; the result, if the run is done.

        Raises:
            UserError: the configuration is not the one of this run, or the folder cannot be written.
        """
        try:
            if fresh:
                self._move_aside()
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_changes(config)
            result = self._read("result.json")
            if result is None or not result["finished"]:
                write_whole(self.path / "config.yaml", dump(config))
        except OSError as error:
            raise UserError(
                f"cannot be written: {error.strerror or error}",
                where=str(self.path),
                todo="set run to a writable folder",
            ) from error
        return result if result is not None and result["finished"] else None

    def say(self, status: Status, **about: Any) -> None:
        """Writes status.json, which batch scripts read."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        write_whole(self.path / "status.json", json.dumps({"status": status, **about, "id": self.id, "time": now}))

    def say_if_there(self, status: Status, **about: Any) -> None:
        """The same for a command that failed, which must not fail once more, nor make a folder for it."""
        with contextlib.suppress(OSError):
            if self.path.is_dir():
                self.say(status, **about)

    @property
    def id(self) -> str:
        """The same for every start of this run."""
        found = (self._read("status.json") or {}).get("id")
        return str(found) if found else secrets.token_hex(4)

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        write_whole(self.path / "plan.json", json_text(plan))

    def write_result(self, result: Mapping[str, Any]) -> None:
        write_whole(self.path / "result.json", json_text(result))

    def _move_aside(self) -> None:
        if not self.path.exists():
            return
        stamp = time.strftime("%Y%m%d-%H%M%S")
        taken = len(list(self.path.parent.glob(f"{self.path.name}.before-{stamp}*")))
        self.path.rename(self.path.with_name(f"{self.path.name}.before-{stamp}" + (f"-{taken}" if taken else "")))

    def _refuse_changes(self, config: Config) -> None:
        file = self.path / "config.yaml"
        if not file.exists():
            return
        before, now = flat(yaml.safe_load(file.read_text())), flat(yaml.safe_load(dump(config)))
        changed = [
            f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
        ]
        if changed:
            raise UserError(
                "this run was started with another configuration:\n    " + "\n    ".join(changed),
                where=str(self.path),
                todo="set run to another folder, take the changes back, or --fresh, which moves the old folder aside",
            )

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    if isinstance(node, Mapping):
        return {k: v for key, below in node.items() for k, v in flat(below, f"{prefix}.{key}".strip(".")).items()}
    return {prefix: node}


def versions() -> dict[str, str]:
    """Of everything that decides the numbers."""
    found = {"python": platform.python_version()}
    for package in ("tlx", "torch", "torchvision", "timm", "accelerate", "numpy", "webdataset"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
