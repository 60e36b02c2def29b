"""Files of vectors with the names and labels of their pictures: written from parts, read as a whole.

===========  =====================================================================================================
.parquet     columns file, label, error, vector (a list of fixed size); the schema's metadata `tlx` says what of
.npy         the vectors [n, width], to be mapped into memory; names and labels in FILE.npy.rows.jsonl, a row a line
.npz         arrays vectors, file, label, error
.csv         columns file, label, error, v0, v1 ...
===========  =====================================================================================================

The vector of a picture that could not be read is NaN. A label or an error that there is not is empty ("" in .npz).
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tlx.base.errors import UserError
from tlx.base.files import write_whole
from tlx.base.parsing import from_json
from tlx.use.row_text import RowText, format_of, storable

FORMATS = ("parquet", "npy", "npz", "csv")
Row = Mapping[str, str | None]
"""Of a picture: `file`, `label`, `error`."""

_NAMES = ("file", "label", "error")


def rows_file(out: Path) -> Path:
    """Names and labels of a .npy file."""
    return out.with_name(f"{out.name}.rows.jsonl")


def part_of(rows: Sequence[Row], vectors: NDArray[Any]) -> bytes:
    """A part, [n, width] and n rows."""
    said = json.dumps([[row[name] for name in _NAMES] for row in rows])
    return bytes(save({"vectors": np.ascontiguousarray(vectors)}, metadata={"rows": said}))


@dataclass(frozen=True)
class VectorFile:
    """A file that is joined of parts.

    Attributes:
        about: where its vectors come from.
    """

    out: Path
    width: int
    dtype: np.dtype[Any]
    about: Mapping[str, Any]

    def join(self, parts: Sequence[Path], file: IO[bytes]) -> None:
        """Of .npz all rows are in memory; of the others a part at a time."""
        write = {"parquet": self._parquet, "npy": self._npy, "npz": self._npz, "csv": self._csv}
        write[format_of(self.out, FORMATS)](parts, file)

    def _parquet(self, parts: Sequence[Path], file: IO[bytes]) -> None:
        import pyarrow
        from pyarrow import parquet

        number = pyarrow.from_numpy_dtype(self.dtype)
        kinds = [*((name, pyarrow.string()) for name in _NAMES), ("vector", pyarrow.list_(number, self.width))]
        schema = pyarrow.schema(kinds, metadata={"tlx": json.dumps(dict(self.about))})
        with parquet.ParquetWriter(file, schema) as writer:
            for rows, vectors in map(_read_part, parts):
                texts = [pyarrow.array([storable(row[name]) for row in rows], pyarrow.string()) for name in _NAMES]
                flat = pyarrow.array(vectors.reshape(-1), number)
                lists = pyarrow.FixedSizeListArray.from_arrays(flat, self.width)
                writer.write_table(pyarrow.Table.from_arrays([*texts, lists], schema=schema))

    def _npy(self, parts: Sequence[Path], file: IO[bytes]) -> None:
        rows = rows_file(self.out)
        write_whole(rows, "".join(json.dumps(row) + "\n" for part in parts for row in _read_part(part)[0]))
        self._array(parts, file)

    def _npz(self, parts: Sequence[Path], file: IO[bytes]) -> None:
        rows = [row for part in parts for row in _read_part(part)[0]]
        with zipfile.ZipFile(file, "w") as archive:  # as numpy.savez, a part at a time, and always the same bytes
            with archive.open(zipfile.ZipInfo("vectors.npy"), "w", force_zip64=True) as member:
                self._array(parts, member)
            for name in _NAMES:
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    texts = np.array([row[name] or "" for row in rows], dtype=np.str_)
                    np.lib.format.write_array(member, texts, allow_pickle=False)

    def _array(self, parts: Sequence[Path], file: IO[bytes]) -> None:
        count = sum(len(_read_part(part)[0]) for part in parts)
        said = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(file, {**said, "shape": (count, self.width)})
        for part in parts:
            file.write(_read_part(part)[1].tobytes())

    def _csv(self, parts: Sequence[Path], file: IO[bytes]) -> None:
        names = [f"v{number}" for number in range(self.width)]
        text = RowText("csv", dict.fromkeys([*_NAMES, *names], ""))
        file.write(text.header.encode())
        for rows, vectors in map(_read_part, parts):
            numbers = (dict(zip(names, (f"{value:.9g}" for value in row), strict=True)) for row in vectors.tolist())
            lines = [{**row, **values} for row, values in zip(rows, numbers, strict=True)]
            file.write(text.text(lines).encode("utf-8", "surrogateescape"))


def _read_part(part: Path) -> tuple[list[dict[str, str | None]], NDArray[Any]]:
    """
    Raises:
        UserError: it is damaged.
    """
    try:
        with safe_open(part, framework="np") as opened:
            rows = from_json(opened.metadata()["rows"])
            return [dict(zip(_NAMES, row, strict=True)) for row in rows], opened.get_tensor("vectors")
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError("it is damaged", where=str(part), todo="remove it, and start again") from error


@dataclass(frozen=True)
class Embeddings:
    """What such a file holds.

    Attributes:
        files, labels: of each picture; a label that is not known is None.
        vectors: [n, width]; of a picture that could not be read NaN.
        about: where the vectors come from, as far as the file says it.
    """

    name: str
    files: Sequence[str]
    labels: Sequence[str | None]
    vectors: NDArray[Any]
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> Embeddings:
        """
        Raises:
            UserError: it cannot be read, or is none of these.
        """
        kind = format_of(file, FORMATS)
        read = {"parquet": _of_parquet, "npy": _of_npy, "npz": _of_npz, "csv": _of_csv}[kind]
        try:
            found = read(file)
        except OSError as error:
            raise UserError(f"it cannot be read: {error.strerror or error}", where=str(file)) from error
        except (ValueError, KeyError, TypeError, IndexError, zipfile.BadZipFile) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UserError(f"it is no file of tlx embed: {why}", where=str(file)) from error
        if found.vectors.ndim != 2 or len(found.vectors) != len(found.files) or found.vectors.dtype.kind != "f":
            raise UserError("its names and vectors are not of one number of pictures", where=str(file))
        return found


def _of_parquet(file: Path) -> Embeddings:
    from pyarrow import parquet

    table = parquet.read_table(str(file))
    vectors = table.column("vector").combine_chunks()
    values = vectors.flatten().to_numpy(zero_copy_only=False).reshape(-1, table.schema.field("vector").type.list_size)
    about = from_json((table.schema.metadata or {}).get(b"tlx", b"{}"))
    labels = table.column("label").to_pylist()
    return Embeddings(str(file), table.column("file").to_pylist(), labels, values, about)


def _of_npy(file: Path) -> Embeddings:
    vectors = np.load(file, mmap_mode="r", allow_pickle=False)
    rows = [from_json(line) for line in rows_file(file).read_bytes().splitlines()]
    return Embeddings(str(file), [row["file"] for row in rows], [row["label"] for row in rows], vectors)


def _of_npz(file: Path) -> Embeddings:
    with np.load(file, allow_pickle=False) as held:
        labels = [label or None for label in held["label"].tolist()]
        return Embeddings(str(file), held["file"].tolist(), labels, held["vectors"])


def _of_csv(file: Path) -> Embeddings:
    import csv

    files, labels, vectors = list[str](), list[str | None](), list[NDArray[Any]]()
    with file.open(newline="", encoding="utf-8", errors="surrogateescape") as text:
        for row in _checked(csv.reader(text)):
            files.append(row[0])
            labels.append(row[1] or None)
            vectors.append(np.array(row[3:], np.float32))
    return Embeddings(str(file), files, labels, np.stack(vectors))


def _checked(rows: Iterator[list[str]]) -> Iterator[list[str]]:
    header = next(rows)
    if header[:3] != list(_NAMES):
        raise ValueError(f"its columns are {', '.join(header[:4])}")
    return rows
