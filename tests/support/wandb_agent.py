"""Commands of W&B, `wandb sweep` and `wandb agent`, as its users start them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from commands import environment
from wandb_server import FakeServer

_AGENT = """
from wandb.wandb_agent import Agent
Agent.POLL_INTERVAL = 0.5  # seconds that it waits before each look
from wandb.cli.cli import cli
cli()
"""


def wandb(server: FakeServer, *words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a command against a test server to its end."""
    command, variables = [sys.executable, "-c", _AGENT, *words], environment(**server.account, **env)
    return subprocess.run(command, env=variables, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)
