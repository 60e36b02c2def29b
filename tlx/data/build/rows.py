"""Pictures in the rows of tables, as a `Source`: of parquet files and of Hugging Face's data sets (`row_tables`).

A column holds each picture as it was stored (bytes, or Hugging Face's struct of bytes and path), others what is known
of it. Here only those others are read, in batches; pictures are taken when they are written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NoReturn, Protocol

from tlx.base.errors import UserError, did_you_mean
from tlx.data.build.row_tables import library
from tlx.data.build.sources import USUAL, Picture, Reading, Source
from tlx.data.shards.class_names import in_order
from tlx.data.shards.passed_over import COLUMN, NO_LABELS, OTHER_SPLIT, PassedOver
from tlx.data.shards.tables import find_column, split_in, targets_of, usual_column
from tlx.data.shards.target_values import TargetSpec, Written, as_json, from_cells, from_json


class Table(Protocol):
    """Rows of one split: a parquet file, or a split of a data set.

    Attributes:
        name: what messages call it.
        split: train, val or test; None where it is named otherwise; "" where nothing is said of splits.
        schema: pyarrow's, with what Hugging Face notes of columns.
    """

    name: str
    split: str | None
    schema: Any

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        """These columns of all rows, in order, as pyarrow's batches or tables."""

    def stored(self, column: str) -> Iterator[tuple[int, str | None]]:
        """Of each row's picture its size, perhaps about, and its file where it lies in one."""

    def pictures(self, column: str) -> Any:
        """What gives the bytes of a row's picture, by ``bytes_of(row)`` (see `tlx.data.build.content.read`)."""


@dataclass(frozen=True)
class _Columns:
    """Names of the columns that are read; `label` and `split` are None where there is none.

    Attributes:
        names: of the classes that numbers stand for, by column.
    """

    picture: str
    label: str | None
    split: str | None
    names: Mapping[str, tuple[str, ...]]

    def read(self, reading: Reading) -> list[str]:
        found = [self.label, self.split, *(c for spec in reading.targets for c in spec.sources)]
        return list(dict.fromkeys(c for c in found if c is not None))


@dataclass(frozen=True)
class _Row:
    table: Table
    place: int
    split: str
    label: str | int | None
    targets: tuple[Written, ...]
    size: int
    path: str | None


def read_tables(tables: Sequence[Table], reading: Reading, *, where: str, version: str) -> Source:
    """The pictures of tables that have the same columns.

    Args:
        version: of what is in them (see `Source`).

    Raises:
        UserError: no training split, columns that are not there or hold something else, rows without a label ...
    """
    passed = [PassedOver(OTHER_SPLIT, table.name) for table in tables if table.split is None]
    tables = [table for table in tables if table.split is not None]
    if not any(table.split in ("", "train") for table in tables):
        others = ", ".join([table.name for table in tables] + [p.name for p in passed])
        raise UserError(f"there is no split train, but {others or 'nothing'}", where=where, todo="call one of them so")
    columns = _columns(tables, reading, where)
    read, missing = columns.read(reading), _missing(columns, tables[0].schema)
    passed += [PassedOver(COLUMN, name) for name in tables[0].schema.names if name not in (*read, columns.picture)]
    rows: list[_Row] = []
    for table in tables:
        own = list(_rows(table, columns, reading))
        if table.split not in ("", "train") and columns.label and all(row.label in missing for row in own):
            passed.append(PassedOver(NO_LABELS, table.name))
        else:
            rows += own
    reading = replace(reading, target_order={**_orders(columns, reading), **reading.target_order})
    targets = targets_of([row.targets for row in rows], reading, where=where)
    known = columns.names.get(columns.label or "")
    classes = known or in_order({str(row.label) for row in rows if row.label is not None}, reading.order)
    place: dict[str | int | None, int] = {i if known else name: i for i, name in enumerate(classes)}
    splits: dict[str, list[Picture]] = {}
    for row in rows:
        label = _place_of(row, place, columns.label) if columns.label else -1
        said = as_json(reading.targets, row.targets) if targets else ""
        stored = (row.table.name, row.place) if row.path is None else None
        one = Picture(_name(row.table, row.place), label, row.path, stored, row.size, said)
        splits.setdefault(row.split, []).append(one)
    items = {table.name: table.pictures(columns.picture) for table in tables}
    return Source(classes, {s: tuple(p) for s, p in splits.items()}, items, tuple(passed), targets, version)


def _missing(columns: _Columns, schema: Any) -> tuple[str | int | None, ...]:
    """What a split without labels has in their place; numbers without names are text by then."""
    types, column = library("pyarrow", "parquet").types, columns.label
    is_number = column is not None and types.is_integer(schema.field(column).type)
    return (None, -1, *(["-1"] if is_number else []))


def _name(table: Table, row: int) -> str:
    return f"{table.name} row {row}"


def _rows(table: Table, columns: _Columns, reading: Reading) -> Iterator[_Row]:
    stored, place = table.stored(columns.picture), 0
    for batch in table.batches(columns.read(reading)):
        values = {name: batch.column(name).to_pylist() for name in columns.read(reading)}
        for i, (size, path) in enumerate(islice(stored, batch.num_rows)):
            cells = {name: column[i] for name, column in values.items()}
            where = _name(table, place)
            split = table.split or ("train" if columns.split is None else split_in(str(cells[columns.split]), where))
            label = None if columns.label is None else cells[columns.label]
            if columns.label not in columns.names and label is not None:
                label = sys.intern(str(label))
            targets = tuple(_target(spec, cells, columns, reading, where) for spec in reading.targets)
            yield _Row(table, place, split, label, targets, size, path)
            place += 1


