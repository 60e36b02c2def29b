"""Ranks without a launcher, of a training that would last for long."""

from __future__ import annotations

import subprocess
import sys
import time

from commands import environment, free_port

BOUND_S = 45
"""Asserted for an end after a death; on an idle machine it takes 3 to 10 s."""
PATIENCE_S = 20
PATIENT = f"world.timeout_minutes={PATIENCE_S / 60}"
"""For a test of a rank that hangs; elsewhere a cold import on a busy machine would count as one."""
RAW = {
    "seed": 5,
    "data": {"batch": 8, "workers": 1},
    "input": {"size": 16},
    "backbone": {"name": "toys:small", "weights": "none"},
    "phases": {"each": {"lr": 0.01}, "feature_extraction": {"duration": 4000}, "fine_tuning": {"duration": 8000}},
    "evaluate": {"every": 2000},
    "checkpoint": {"every": 30},
    "track": {"every": 1, "report": False},
}


class Plain:
    """Ranks started by hand, as `srun` and `mpirun` do: nobody ends them when one dies.

    Args:
        words: of the command, by rank where they differ.
        places: working folders by rank.
        env: more of the environment, of every rank.
    """

    def __init__(self, config, *words, ranks=2, of_rank=None, paths=None, places=None, env=None) -> None:
        port = str(free_port())
        self.files = [config.parent / f"rank-{rank}.out" for rank in range(ranks)]
        self.ranks = []
        for rank, file in enumerate(self.files):
            world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **(env or {})}
            of_all = environment(path=(paths or {}).get(rank, ""), **world)
            command = [sys.executable, "-m", "tlx", "train", config, *words, *(of_rank or {}).get(rank, ())]
            with file.open("w") as out:
                self.ranks.append(
                    subprocess.Popen(
                        [*map(str, command)], env=of_all, stdout=out, stderr=out, cwd=(places or {}).get(rank)
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        for process in self.ranks:
            process.kill()
            process.wait()

    def until_step(self, run, step) -> None:
        deadline = time.monotonic() + 240
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_bytes().count(b"\n") < step:
            assert all(p.poll() is None for p in self.ranks), self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)

    def ends(self, *, within: float, but=()) -> list[int]:
        """Exit codes of all ranks but those of `but`."""
        deadline = time.monotonic() + within
        others = [p for rank, p in enumerate(self.ranks) if rank not in but]
        while any(p.poll() is None for p in others):
            assert time.monotonic() < deadline, f"still there after {within} s:\n{self.text()}"
            time.sleep(0.05)
        return [p.returncode for p in others]

    def text(self, rank=None) -> str:
        return "\n".join(f.read_text()[-4000:] for i, f in enumerate(self.files) if rank in (None, i))


def took(record_property, what, since) -> None:
    record_property("figures", f"{what}: all ranks ended after {time.monotonic() - since:.1f} s")
