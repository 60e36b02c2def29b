"""Tables that `rows` reads pictures from: parquet files by pyarrow, data sets of Hugging Face by `datasets`.

No code of a data set is run, and nothing is unpickled; `datasets` reads no scripts since 4.0.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlx.base.errors import UserError, did_you_mean
from tlx.base.files import scratch
from tlx.data.build.sources import listed, size_of, split_of
from tlx.data.shards.passed_over import kind_of_name

HUB = "hf:"
_SPEC = re.compile(r"hf:(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[^:@]+))?(:(?P<config>[^:]+))?", re.ASCII)
_COMMIT = re.compile("[0-9a-f]{40}")
_ANSWER_S = 10.0
_BATCH = 1000  # rows of small columns
_PICTURES = 32  # pictures of a parquet file that are in memory at a time


def library(name: str, extra: str, where: str | None = None) -> Any:
    """A library that not everybody has, imported.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = f"{name.partition('.')[0]} reads this, and is not installed"
        raise UserError(missing, where=where, todo=f'pip install "tlx[{extra}]"') from error


def is_parquet(source: Path) -> bool:
    """Whether it is a parquet file, or a folder of such files, perhaps in folders called data or as splits; where there
    are folders of classes, such files are no pictures."""
    if not source.is_dir():
        return source.suffix.lower() == ".parquet"
    inside = _folders(source)
    if not all(split_of(p.name) or p.name == "data" for p in inside) or not _parquet_files(source):
        return False
    return not any(map(_folders, inside))


