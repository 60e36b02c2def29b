"""Writes what a full run of the tests has shown, as Markdown: ``python tests/full.py LOG CODE``."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path

from tlx.runs.run_folder import versions


def main(log: Path, code: str) -> None:
    lines = [line.rstrip() for line in log.read_text().splitlines()]
    start = next((i for i, line in enumerate(lines) if "slowest" in line), len(lines))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    said = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(
        f"# The last full run of the tests\n\n`bash launch/test.sh --all`, {datetime.date.today()}, exit code {code}\n"
    )
    print(f"- after commit {commit.stdout.strip()}\n- {said}\n- {platform.machine()}, {os.cpu_count()} cores")
    print(f"- {lines[-1].strip('= ') if lines else 'nothing was run'}\n\n```\n" + "\n".join(lines[start:]) + "\n```")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
