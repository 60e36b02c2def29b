"""Files of a report: each whole, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tlx.base.errors import UserError
from tlx.base.files import write_whole


def write(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Files by their names in a folder; their paths.

    Raises:
        UserError: one cannot be written.
    """
    try:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(folder / name, content)
    except OSError as error:
        raise UserError(
            f"cannot be written: {error.strerror or error}",
            where=str(error.filename or folder),
            todo="report on a copy of the run, or make its folder writable; the comparison goes where --out says",
        ) from error
    return [folder / name for name in files]
