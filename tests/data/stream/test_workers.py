"""Workers and the memory they share: order, recycling, and every way to die."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from textwrap import dedent

import numpy as np
import psutil
import pytest
import torch

from tlx.base.errors import TlxError, UserError
from tlx.data.stream import workers
from tlx.data.stream.slots import Slots
from tlx.data.stream.workers import InWorker, WorkerDied, at_work_on, in_order, in_slots


def fill(task, slots, slot):
    slots.array(slot, (task + 1, 4))[:] = task
    return task * 10


def lent(slots, workers, count):
    for made in in_slots(fill, range(count), slots, workers=workers):
        task = made.result // 10
        yield slots.lend(made.slot, (task + 1, 4))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order_through_few_slots(workers):
    slots = Slots(9, 4 * 40)
    for task, tensor in enumerate(lent(slots, workers, 40)):
        assert tensor.dtype == torch.uint8
        assert (tensor == task).all()
        del tensor
    gc.collect()
    assert slots.free == 9


def test_a_slot_comes_back_with_the_last_view_of_it():
    slots = Slots(2, 16)
    tensor = slots.lend(slots.take(), (4, 4))
    view = tensor.permute(1, 0)[1:2].unsqueeze(0)
    numpy = view.numpy()
    del tensor, view
    assert slots.free == 1
    del numpy
    assert slots.free == 2


def test_a_number_too_many_is_no_slot():
    slots = Slots(1, 16)
    slots.take()
    with pytest.raises(IndexError):
        slots.take()


def test_memory_that_is_not_there():
    with pytest.raises(UserError, match=r"1024\.00 GiB of memory .* \(4 times 262144\.0 MiB\)[\s\S]*data\.workers"):
        Slots(4, 1 << 38)
    lines = """
        import resource
        from tlx.data.stream.slots import Slots
        from tlx.base.errors import UserError
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            Slots(4, 1 << 20)
        except UserError as error:
            assert "4 MiB of memory for batches cannot be had" in str(error), error
            raise SystemExit(9)
    """
    assert subprocess.run([sys.executable, "-c", dedent(lines)], timeout=60).returncode == 9


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a small /dev/shm takes root")
def test_a_full_dev_shm_does_not_matter():
    lines = f"""
        import sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_workers import Slots, lent
        assert [int(t[0, 0]) for t in lent(Slots(9, 4 << 20), 2, 20)] == list(range(20))
        raise SystemExit(9)
    """
    shell = 'mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 8k /dev/zero >/dev/shm/full; exec "$0" -c "$1"'
    command = ["unshare", "-m", "sh", "-c", shell, sys.executable, dedent(lines)]
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("this container may not unshare its mounts")
    assert subprocess.run(command, timeout=60, stderr=subprocess.DEVNULL).returncode == 9


def crash(how):
    at_work_on(41)
    if how == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(3)
    if how == "error":
        raise UserError("no such thing", where="here", todo="that")
    if how == "odd":
        raise Odd(1, 2)
    return how


class Odd(Exception):
    def __init__(self, a, b):
        super().__init__("odd")


def test_a_worker_that_dies_says_how_and_where():
    for how, words in (("signal", r"signal 9 \(SIGKILL\)"), ("exit", "exit code 3")):
        with pytest.raises(WorkerDied, match=words) as caught:
            list(in_order(crash, ["fine", how, "fine", "fine"], workers=2))
        assert caught.value.sample == 41


def test_errors_come_as_they_are_with_their_traceback():
    with pytest.raises(UserError) as caught:
        list(in_order(crash, ["fine", "error"], workers=1))
    assert (caught.value.where, caught.value.todo) == ("here", "that")
    assert isinstance(caught.value.__cause__, InWorker)
    assert "in crash" in str(caught.value.__cause__)
    with pytest.raises(TlxError, match="Odd: odd"):
        list(in_order(crash, ["odd"], workers=1))


def test_large_tasks_and_results_do_not_block_each_other():
    tasks = [np.full(1 << 20, i, np.uint8) for i in range(8)]
    for i, result in enumerate(in_order(np.ndarray.copy, tasks, workers=2, prefetch=3)):
        assert (result == i).all()


def test_no_process_is_left_when_the_work_is_left(born):
    results = in_order(time.sleep, [0] + [30] * 10, workers=3)
    next(results)
    children = born()
    assert len(children) >= 3
    results.close()
    assert psutil.wait_procs(children, timeout=20)[1] == []  # not the sleep's 30


@pytest.mark.parametrize("end", ["KILL", "INT"])
def test_no_process_is_left_when_the_asking_one_ends(end):
    """Not even in the middle of a long task, with two crews of workers."""
    lines = """
        import signal, time
        from tlx.data.stream.workers import in_order
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        one, two = (in_order(time.sleep, [0] + [60] * 10, workers=2) for _ in range(2))
        next(one), next(two)
        print("ready", flush=True)
        time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", dedent(lines)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as asking:
        assert asking.stdout.readline() == b"ready\n"
        children = psutil.Process(asking.pid).children(recursive=True)
        assert len(children) == 4
        asking.send_signal(getattr(signal, f"SIG{end}"))
        assert psutil.wait_procs(children, timeout=20)[1] == []


