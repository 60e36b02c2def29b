"""Two ranks on this machine's loopback, over gloo: that at least this works, without a launcher.

``python -m tlx.doctor.loopback`` is one of the two; it prints what it measured as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from tlx.base.terminal import flush, hand_over
from tlx.doctor.findings import Finding, ok, warning
from tlx.doctor.network import INTERFACES, free_port
from tlx.doctor.traffic import Traffic

_LIMIT_S = 30.0
_RANKS = 2
_NOT_THEIRS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID")


@dataclass
class Pair:
    """Two processes that were started; :meth:`findings` ends them."""

    processes: list[subprocess.Popen[str]]

    @classmethod
    def start(cls, env: Mapping[str, str]) -> Pair:
        clean = {k: v for k, v in env.items() if k not in _NOT_THEIRS and not k.startswith("TORCHELASTIC_")}
        clean |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(_RANKS)}
        clean |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        words, nothing, pipe = [sys.executable, "-m", "tlx.doctor.loopback"], subprocess.DEVNULL, subprocess.PIPE
        processes: list[subprocess.Popen[str]] = []
        try:
            for rank in range(_RANKS):
                own = {**clean, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(
                    subprocess.Popen(
                        words, env=own, stdin=nothing, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace"
                    )
                )
        except OSError:
            cls(processes).end()
            raise
        return cls(processes)

    def findings(self, *, limit_s: float = _LIMIT_S) -> Iterator[Finding]:
        until, said = time.monotonic() + limit_s, []
        try:
            for process in self.processes:
                said.append(process.communicate(timeout=max(until - time.monotonic(), 0.1)))
        except subprocess.TimeoutExpired:
            yield warning("loopback", f"two processes have not met within {limit_s:.0f} s", INTERFACES)
            return
        finally:
            self.end()
        failed = next((n for n, process in enumerate(self.processes) if process.returncode), None)
        if failed is not None:
            lines = said[failed][1].strip().splitlines() or [f"exit code {self.processes[failed].returncode}"]
            yield warning("loopback", f"two processes here cannot compute together: {lines[-1][:300]}", INTERFACES)
            return
        yield ok("loopback", f"two processes met here: {Traffic(**json.loads(said[0][0].splitlines()[-1]))}")

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            with suppress(OSError, ValueError):
                process.communicate()


def main() -> None:
    """One of the ranks."""
    import torch
    import torch.distributed as dist

    from tlx.doctor.traffic import measure

    dist.init_process_group("gloo", init_method="env://", timeout=timedelta(seconds=_LIMIT_S))
    found = measure(torch.device("cpu"))
    if dist.get_rank() == 0:
        hand_over(json.dumps(found.plain()))
    dist.barrier()
    flush()
    os._exit(0)  # threads of gloo now and then abort a process that leaves through the interpreter's own end


if __name__ == "__main__":
    main()
