"""A file or folder that is there as a whole or not at all: made beside, flushed, renamed."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tlx.base.errors import UserError
from tlx.base.files import is_left, scratch, why_not_writable


@contextmanager
def placed(out: Path) -> Iterator[Path]:
    """A folder beside `out`, in which the body makes what is then called `out`, under that name. The folder goes in any
    case, what else was made there with it, and so do those of processes that were killed.

    Raises:
        UserError: something has come to `out` meanwhile; the disk.
    """
    for left in out.parent.glob(f".{glob.escape(out.name)}.*-[0-9]*.tmp"):
        if is_left(left):
            shutil.rmtree(left, ignore_errors=True)
    with scratch(out) as work:
        work.mkdir()
        made = work / out.name
        try:
            yield work
            for path in (made, *made.rglob("*")):
                if path.is_file():
                    with path.open("rb") as whole:
                        os.fsync(whole.fileno())
            _refuse_existing(out)
            os.rename(made, out)
        except OSError as error:
            what = f"cannot be written: {error.strerror or error}"
            raise UserError(what, where=str(out), todo="make room, or another place") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)


def refuse_place(out: Path) -> None:
    """
    Raises:
        UserError: something lies there, or nothing can be written beside.
    """
    _refuse_existing(out)
    if (why := why_not_writable(out.absolute().parent)) is not None:
        what = f"nothing can be written there: {why}"
        raise UserError(what, where=str(out.absolute().parent), todo="make it, or name another place")


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise UserError("it is there already", where=str(out), todo="remove it, or name another one")