def spawned():
    multiprocessing.set_start_method("spawn")
    slots = Slots(9, 4 * 40)
    assert [int(t[0, 0]) for t in lent(slots, 2, 12)] == list(range(12))
    with pytest.raises(WorkerDied) as caught:
        list(in_order(crash, ["exit"], workers=1))
    assert caught.value.sample == 41
    print("spawned", flush=True)


@pytest.mark.slow
def test_processes_that_are_not_forked():
    lines = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\nimport test_workers\n"
    lines += "if __name__ == '__main__': test_workers.spawned()"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=120)
    assert done.stdout == "spawned\n", done.stderr


def test_a_bystander_does_not_hold_workers_up(born):
    """A process that the program forks meanwhile keeps a copy of their pipes' ends."""
    results = in_order(abs, range(100), workers=3)
    next(results)
    bystander = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    bystander.start()
    children = [c for c in born() if c.pid != bystander.pid]
    results.close()
    alive = psutil.wait_procs(children, timeout=20)[1]  # the bystander sleeps for 60
    bystander.kill()
    bystander.join()
    assert alive == []


def test_a_request_to_stop_while_a_worker_starts_is_not_its_own(born, monkeypatch):
    settle = workers._settle

    def slowly():
        time.sleep(1)
        settle()

    def ask():
        while not born():
            time.sleep(0.01)
        worker = born()[0].pid
        for name in ("TERM", "USR1", "INT"):  # by another process: the training's own SIGTERM does end a worker
            subprocess.run(["kill", f"-{name}", str(worker)], check=True)

    monkeypatch.setattr(workers, "_settle", slowly)
    threading.Thread(target=ask).start()
    assert list(in_order(abs, range(4), workers=1)) == [0, 1, 2, 3]


def test_a_worker_killed_while_it_waits_accuses_nobody(born):
    results = in_order(at_work_on, range(100), workers=1)
    next(results)
    time.sleep(0.5)
    born()[-1].kill()
    with pytest.raises(WorkerDied) as caught:
        list(results)
    assert caught.value.sample is None


def test_slots_that_are_all_kept_are_an_error():
    slots = Slots(4, 160)
    with pytest.raises(IndexError):
        list(in_slots(fill, range(20), slots, workers=2))


def test_memory_stays_until_the_last_tensor_is_gone(monkeypatch):
    """Not unlocked under a batch that somebody still copies."""
    said = []

    class Runtime:
        def cudaHostRegister(self, *where):
            said.append("locked")
            return 0

        def cudaHostUnregister(self, *where):
            said.append("unlocked")

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("waited"))
    slots = Slots(2, 16)
    assert slots.pin()
    tensor = slots.lend(slots.take(), (4, 4))[1:]
    del slots
    gc.collect()
    assert said == ["locked"]
    del tensor
    gc.collect()
    assert said == ["locked", "waited", "unlocked"]
