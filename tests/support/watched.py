"""A rank that does nothing but beat under a watch: ``python tests/support/watched.py HOW RANK PORT FOLDER``."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from tlx.base.errors import UserError
from tlx.ranks.watch import Watch
from tlx.runs.run_folder import RunFolder


def main(how: str, rank: int, port: int, folder: Path) -> None:
    if how == "before-exit":
        watch = Watch(RunFolder(folder), patience_s=6)
        watch.before_exit = lambda: (time.sleep(1), (folder / "checkpoint").write_text("written"))[0]
        watch.start(None, 0, 1)
        watch.beat("step", 1)
        time.sleep(3600)
    if how == "lost":
        socket.gethostname = lambda: f"machine-{rank}"
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timeout=timedelta(seconds=60))
    watch = Watch(RunFolder(folder), patience_s=600)
    watch.start(store, rank, 2, serves=rank == 0)
    watch.beat("step", 7)
    time.sleep(2)
    watch.beat("batch", 8)
    if how == "lost":
        time.sleep(2)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3600)
    if how == "alike" and rank == 0:
        watch.beat("finishing")
        time.sleep(40)
    error = watch.explained(UserError(f"a mistake, on rank {rank}"))
    watch.say("user-error", str(error))
    print(error, flush=True)
    watch.close()
    os._exit(2)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
