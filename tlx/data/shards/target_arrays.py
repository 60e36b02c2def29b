"""The arrays of targets, ``targets/NAME.npy``: written beside the index, mapped and verified when it is opened."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tlx.base.errors import UserError
from tlx.base.files import HashedFile, scratch, sha256_of
from tlx.data.shards.index_file import damaged, npy
from tlx.data.shards.targets import LABEL, Target

if TYPE_CHECKING:
    from collections.abc import Iterator

_PART = 1 << 22  # bytes that are looked at together
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "class": np.dtype("<i4"),
    "labels": np.dtype("i1"),
    "number": np.dtype("<f4"),
}


def file_of(name: str) -> str:
    """The file of a target, from the folder of its index."""
    return f"targets/{name}.npy"


def shape_of(target: Target, samples: int) -> tuple[int, ...]:
    """Of its array."""
    if target.kind == "class":
        return (samples,)
    return (samples, len(target.classes) if target.kind == "labels" else target.width)


def empty_array(target: Target, samples: int) -> NDArray[Any]:
    """An array of missing values."""
    missing = np.nan if target.kind == "number" else -1
    return np.full(shape_of(target, samples), missing, _DTYPES[target.kind])


def most_bytes(target: Target, samples: int) -> int:
    """What its file has at most."""
    return len(npy(empty_array(target, 1))) + _DTYPES[target.kind].itemsize * int(np.prod(shape_of(target, samples)))


def map_array(path: Path, where: str, target: Target, samples: int, sha256: str | None) -> NDArray[Any]:
    """The array of a target, mapped and read-only; of this hash, unless it is known already.

    Raises:
        UserError: it is missing, or another one than the index says.
    """
    name, dtype, shape = file_of(target.name), _DTYPES[target.kind], shape_of(target, samples)
    try:
        with path.open("rb") as file:
            if sha256 is not None and sha256_of(file) != sha256:
                damaged(where, f"{name} is not the one that index.json was written for")
            file.seek(0)
            if np.lib.format.read_magic(file) != (1, 0):
                damaged(where, f"{name} holds something else")
            found = np.lib.format.read_array_header_1_0(file)
            start, length = file.tell(), os.fstat(file.fileno()).st_size
            if found != (shape, False, dtype) or length != start + dtype.itemsize * int(np.prod(shape)):
                damaged(where, f"{name} holds something else")
            if not samples:  # there is nothing that could be mapped
                return empty_array(target, 0)
            return np.asarray(np.memmap(file, dtype, "r", start, shape))
    except UserError:
        raise
    except Exception as error:  # numpy reads the header as Python's literals, which fail in many ways
        damaged(where, f"{name} cannot be read: {error}")


def verify_array(where: str, target: Target, array: NDArray[Any]) -> None:
    """
    Raises:
        UserError: a value is none of its kind.
    """
    rows = max(_PART // max(array[:1].nbytes, 1), 1)
    for start in range(0, len(array), rows):
        part = array[start : start + rows]
        if target.kind == "class":  # -1 becomes 0, what is below that is large
            wrong = int((part + np.int32(1)).view(np.uint32).max()) > len(target.classes)
        elif target.kind == "labels":
            wrong = int(part.min()) < -1 or int(part.max()) > 1
        else:
            wrong = bool(np.isinf(part).any())
        if wrong:
            damaged(where, f"{file_of(target.name)} holds values that no {target.kind} target has")


def target_entry(target: Target) -> dict[str, Any]:
    """What ``index.json`` and ``build.json`` say of a target."""
    said = {"width": target.width} if target.kind == "number" else {"classes": list(target.classes)}
    return {"name": target.name, "kind": target.kind, **said}


@contextmanager
def arrays_beside(
    folder: Path, arrays: Iterable[tuple[Target, NDArray[Any]]]
) -> Iterator[tuple[list[dict[str, Any]], Sequence[tuple[Path, Path]]]]:
    """Writes arrays beside; what is yielded is what ``index.json`` says of them, and which file takes which name."""
    arrays = tuple(arrays)
    if not arrays:
        yield [], ()
        return
    place = (folder / file_of(LABEL)).parent
    place.mkdir(exist_ok=True)
    try:
        with ExitStack() as stack:
            entries, moves = [], []
            for target, array in arrays:
                path = folder / file_of(target.name)
                beside = stack.enter_context(scratch(path))
                entries.append({**target_entry(target), "sha256": _write(beside, target, array)})
                moves.append((beside, path))
            yield entries, moves
    finally:
        with suppress(OSError):  # it holds something
            place.rmdir()


def _write(path: Path, target: Target, array: NDArray[Any]) -> str:
    with path.open("wb") as file:
        hashed = HashedFile(file)
        np.lib.format.write_array(
            hashed, np.ascontiguousarray(array, _DTYPES[target.kind]), version=(1, 0), allow_pickle=False
        )
        file.flush()
        os.fsync(file.fileno())
    return hashed.sha256


def remove_arrays(folder: Path, names: Collection[str]) -> None:
    """Removes those of targets that an index has no more."""
    for name in names:
        (folder / file_of(name)).unlink(missing_ok=True)
    with suppress(OSError):  # it was not there, or holds something
        if names:
            (folder / file_of(LABEL)).parent.rmdir()
