"""Locks on files: with the process that holds them, on the file that has the name."""

from __future__ import annotations

import errno
import fcntl
import os

import pytest

from tlx.base import locks
from tlx.base.locks import FileLock, acquire_within, holder_of, is_held


def test_who_holds_a_lock_is_told(tmp_path):
    lock = FileLock.acquire(tmp_path / "a")
    lock.sign()
    assert is_held(tmp_path / "a")
    assert holder_of(tmp_path / "a").startswith(f"process {os.getpid()} on {os.uname().nodename} since ")
    with pytest.raises(BlockingIOError):
        FileLock.acquire(tmp_path / "a")
    lock.release()
    lock.release()  # once is enough, and twice does no harm
    assert is_held(tmp_path / "a") is False
    assert holder_of(tmp_path / "nothing") == "unknown"


def test_a_lock_file_that_is_renamed_away_is_none_of_its_name(tmp_path):
    lock = FileLock.acquire(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert not lock.is_current
    other = acquire_within(tmp_path / "a", 0)
    assert other.is_current
    assert acquire_within(tmp_path / "a", 0) is None
    other.release()
    lock.release()


@pytest.mark.parametrize("in_forks", [False, True])
def test_a_forked_process_keeps_a_lock_only_where_it_is_to(tmp_path, in_forks):
    lock = FileLock.acquire(tmp_path / "a", in_forks=in_forks)
    to_child, from_parent = os.pipe()
    to_parent, from_child = os.pipe()
    child = os.fork()
    if not child:
        lock.release()  # as the end of a with block that the fork has come along with: the parent's lock stays
        os.close(from_parent)
        os.write(from_child, b"x")
        os.read(to_child, 1)
        os._exit(0)
    os.read(to_parent, 1)
    assert is_held(tmp_path / "a")
    with locks._forking:  # as if the parent were killed: its file is closed, and nothing is unlocked
        del locks._open[lock.handle]
    os.close(lock.handle)
    assert is_held(tmp_path / "a") is in_forks
    os.close(from_parent)
    os.waitpid(child, 0)
    for end in (to_child, to_parent, from_child):
        os.close(end)
    assert not is_held(tmp_path / "a")


def test_where_the_file_system_refuses_it(tmp_path, monkeypatch):
    def none(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    lock = acquire_within(tmp_path / "a", 0)
    assert lock.refused.errno == errno.ENOLCK
    assert is_held(tmp_path / "a") is None
    with pytest.raises(OSError, match="No locks"), locks.locked(tmp_path / "a"):
        pass
    with locks.locked_folder(tmp_path, "taken", todo=""):
        pass
    lock.release()
