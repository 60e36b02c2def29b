"""Which W&B run a training is: the configuration over the environment over our defaults, and what won is said.

What W&B has given to a run stands in ``wandb.json`` of the run folder, from its first start on: later starts and
``tlx track sync`` go on with it, whatever the environment says then. In a sweep the agent names the run, and W&B puts
it into the sweep's project.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tlx.base.files import write_whole
from tlx.runs.run_files import RunFiles

PROJECT = "tlx"
"""Where nothing names one."""

RECORD = "wandb.json"

_OURS = ("WANDB_RESUME", "WANDB_CONSOLE", "WANDB_SAVE_CODE", "WANDB_FINISH_TIMEOUT")
"""Variables that would change what tlx promises: each step once, no password sent, no wait at the end."""

_VARIABLES = {
    "tags": "WANDB_TAGS", "name": "WANDB_NAME", "group": "WANDB_RUN_GROUP", "job_type": "WANDB_JOB_TYPE",
    "notes": "WANDB_NOTES",
}  # fmt: skip
"""Of what is said about a run at W&B, and has no default but the name."""

_MODES = {"dryrun": "offline", "run": "online"}


@dataclass(frozen=True)
class Record:
    """What ``wandb.json`` says; all None before the first start.

    Attributes:
        sweep: the id of the sweep that the run is a trial of.
        url: the run's page, once the server has it.
        group, job_type, name, notes, tags: as they were chosen; tags with commas between them.
        console: bytes of log.txt that W&B has. models: keys of the weights that it has, with commas.
    """

    id: str | None = None
    project: str | None = None
    entity: str | None = None
    sweep: str | None = None
    url: str | None = None
    group: str | None = None
    job_type: str | None = None
    name: str | None = None
    notes: str | None = None
    tags: str | None = None
    console: str | None = None
    models: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Of a run folder; what cannot be read says nothing."""
        try:
            content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return cls()
        if not isinstance(content, Mapping):
            return cls()
        said = {k: str(v) for k, v in content.items() if k in cls.__dataclass_fields__ and v}
        if "sweep" not in content and "url" in said:  # of before it was kept: `id` is what was asked for
            said["id"] = unquote(said["url"].rstrip("/").rpartition("/")[2]) or said.get("id", "")
        return cls(**said)


@dataclass(frozen=True)
class Asked:
    """What the configuration says of the run at W&B; None or empty where it leaves that open."""

    project: str | None = None
    entity: str | None = None
    tags: Sequence[str] = ()
    mode: str | None = None
    group: str | None = None
    job_type: str | None = None
    name: str | None = None
    notes: str | None = None


@dataclass(frozen=True)
class Choice:
    """What is handed to W&B.

    Attributes:
        name: None leaves it to W&B.
        folder: where its own files go; None for the run folder.
        mode: None where neither the configuration nor the environment says one.
        note: for people; what the environment decided, and what of it does not count; None where it said nothing.
    """

    run_id: str
    project: str | None
    entity: str | None
    sweep: str | None
    name: str | None = None
    tags: tuple[str, ...] = ()
    group: str | None = None
    job_type: str | None = None
    notes: str | None = None
    folder: Path | None = None
    mode: str | None = None
    note: str | None = None


def choose(
    asked: Asked, record: Record, env: Mapping[str, str], *, run_id: str, name: str, here: Path | None = None
) -> Choice:
    """Which run it is to be.

    Args:
        env: the environment; variables without a value count as not set.
        run_id, name: what a run is called that nobody has named.
        here: the working folder, which an agent says in WANDB_DIR unless its user does.
    """
    heard = _Heard(env)
    agent, sweep = env.get("WANDB_RUN_ID") or None, env.get("WANDB_SWEEP_ID") or None
    chosen = record.id or agent or run_id
    heard.weigh("id", "WANDB_RUN_ID", chosen, f"{RECORD}: the run in this folder is {record.id}")
    if agent != (record.id or agent):  # another trial's agent
        sweep = None
    sweep = sweep or record.sweep
    places: dict[str, str | None] = {}
    for key in ("project", "entity"):
        written, kept, said = getattr(asked, key), getattr(record, key), env.get(f"WANDB_{key.upper()}") or None
        places[key] = (kept or said or written) if sweep else (written or kept or said)
        if sweep and written not in (None, places[key]):
            heard.unused.append(f"{key}={written} of the configuration (a trial is where its sweep is)")
        whose = "the configuration" if written == places[key] else RECORD
        heard.weigh(key, f"WANDB_{key.upper()}", places[key], f"{whose} says {places[key]}")
    words: dict[str, str | None] = {"tags": ",".join(asked.tags) or None}
    words |= {key: getattr(asked, key) for key in _VARIABLES if key not in words}
    for key, variable in _VARIABLES.items():
        words[key] = words[key] or env.get(variable) or getattr(record, key)
        heard.weigh(key.replace("_", " "), variable, words[key], f"the configuration says {words[key]}")
    mode = asked.mode or env.get("WANDB_MODE") or None
    heard.weigh("mode", "WANDB_MODE", mode, f"the configuration says {mode}")
    folder = env.get("WANDB_DIR") or None
    if sweep and folder is not None and here == Path(folder):
        folder = None
    else:
        heard.weigh("files in", "WANDB_DIR", folder, "")
    heard.unused += [f"{variable} (tlx decides that)" for variable in _OURS if env.get(variable)]
    return Choice(
        run_id=chosen,
        project=places["project"] or (None if sweep else PROJECT),
        entity=places["entity"],
        sweep=sweep,
        name=words["name"] or (None if sweep else name),
        tags=tuple(tag for tag in (words["tags"] or "").split(",") if tag),
        group=words["group"],
        job_type=words["job_type"],
        notes=words["notes"],
        folder=Path(folder) if folder is not None else None,
        mode=_MODES.get(mode or "", mode),
        note=heard.note,
    )


@dataclass
class _Heard:
    """What variables of the environment came to."""

    env: Mapping[str, str]
    used: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def weigh(self, key: str, variable: str, chosen: Any, why: str) -> None:
        said = self.env.get(variable)
        if said and said == chosen:
            self.used.append(f"{key} {said} ({variable})")
        elif said:
            self.unused.append(f"{variable}={said} ({why})")

    @property
    def note(self) -> str | None:
        words = [", ".join(self.used)] if self.used else []
        words += [f"not used: {', '.join(self.unused)}"] if self.unused else []
        return f"W&B: {'; '.join(words)}" if words else None


def keep(folder: Path, came: Mapping[str, Any], choice: Choice) -> None:
    """Writes wandb.json: before the start what was chosen, so that a start that comes to nothing is known, too; then
    what W&B has made of it. Offline it names no page, and perhaps no entity: those of an earlier start stay."""
    known = {key: value for key, value in dataclasses.asdict(Record.read(folder)).items() if value}
    if known.get("id") != came["id"] or known.get("project") != (came["project"] or known.get("project")):
        known = {}  # of another run
    said = {"group": choice.group, "job_type": choice.job_type, "name": choice.name, "notes": choice.notes}
    said |= {"tags": ",".join(choice.tags)}
    record = {**known, **{key: str(value) for key, value in {**said, **came}.items() if value}, "sweep": choice.sweep}
    with contextlib.suppress(OSError):
        write_whole(folder / RECORD, json.dumps(record) + "\n")


def note(folder: Path, **has: str) -> None:
    """Adds to wandb.json what W&B has."""
    record = {**RunFiles(folder).read(RECORD), **has}
    with contextlib.suppress(OSError):
        write_whole(folder / RECORD, json.dumps(record) + "\n")
