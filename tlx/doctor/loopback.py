"""Two ranks on this machine's loopback, over gloo: that at least this works, without a launcher.

``python -m tlx.doctor.loopback`` is one of the two.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from tlx.base.launcher import Environment
from tlx.base.terminal import say
from tlx.doctor.findings import Finding, ok, warning
from tlx.doctor.network import INTERFACES, free_port

_LIMIT_S = 30.0
_RANKS = 2


@dataclass
class Pair:
    """Two processes that were started; :meth:`findings` ends them."""

    processes: list[subprocess.Popen[str]]

    @classmethod
    def start(cls, here: Environment) -> Pair:
        pair, env = cls([]), here.outside()
        own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(_RANKS)}
        own |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", "tlx.doctor.loopback"]
        try:
            for rank in range(_RANKS):
                pair.processes.append(
                    subprocess.Popen(
                        words, env={**env, **own, "RANK": str(rank)}, stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", errors="replace",
                    )
                )  # fmt: skip
        except OSError:
            pair.end()
            raise
        return pair

    def findings(self, *, limit_s: float = _LIMIT_S) -> Iterator[Finding]:
        until = time.monotonic() + limit_s
        try:
            said = [process.communicate(timeout=max(until - time.monotonic(), 0.1))[1] for process in self.processes]
        except subprocess.TimeoutExpired:
            yield warning("loopback", f"two processes have not met within {limit_s:.0f} s", INTERFACES)
            return
        finally:
            self.end()
        for process, text in zip(self.processes, said, strict=True):
            if process.returncode:
                why = (text.strip().splitlines() or [f"exit code {process.returncode}"])[-1][:300]
                yield warning("loopback", f"two processes here cannot compute together: {why}", INTERFACES)
                return
        yield ok("loopback", "two processes met here, and add up over gloo")

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            with suppress(OSError, ValueError):
                process.communicate()


def main() -> None:
    """One of the ranks."""
    import torch.distributed as dist

    from tlx.doctor.computing import add_up

    dist.init_process_group("gloo", init_method="env://", timeout=timedelta(seconds=_LIMIT_S))
    found = add_up("cpu")
    dist.barrier()
    if found.verdict != "ok":
        say(found.said, error=True)
    os._exit(int(found.verdict != "ok"))  # threads of gloo now and then abort a process that ends like others


if __name__ == "__main__":
    main()
