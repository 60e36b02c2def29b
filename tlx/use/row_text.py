"""Rows of predictions as text: CSV with a fixed set of columns, JSON lines; parquet by pyarrow."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args

from tlx.base.errors import UserError
from tlx.base.files import why_not_writable

Format = Literal["csv", "jsonl", "parquet"]


@contextmanager
def written(out: Path) -> Iterator[None]:
    """
    Raises:
        UserError: for an error of the disk, so that all ranks are told.
    """
    try:
        yield
    except OSError as error:
        what = f"cannot be written: {error.strerror or error}"
        raise UserError(what, where=str(error.filename or out), todo="make room, or another place") from error


def format_of(out: Path, among: Sequence[str] = get_args(Format)) -> str:
    """By the file's name, one of several.

    Raises:
        UserError: it ends in something else; pyarrow is missing.
    """
    ending = out.suffix.lower().removeprefix(".")
    if ending not in among:
        *first, last = (f".{one}" for one in among)
        todo = f"end it in {', '.join(first)} or {last}"
        raise UserError(f'"{out.suffix}" names no format', where=str(out), todo=todo)
    if ending == "parquet" and importlib.util.find_spec("pyarrow") is None:
        todo = 'pip install "tlx[parquet]"; or .csv or .jsonl, which need nothing'
        raise UserError("parquet is written by pyarrow, which is not installed", where=str(out), todo=todo)
    return ending


def refuse_output(out: Path | None, *, goes_on: bool = False, among: Sequence[str] = get_args(Format)) -> None:
    """What writing would find out after all the work.

    Args:
        goes_on: an earlier command has begun it.

    Raises:
        UserError: its name tells no format; it is there already; its folder is not, or cannot be written.
    """
    if out is None:
        return
    format_of(out, among)
    if not out.absolute().parent.exists():
        raise UserError("there is no such folder", where=str(out.parent), todo="make it, or another --out")
    if out.exists() and not goes_on:
        raise UserError("it is there already", where=str(out), todo="remove it, or name another one")
    if why := why_not_writable(out.absolute().parent):
        raise UserError(f"cannot be written: {why}", where=str(out.parent), todo="another --out")


@dataclass(frozen=True)
class RowText:
    """How rows are written.

    Attributes:
        example: a row, with every key that rows may have; its values have their types.
    """

    format: str
    example: Mapping[str, Any]

    @property
    def columns(self) -> list[str]:
        """Of CSV and parquet."""
        return list(flat(self.example))

    @property
    def header(self) -> str:
        return self._csv([self.columns]) if self.format == "csv" else ""

    def text(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """Lines, each with its end. Parts of a parquet file are JSON lines of its columns."""
        if self.format == "csv":
            columns = self.columns
            return self._csv([flat_row.get(name, "") for name in columns] for flat_row in map(flat, rows))
        return "".join(_json(flat(row) if self.format == "parquet" else row) + "\n" for row in rows)

    def join(self, parts: Iterable[Path], out: IO[bytes]) -> None:
        """One file of those that hold texts, in their order; a part at a time is in memory."""
        if self.format == "parquet":
            self._join_parquet(parts, out)
            return
        out.write(self.header.encode("utf-8", "surrogateescape"))
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, out)

    def _join_parquet(self, parts: Iterable[Path], out: IO[bytes]) -> None:
        import pyarrow
        from pyarrow import parquet

        kinds = {float: pyarrow.float64(), int: pyarrow.int64()}
        schema = pyarrow.schema([(n, kinds.get(type(v), pyarrow.string())) for n, v in flat(self.example).items()])
        with parquet.ParquetWriter(out, schema) as writer:
            for part in parts:
                said = map(json.loads, part.read_bytes().splitlines())
                rows = [{name: storable(of) for name, of in row.items()} for row in said]
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))

    @staticmethod
    def _csv(rows: Iterable[Sequence[Any]]) -> str:
        text = io.StringIO()
        plain = csv.writer(text, lineterminator="\n")
        quoting = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
        for row in rows:  # of ends of lines, csv before Python 3.13 quotes its own alone
            has_return = any(isinstance(cell, str) and "\r" in cell for cell in row)
            (quoting if has_return else plain).writerow(row)
        return text.getvalue()


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A value per column: of a mapping ``NAME/KEY``, of the further ones of a ranking ``label_2``, ``label_3`` ...;
    names in a list are joined by semicolons."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{key}": of for key, of in value.items()}
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            stem = name.removesuffix("top")  # the first of them is the row's own
            found |= {f"{stem}{key}_{i}": of for i, one in enumerate(value[1:], 2) for key, of in one.items()}
        elif isinstance(value, list):
            found[name] = ";".join(map(str, value))
        else:
            found[name] = value
    return found


def storable(value: Any) -> Any:
    """As parquet's text can hold it: bytes of a file's name that are no UTF-8 as JSON escapes them."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _json(row: Mapping[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # the bytes of a file's name that are no UTF-8
        return json.dumps(row)
    return text
