"""Runs the steps of `launch/gpu.sh` within their limits, and leaves a table: ``python tests/gpu/run.py [--dry] ...``.

Of each part at most four minutes are spent. What did not fit, or was cut off, is in the table as such; so is what
failed, and then the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from steps import PARTS, Step, steps

from tlx.runs.run_folder import versions

PART_S = 240.0
DRY = 5
"""A CPU takes longer, toy size or not."""
LEAST_S = 10.0
"""What must be left of a part for another step to begin."""
Outcome = Literal["done", "failed", "cut off", "did not fit"]


@dataclass
class Result:
    """How a step went.

    Attributes:
        rows: what it has shown, each with `what` and `ok`; see :meth:`rows.Setting.row`.
        tail: the end of its output, where it failed.
    """

    step: Step
    outcome: Outcome
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    tail: str = ""

    @property
    def failed(self) -> bool:
        silent = self.outcome == "cut off" and not self.rows  # it hangs, as far as anybody can tell
        return silent or self.outcome == "failed" or any(row["ok"] is False for row in self.rows)

    @property
    def data(self) -> dict[str, Any]:
        about = {"part": self.step.part, "step": self.step.name, "shows": self.step.shows}
        return {
            **about,
            "outcome": self.outcome,
            "seconds": round(self.seconds, 1),
            "rows": self.rows,
            "tail": self.tail,
        }


def main() -> int:
    said = words()
    asked = chosen(steps(), said.only)
    if not said.dry and not torch.cuda.is_available():
        print("error: there is no GPU that torch can use\n  -> --dry runs every step on a CPU", file=sys.stderr)
        return 2
    said.out.mkdir(parents=True, exist_ok=True)
    results = []
    for part in dict.fromkeys(step.part for step in asked):
        end = time.monotonic() + said.part_s
        for step in (s for s in asked if s.part == part):
            results.append(run(step, said, left=end - time.monotonic()))
            write(results, said)
    print(text(results))
    print(f"written: {said.out / 'gpu.json'}, {said.out / 'GPU.md'}")
    return int(any(result.failed for result in results))


def words() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch/gpu.sh", description="What has to be seen on a machine with a GPU.")
    parser.add_argument(
        "--only", action="append", metavar="PART[:STEP]", help=f"{', '.join(PARTS)}; with a step's name that one alone"
    )
    parser.add_argument("--dry", action="store_true", help="every step on a CPU at toy size, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(".gpu/out"), help="where the table and the JSON go")
    parser.add_argument(
        "--part-s", type=float, help=f"seconds that a part may take; {PART_S:.0f}, dry {DRY} times that"
    )
    said = parser.parse_args()
    said.part_s = said.part_s or PART_S * (DRY if said.dry else 1)
    return said


def chosen(known: Sequence[Step], only: Sequence[str] | None) -> list[Step]:
    """The steps that `--only` names, or all.

    Raises:
        SystemExit: there is no such part or step.
    """
    if only is None:
        return list(known)
    found: list[Step] = []
    for name in only:
        part, _, step = name.partition(":")
        named = [s for s in known if s.part == part and (not step or s.name == step)]
        if not named:
            of_part = [f"{part}:{s.name}" for s in known if s.part == part] or PARTS
            print(f"error: --only: there is no {name}\n  -> one of {', '.join(of_part)}", file=sys.stderr)
            raise SystemExit(2)
        found += named
    return found


def run(step: Step, said: argparse.Namespace, *, left: float) -> Result:
    """Runs a step in a process group of its own, which is ended when its time, or its part's, is over."""
    if left < LEAST_S:
        return Result(step, "did not fit")
    name = f"{step.part}-{step.name.replace(' ', '-')}"
    rows, log = (said.out / f"{name}.{kind}" for kind in ("jsonl", "log"))
    rows.unlink(missing_ok=True)
    print(f"{step.part}: {step.name}: {step.shows}", flush=True)
    began = time.monotonic()
    with log.open("w") as out:
        command = step.command(rows.absolute(), dry=said.dry, work=(said.out / "work").absolute())
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment(said.dry), start_new_session=True)
        try:
            code: int | None = process.wait(min(step.limit_s * (DRY if said.dry else 1), left))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    shown = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    bad = code != 0 or any(row["ok"] is False for row in shown)
    tail = log.read_text(errors="replace")[-3000:] if bad else ""
    outcome: Outcome = "cut off" if code is None else "done" if code == 0 else "failed"
    print(f"  {outcome} after {time.monotonic() - began:.0f} s, {len(shown)} rows", flush=True)
    return Result(step, outcome, time.monotonic() - began, shown, tail)


def environment(dry: bool) -> dict[str, str]:
    here = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "WANDB_", "SLURM_"))}
    here["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read once in a process, where some trainings are deterministic
    return {**here, "CUDA_VISIBLE_DEVICES": ""} if dry else here


def end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def machine() -> dict[str, str]:
    """The device and the versions, in words."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    driver = torch.version.cuda or "none"
    about = {"device": device, "cuda": driver, "cores": str(os.cpu_count()), "python": platform.python_version()}
    return about | versions()


def write(results: Sequence[Result], said: argparse.Namespace) -> None:
    """The JSON and the Markdown so far: whatever ends this leaves what was found."""
    about = {"date": time.strftime("%Y-%m-%d"), "dry": said.dry, "machine": machine()}
    whole = {**about, "results": [result.data for result in results]}
    (said.out / "gpu.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    dry = " A dry run on a CPU: its figures say nothing." if said.dry else ""
    machine_words = ", ".join(f"{name} {value}" for name, value in about["machine"].items())
    head = f"# What was seen on a GPU\n\n`bash launch/gpu.sh`, {about['date']}; {machine_words}.{dry}\n\n"
    (said.out / "GPU.md").write_text(head + "```\n" + text(results) + "\n```\n", encoding="utf-8")


def text(results: Sequence[Result]) -> str:
    """The table."""
    lines = []
    for result in results:
        took = f" ({result.seconds:.0f} s)" if result.seconds else ""
        lines.append(f"{result.step.part}: {result.step.name}: {result.outcome}{took}")
        for row in result.rows:
            mark = {True: "ok", False: "FAILED", None: ""}[row["ok"]]
            figures = "  ".join(f"{k} {shown(v)}" for k, v in row.items() if k not in ("what", "ok", "why"))
            lines.append(f"  {mark:<6} {row['what']:<58} {figures}".rstrip())
            if row.get("why"):
                lines += [f"         {line}" for line in str(row["why"]).splitlines()[-3:]]
        if result.outcome in ("failed", "cut off"):
            lines += [f"         {line}" for line in result.tail.splitlines()[-4:]]
    outcomes = [result.outcome for result in results]
    counts = ", ".join(f"{outcomes.count(o)} {o}" for o in dict.fromkeys(outcomes))
    wrong = sum(row["ok"] is False for result in results for row in result.rows)
    return "\n".join([*lines, "", f"steps: {counts}; rows that are not as they must be: {wrong}"])


def shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
