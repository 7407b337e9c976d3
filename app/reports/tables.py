"""Tables of any size as CSV, JSON lines or Parquet, a page at a time."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec
from msgspec import Raw, Struct

from app.core import usd
from app.reports.money import nanos

Kind = Literal["text", "integer", "usd", "boolean", "time", "day"]
Format = Literal["csv", "jsonl", "parquet"]
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class PyarrowMissing(Exception):
    """Parquet needs the extra `lake`: pip install 'llm-gateway[lake]'."""


class Column(Struct, frozen=True):
    """A column of a table. `usd` are dollars with at most nine decimals, `time` is UTC with microseconds."""

    name: str
    kind: Kind = "text"


class Table(Struct, frozen=True):
    """Pages of rows, in the columns' order. A row's values are None, str, int, bool, Decimal, datetime or date.

    A table of whole JSON documents has one column: as JSON lines its values are written as they stand.
    """

    columns: tuple[Column, ...]
    pages: AsyncIterator[Sequence[Sequence[Any]]]
    documents: bool = False


async def write(table: Table, format: Format, out: BinaryIO) -> int:
    """Writes the table; returns how many rows. Raises `PyarrowMissing`, OSError, and what reading its pages raises."""
    if format == "parquet":
        return await _write_parquet(table, out)
    encode = _csv_page if format == "csv" else _document_page if table.documents else _jsonl_page
    if format == "csv":
        out.write(_csv_lines([[column.name for column in table.columns]]))
    count = 0
    async for rows in table.pages:
        out.write(encode(table.columns, rows))
        count += len(rows)
    out.flush()
    return count


def _csv_page(columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> bytes:
    return _csv_lines(
        [[_cell(value) for value in row] for row in rows],
    )


def _csv_lines(rows: Sequence[Sequence[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows(rows)
    return text.getvalue().encode()


def _cell(value: Any) -> str:
    """A value for people's spreadsheets. Text that one would run as a formula gets an apostrophe before it."""
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULA) else value
    plain = _plain(value)
    if plain is None:
        return ""
    if isinstance(plain, bool):
        return "true" if plain else "false"
    return bytes(plain).decode() if isinstance(plain, Raw) else str(plain)


def _plain(value: Any) -> Any:
    """A value as JSON has it: dollars exact, times in UTC with Z."""
    if isinstance(value, Decimal):
        return usd(nanos(value))
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return value.isoformat() if isinstance(value, date) else value


def _jsonl_page(columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> bytes:
    names = [column.name for column in columns]
    lines = (msgspec.json.encode(dict(zip(names, map(_plain, row), strict=True))) for row in rows)
    return b"".join(line + b"\n" for line in lines)


def _document_page(columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> bytes:
    return b"".join(row[-1].encode() + b"\n" for row in rows)


async def _write_parquet(table: Table, out: BinaryIO) -> int:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise PyarrowMissing("Parquet needs the extra `lake`: pip install 'llm-gateway[lake]'.") from None
    types = {
        "text": pyarrow.string(),
        "integer": pyarrow.int64(),
        "usd": pyarrow.decimal128(38, 9),
        "boolean": pyarrow.bool_(),
        "time": pyarrow.timestamp("us", tz="UTC"),
        "day": pyarrow.date32(),
    }
    schema = pyarrow.schema([(column.name, types[column.kind]) for column in table.columns])
    count = 0
    with pyarrow.parquet.ParquetWriter(out, schema, compression="zstd") as writer:
        async for rows in table.pages:
            columns = [
                pyarrow.array([row[place] for row in rows], type=field.type) for place, field in enumerate(schema)
            ]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
            count += len(rows)
    return count


class Destination:
    """A file that appears whole or not at all, or standard output for `-`."""

    def __init__(self, path: Path, standard_output: BinaryIO) -> None:
        self._path = path
        self._out: BinaryIO = standard_output
        self._beside = None if str(path) == "-" else path.with_name(f".{path.name}.new")

    def __enter__(self) -> BinaryIO:
        if self._beside is not None:
            self._beside.parent.mkdir(parents=True, exist_ok=True)
            self._out = self._beside.open("wb")
        return self._out

    def __exit__(self, kind: object, *_: object) -> None:
        if self._beside is None:
            return
        self._out.close()
        if kind is None:
            self._beside.replace(self._path)
        else:
            self._beside.unlink(missing_ok=True)