def is_saved(source: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote it."""
    names = {name for name in ("dataset_dict.json", "state.json", "dataset_info.json") if (source / name).is_file()}
    return "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= names


def version_of(files: Sequence[Path]) -> str:
    """A hash that is another one when a file is: by names, sizes and times."""
    seen = hashlib.sha256()
    for file in sorted(files):
        with suppress(OSError):  # reading it tells more
            seen.update(f"{file.name}\0{file.stat().st_size}\0{file.stat().st_mtime_ns}\n".encode(errors="replace"))
    return seen.hexdigest()


# Parquet


def _parquet_files(source: Path) -> list[Path]:
    if not source.is_dir():
        return [source]
    inside = [p for folder in (source, *_folders(source)) for p in listed(folder) if p.suffix.lower() == ".parquet"]
    return [p for p in inside if p.is_file() and not kind_of_name(p.name)]


def _folders(folder: Path) -> list[Path]:
    return [p for p in listed(folder) if p.is_dir() and not kind_of_name(p.name)]


def parquet_tables(source: Path) -> tuple[list[ParquetTable], str]:
    """A table for each file, and the version of all. Their names say the splits, or the folders that they lie in.

    Raises:
        UserError: a file that cannot be read, a name that is no split's beside those that are.
    """
    library("pyarrow.parquet", "parquet", str(source))
    files = _parquet_files(source)
    splits = {file: _split_of_file(file, source) for file in files}
    if source.is_dir() and any(splits.values()):
        odd = next((file for file in files if splits[file] is None), None)
        if odd is not None:
            near = did_you_mean(odd.stem, ("train", "val", "test"))
            raise UserError(
                f'"{odd.name}" beside files of splits is of none{near}', where=str(source), todo="rename it"
            )
    return [ParquetTable.open(file, splits[file] or "") for file in files], version_of(files)


def _split_of_file(file: Path, source: Path) -> str | None:
    if file == source:
        return None
    word = re.match(r"[^\W\d_]*", file.stem)
    return split_of(word[0] if word else "") or (split_of(file.parent.name) if file.parent != source else None)


@contextmanager
def _read_by_pyarrow(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, library("pyarrow", "parquet").ArrowException) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise UserError(f"this parquet file cannot be read: {line}", where=str(path), todo="get it again") from error


@dataclass
class ParquetTable:
    """Rows of one parquet file (a `tlx.data.build.rows.Table`)."""

    name: str
    split: str | None
    schema: Any
    path: Path
    groups: tuple[int, ...]

    @staticmethod
    def open(path: Path, split: str) -> ParquetTable:
        with _read_by_pyarrow(path), _opened(path) as file:
            about = file.metadata
            groups = tuple(about.row_group(i).num_rows for i in range(about.num_row_groups))
            return ParquetTable(str(path), split, file.schema_arrow, path, groups)

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        with _read_by_pyarrow(self.path), _opened(self.path) as file:
            yield from file.iter_batches(_BATCH, columns=list(columns), use_threads=False)

    def stored(self, column: str) -> Iterator[tuple[int, str | None]]:
        """The mean of each group of rows: what a picture itself takes is known when it is read."""
        with _read_by_pyarrow(self.path), _opened(self.path) as file:
            for number, rows in enumerate(self.groups):
                group = file.metadata.row_group(number)
                chunks = [group.column(i) for i in range(group.num_columns)]
                mine = [c for c in chunks if c.path_in_schema in (column, f"{column}.bytes")]
                yield from [(sum(c.total_uncompressed_size for c in mine) // max(rows, 1), None)] * rows

    def pictures(self, column: str) -> ParquetPictures:
        return ParquetPictures(self.path, column, self.groups)


def _opened(path: Path) -> Any:
    # in parts, as they are needed; the least that pyarrow reads is a page, at most a group of rows
    return library("pyarrow.parquet", "parquet").ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


@dataclass
class ParquetPictures:
    """Pictures of a parquet file. They are wanted in any order, and come only in the file's own: those that are wanted
    are unpacked into one file before.

    Attributes:
        groups: rows of each group of them.
        unpacked: that file; none before `unpack`.
        places: row -> (start, length) there; length -1 of a row that holds nothing.
    """

    path: Path
    column: str
    groups: tuple[int, ...]
    unpacked: Path | None = None
    rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    places: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64))

    @contextmanager
    def unpack(self, rows: Sequence[int], file: Path) -> Iterator[None]:
        """While it lasts, these rows' pictures can be had; it takes the disk that they need, beside `file`."""
        self.rows, at = np.unique(np.asarray(rows, np.int64)), 0
        self.places = np.full((len(self.rows), 2), -1, np.int64)
        with scratch(file) as self.unpacked:
            with self.unpacked.open("wb") as out:
                for i, data in enumerate(self._in_order()):
                    if data is not None:
                        self.places[i] = at, out.write(data)
                        at += len(data)
            try:
                yield
            finally:
                self.unpacked.unlink(missing_ok=True)

    def _in_order(self) -> Iterator[bytes | None]:
        first = 0
        with _read_by_pyarrow(self.path), _opened(self.path) as file:
            for number, count in enumerate(self.groups):
                if np.searchsorted(self.rows, first) < np.searchsorted(self.rows, first + count):
                    at = first
                    for batch in file.iter_batches(
                        _PICTURES, row_groups=[number], columns=[self.column], use_threads=False
                    ):
                        low, high = np.searchsorted(self.rows, (at, at + batch.num_rows))
                        for row in self.rows[low:high]:
                            yield _stored_bytes(batch.column(0)[int(row) - at].as_py())
                        at += batch.num_rows
                first += count

    def bytes_of(self, row: int) -> bytes | None:
        start, length = self.places[np.searchsorted(self.rows, row)].tolist()
        if length < 0 or self.unpacked is None:
            return None
        with self.unpacked.open("rb") as file:
            return os.pread(file.fileno(), length, start)


def _stored_bytes(value: Any) -> bytes | None:
    """Of a cell: bytes, or a struct with bytes. A path alone leads nowhere: anybody may have written it."""
    return value.get("bytes") if isinstance(value, dict) else value


# Hugging Face's


@dataclass
class SavedTable:
    """A split of a data set of `datasets` (a `tlx.data.build.rows.Table`).

    Attributes:
        caches: pictures that are stored as files lie below one of these folders.
    """

    name: str
    split: str | None
    schema: Any
    data: Any
    caches: tuple[str, ...] = ()

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        # as pyarrow's tables nothing is decoded
        yield from self.data.select_columns(list(columns)).with_format("arrow").iter(_BATCH)

    def stored(self, column: str) -> Iterator[tuple[int, str | None]]:
        compute = library("pyarrow.compute", "parquet")
        for batch in self.batches([column]):
            cells, paths = batch.column(0), [None] * batch.num_rows
            if hasattr(cells.type, "get_field_index"):
                if cells.type.get_field_index("path") >= 0:
                    paths = compute.struct_field(cells, "path").to_pylist()
                cells = compute.struct_field(cells, "bytes")
            for size, said in zip(compute.binary_length(cells).to_pylist(), paths, strict=True):
                path = self._file(said) if size is None else None
                yield (size or 0, None) if path is None else (size_of(path), path)

    def _file(self, path: str | None) -> str | None:
        """A picture's file; None where it lies elsewhere than where the library puts what it has fetched."""
        there = os.path.normpath(path or "")
        return there if any(there.startswith(f"{cache}{os.sep}") for cache in self.caches) else None

    def pictures(self, column: str) -> SavedPictures:
        return SavedPictures(self.data.select_columns([column]).with_format("arrow"))


@dataclass
class SavedPictures:
    """Pictures of a split, each from where it lies in the library's files."""

    data: Any

    def bytes_of(self, row: int) -> bytes | None:
        return _stored_bytes(self.data[row].column(0)[0].as_py())


def saved_tables(source: Path) -> tuple[list[SavedTable], str]:
    """The splits that `datasets.save_to_disk` wrote into a folder, and their version.

    Raises:
        UserError: `datasets` is not installed, or cannot read it.
    """
    datasets = library("datasets", "hf", str(source))
    try:
        found = datasets.load_from_disk(str(source))
    except Exception as error:  # whatever damaged files make it raise
        line = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise UserError(f"datasets cannot read this: {line}", where=str(source), todo="save it again") from error
    files = [p for p in source.rglob("*") if p.suffix in (".arrow", ".json")]
    return _tables(found, str(source)), version_of(files)


def _tables(found: Any, where: str, caches: tuple[str, ...] = ()) -> list[SavedTable]:
    if not isinstance(found, dict):
        return [SavedTable(where, "", found.features.arrow_schema, found)]
    return [
        SavedTable(f"{where} {name}", split_of(str(name)), data.features.arrow_schema, data, caches)
        for name, data in found.items()
    ]


def hub_tables(spec: str) -> tuple[list[SavedTable], str]:
    """The splits of ``hf:OWNER/NAME[@REVISION][:CONFIG]``, and the commit that they are of. Where no server answers,
    those that the library has in its cache.

    Raises:
        UserError: no such repository, no access, no network and nothing in the cache, or nothing that can be read.
    """
    from tlx.base.hub import hub_error, line_of

    datasets = library("datasets", "hf", spec)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    said = _parts(spec)
    name, commit, is_online = said["name"], hub_commit(spec), _answers()
    if os.path.exists(name):  # which the library would take in its place
        raise UserError(f"{name} is also a folder here", where=spec, todo="run this in another folder")
    try:
        with _without_network(datasets, not is_online):
            builder = datasets.load_dataset_builder(name, said["config"], revision=commit)
            builder.download_and_prepare()
            found = builder.as_dataset()
    except Exception as error:
        if not is_online or commit is None:
            raise _no_server(spec) from error
        if type(error).__module__.startswith("huggingface_hub"):
            raise hub_error(error, spec) from error
        raise UserError(f"datasets cannot load it: {line_of(error)[:300]}", where=spec) from error
    if builder.hash != (commit or said["revision"] or builder.hash):  # of its cache, whatever was asked for
        raise _no_server(spec)
    from huggingface_hub import constants

    caches = (str(constants.HF_HUB_CACHE), str(datasets.config.HF_DATASETS_CACHE))
    return _tables(found, spec, caches), str(builder.hash)


def hub_commit(spec: str) -> str | None:
    """The commit that ``hf:...`` means now; None where no server answers.

    Raises:
        UserError: no such repository or revision, or no access.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    from tlx.base.hub import hub_error

    said = _parts(spec)
    if _COMMIT.fullmatch(said["revision"] or ""):
        return str(said["revision"])
    if not _answers():
        return None
    try:
        commit: str | None = HfApi().dataset_info(said["name"], revision=said["revision"], timeout=_ANSWER_S).sha
        return commit
    except HfHubHTTPError as error:
        raise hub_error(error, spec) from error
    except Exception:  # a proxy that refuses, a firewall that answers in place of the server
        return None


def _answers() -> bool:
    from huggingface_hub import constants

    from tlx.base.reachable import reachable

    return not constants.HF_HUB_OFFLINE and reachable(constants.ENDPOINT)


def _parts(spec: str) -> dict[str, Any]:
    said = _SPEC.fullmatch(spec)
    if said is None:
        example = "hf:OWNER/NAME, perhaps with @REVISION and :CONFIG, such as hf:ethz/food101"
        raise UserError("this names no data set of the hub", where=spec, todo=example)
    return said.groupdict()


def _no_server(spec: str) -> UserError:
    from huggingface_hub import constants

    from tlx.base.location import without_credentials

    why = "HF_HUB_OFFLINE forbids to ask a server" if constants.HF_HUB_OFFLINE else ""
    why = why or f"{without_credentials(constants.ENDPOINT)} does not answer"
    todo = "run it once where there is a network, with the same HF_HOME"
    return UserError(f"not on this machine, and {why}", where=spec, todo=todo)


@contextmanager
def _without_network(datasets: Any, wanted: bool) -> Iterator[None]:
    """The library asks for minutes where nobody answers, unless it is told not to."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