def _target(spec: TargetSpec, cells: Mapping[str, Any], columns: _Columns, reading: Reading, where: str) -> Written:
    values = [_named(cells[name], columns.names.get(name)) for name in spec.sources]
    try:
        if spec.flags or all(isinstance(value, str) for value in values):
            return from_cells(spec, ["" if v is None else str(v).strip() for v in values], reading.label_separator)
        return from_json(spec, values)
    except ValueError as error:
        raise UserError(f"target {spec.name}: {error}", where=where) from None


def _named(value: Any, names: Sequence[str] | None) -> Any:
    """The names that numbers of classes stand for; a missing one is -1 there."""
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    if names is None or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None


def _orders(columns: _Columns, reading: Reading) -> dict[str, tuple[str, ...]]:
    return {s.name: columns.names[s.sources[0]] for s in reading.targets if s.sources[0] in columns.names}


def _place_of(row: _Row, place: Mapping[str | int | None, int], column: str) -> int:
    """
    Raises:
        UserError: there is no label, or none of the classes.
    """
    if row.label in place:
        return place[row.label]
    what = "there is no label" if row.label is None else f"the label {row.label} is none of the {len(place)} classes"
    todo = f'give it one in the column "{column}", or leave the row out'
    raise UserError(what, where=_name(row.table, row.place), todo=todo)


# Columns


def _columns(tables: Sequence[Table], reading: Reading, where: str) -> _Columns:
    schema = tables[0].schema
    names = _class_names(schema)
    read = _Columns(
        _picture_column(schema, reading, where),
        _label_column(schema, names, reading, where) if reading.label_column else None,
        _split_column(schema, tables, reading, where),
        names,
    )
    for spec in reading.targets:
        for column in spec.sources:
            if column not in schema.names:
                _no_column(schema, column, f"--target {spec.name}:{spec.kind}=COLUMN", where)
    if read.label is None and not reading.targets:
        raise UserError("there is neither a class nor a target", where=where, todo="--target NAME")
    for table in tables[1:]:
        for column in (read.picture, *read.read(reading)):
            if column not in table.schema.names or table.schema.field(column).type != schema.field(column).type:
                raise UserError(f'the column "{column}" is another one than in {tables[0].name}', where=table.name)
            if _class_names(table.schema).get(column) != names.get(column):
                raise UserError(f'"{column}" has other classes than in {tables[0].name}', where=table.name)
    return read


def _class_names(schema: Any) -> dict[str, tuple[str, ...]]:
    """The names of classes that Hugging Face notes of columns of numbers, or of lists of these."""
    found = {}
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        for name, kind in features.items():
            inner = kind.get("feature", kind) if isinstance(kind, dict) else {}
            if isinstance(inner, dict) and inner.get("_type") == "ClassLabel" and isinstance(inner.get("names"), list):
                found[str(name)] = tuple(map(str, inner["names"]))
    except (ValueError, KeyError, TypeError, AttributeError):  # written by somebody else
        return {}
    return found


def _picture_column(schema: Any, reading: Reading, where: str) -> str:
    """What was said; else the only column that holds bytes."""
    able = [str(field.name) for field in schema if _holds_bytes(field.type)]
    is_default = reading.path_column == USUAL.path_column
    if is_default and len(able) == 1:
        return able[0]
    todo = f"--path-column {able[0] if len(able) == 1 else usual_column(able, 'path')}"
    said = find_column(schema.names, reading.path_column)
    if said is None and not is_default:
        _no_column(schema, reading.path_column, todo, where)
    if said is None or (is_default and schema.names[said] not in able):
        holding = f"several columns hold bytes: {', '.join(able)}" if able else "no column holds bytes of pictures"
        raise UserError(f"{holding}; the columns are {_listed(schema)}", where=where, todo=todo)
    if schema.names[said] not in able:
        kind = schema.field(said).type
        raise UserError(f'the column "{schema.names[said]}" holds no pictures, but {kind}', where=where, todo=todo)
    return str(schema.names[said])


def _holds_bytes(kind: Any) -> bool:
    types = library("pyarrow", "parquet").types
    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or kind == "binary_view")


def _label_column(schema: Any, names: Mapping[str, Sequence[str]], reading: Reading, where: str) -> str:
    """What was said; else the only one whose classes are named."""
    said = find_column(schema.names, reading.label_column)
    if said is None:
        listed = [name for name in names if not library("pyarrow", "parquet").types.is_nested(schema.field(name).type)]
        if reading.label_column != USUAL.label_column or len(listed) != 1:
            guess = next(iter(listed), usual_column(schema.names, "label"))
            _no_column(schema, reading.label_column, f"--label-column {guess}; '' where there is no class", where)
        return listed[0]
    types, kind = library("pyarrow", "parquet").types, schema.field(said).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind) or kind == "string_view"):
        raise UserError(
            f'the column "{schema.names[said]}" holds {kind}, and no class',
            where=where,
            todo="classes are whole numbers or text; --label-column NAME, or --label-column '' and --target",
        )
    return str(schema.names[said])


def _split_column(schema: Any, tables: Sequence[Table], reading: Reading, where: str) -> str | None:
    said = find_column(schema.names, reading.split_column) if reading.split_column else None
    if said is None:
        if reading.split_column not in ("", USUAL.split_column):
            _no_column(schema, reading.split_column, "--split-column NAME", where)
        return None
    return str(schema.names[said]) if all(table.split == "" for table in tables) else None


def _no_column(schema: Any, name: str, todo: str, where: str) -> NoReturn:
    near = did_you_mean(name, schema.names)
    near = near if "did you mean" in near else ""
    raise UserError(
        f'there is no column "{name}"{near or ";"} the columns are {_listed(schema)}', where=where, todo=todo
    )


def _listed(schema: Any) -> str:
    return ", ".join(f"{field.name} ({str(field.type)[:40]})" for field in schema)
