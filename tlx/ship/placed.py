"""A file or folder that is there as a whole or not at all: made beside, flushed, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tlx.base.errors import UserError
from tlx.base.files import scratch


@contextmanager
def placed(out: Path) -> Iterator[Path]:
    """A folder beside `out`, in which the body makes what is then called `out`, under that name. The folder goes in any
    case; what else was made there goes with it.

    Raises:
        UserError: something has come to `out` meanwhile.
    """
    with scratch(out) as work:
        work.mkdir()
        made = work / out.name
        try:
            yield work
            for path in (made, *made.rglob("*")):
                if path.is_file():
                    with path.open("rb") as written:
                        os.fsync(written.fileno())
            _refuse_existing(out)
            os.rename(made, out)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def refuse_place(out: Path) -> None:
    """
    Raises:
        UserError: something lies there, or nothing can be written beside.
    """
    _refuse_existing(out)
    if not os.access(out.absolute().parent, os.W_OK):
        raise UserError("nothing can be written there", where=str(out.absolute().parent))


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise UserError("it is there already", where=str(out), todo="remove it, or name another one")
