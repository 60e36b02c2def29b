"""W&B's service in this process: started so that it speaks to us and not to the terminal, asked whether there are a key
and a server, and ended by force where it hangs."""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tlx.base.launcher import environment, export, withdraw
from tlx.base.location import without_credentials
from tlx.base.reachable import reachable

Mode = Literal["online", "offline", "disabled"]

KNOCK_S = 2.0
"""How long its server may take to accept a connection, where nobody has said whether there is a network."""

LEAVE_S = 20.0
"""How long a run that was abandoned in this process may take until it is gone."""


_SAME = "already exists with the same content"


@dataclass
class Heard:
    """What W&B would have put on the terminal; it knows some failures by nothing else."""

    warnings: list[str] = field(default_factory=list)

    def info(self, text: str) -> None:
        pass

    def warning(self, text: str) -> None:
        plain = re.sub(r"\x1b\[[0-9;]*m|\b(wandb: |WARNING |ERROR )", "", text)
        if _SAME in plain:  # a table that is equal to that of before the run was extended is no failure
            return
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
    listen("online")  # WANDB_MODE=offline would answer for the key
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


def stage_in(folder: Path) -> None:
    """Copies of what tables and artifacts hold wait there until they are uploaded, and not in the user's home, unless
    the environment names a place."""
    said = environment().get("WANDB_DATA_DIR")
    if not said or Path(said).parts[-2:] == folder.parts[-2:]:  # which an earlier run in this process has set
        export("WANDB_DATA_DIR", str(folder))


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


def listen(mode: Mode) -> Heard:
    """Starts the service; W&B speaks to us from here on, not to the terminal."""
    import wandb as library

    heard = Heard()
    settings = library.Settings(mode=mode, silent=True, show_warnings=False, show_errors=False)
    library.setup(settings)
    library.termsetup(settings, heard)
    return heard


def reason(error: Exception) -> str:
    """What failed, in one line."""
    first = str(error).splitlines()[0][:200] if str(error) else ""
    return f"W&B: {first or type(error).__name__}"
