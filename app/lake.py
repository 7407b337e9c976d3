"""The lake: events as Parquet or JSON lines in an S3-compatible bucket or a folder, under `tenant_id=…/day=…/`.

For those whose analytics live there. A segment of the spool that PostgreSQL has whole is handed over to the folder
`lake` beside the spool, and becomes one file per tenant and day, named after the segment: doing it twice writes the
same files again. PostgreSQL remains the ledger; a lake that is away costs disk, and when that gets short its segments
are let go, for `gateway ledger fill-lake` makes the files of a day from PostgreSQL. Rows may then stand there twice:
readers take one of each `event_id`, as runbooks/lake.md shows. Needs the extra `lake` (pyarrow), imported when a lake
is opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

import msgspec

from app.archive import Archive
from app.ledger import parse_segment_name, read_lines, take_lock
from app.reports.export import Exports, Selection
from app.reports.tables import Column, Table, write
from app.shipping import LakeReport

FOLDER = "lake"
"""Where segments wait, inside the spool's folder."""
NO_TENANT = "__HIVE_DEFAULT_PARTITION__"
"""What Hive, and all that reads its layout, calls the partition of null."""
CONNECT_SECONDS, REQUEST_SECONDS = 5.0, 60.0
POLL_SECONDS, BACKOFF_SECONDS = 5.0, 60.0
FORMATS = ("parquet", "jsonl")

_decode = msgspec.json.Decoder(float_hook=Decimal).decode
_SCHEME = re.compile(r"(?P<scheme>https?)://(?P<host>[^/]+)/?")


class LakeError(Exception):
    """The lake cannot be written; a sentence without secrets."""


class InvalidLakeUrl(LakeError):
    """The URL cannot be read: `s3://bucket/folder?region=eu-west-1`, or a folder's path."""


class LakeMissing(LakeError):
    """The library is not installed: pip install 'llm-gateway[lake]'."""


def _at(event: Mapping[str, Any], path: Sequence[str]) -> Any:
    *parts, member = path
    for name in parts:
        event = event[name]
    return event.get(member)  # what has a default may be left out: null, of those that are columns


_FIELDS: tuple[tuple[Column, tuple[str, ...]], ...] = (
    (Column("timestamp", "time"), ("timestamp",)),
    *(
        (Column(name), (name,))
        for name in (
            "event_id", "request_id", "trace_id", "feature_id", "key_id", "purpose", "environment", "model_alias",
            "model_resolved", "provider", "vendor_request_id", "status", "error_code",
        )
    ),
    (Column("cache_hit", "boolean"), ("cache_hit",)),
    (Column("fallback_used", "boolean"), ("fallback_used",)),
    *((Column(name, "integer"), ("usage", name)) for name in ("input_tokens", "output_tokens", "total_tokens")),
    (Column("cost_input_usd", "usd"), ("cost_usd", "input")),
    (Column("cost_output_usd", "usd"), ("cost_usd", "output")),
    (Column("cost_usd", "usd"), ("cost_usd", "total")),
    (Column("saved_usd", "usd"), ("saved_usd",)),
    *((Column(name), (name,)) for name in ("cost_status", "usage_source")),
    (Column("price_table_version"), ("cost_usd", "price_table_version")),
    *((Column(name), (name,)) for name in ("config_version", "prompt_version", "adjusts")),
)  # fmt: skip
"""The columns of a Parquet file, as an export has them; the tenant is in the path. After them the event itself."""
COLUMNS = (*(column for column, _ in _FIELDS), Column("event"))


def _row(event: Mapping[str, Any], written: str) -> list[Any]:
    values = []
    for column, path in _FIELDS:
        value = _at(event, path)
        if column.kind == "time":
            value = datetime.fromisoformat(value)
        elif column.kind == "usd":
            value = Decimal(value)
        values.append(value)
    return [*values, written]


class Lake:
    """Where files go. `s3://BUCKET/FOLDER` takes its credentials as AWS' own tools do (AWS_ACCESS_KEY_ID and so on)."""

    def __init__(self, url: str, format: Literal["parquet", "jsonl"] = "parquet") -> None:
        """`?region=` and `?endpoint=http://host:port` name a region and another server than Amazon's.

        Raises `InvalidLakeUrl`, and `LakeMissing` without the extra.
        """
        try:
            import pyarrow.fs
        except ImportError:
            raise LakeMissing("The lake needs the extra `lake`: pip install 'llm-gateway[lake]'.") from None
        parts = urlsplit(url)
        if format not in FORMATS:
            raise InvalidLakeUrl(f"{format!r} is no format of the lake: {' or '.join(FORMATS)}.")
        self.format = format
        self.where = f"{parts.scheme}://{parts.netloc}{parts.path}" if parts.scheme else parts.path
        if parts.scheme == "s3" and parts.netloc and not parts.username:
            self._root = f"{parts.netloc}{parts.path}".rstrip("/")
            self._files = pyarrow.fs.S3FileSystem(
                connect_timeout=CONNECT_SECONDS, request_timeout=REQUEST_SECONDS, **_s3_options(parts.query)
            )
            self._renames = False
        elif not parts.scheme and parts.path.startswith("/"):
            self._root = parts.path.rstrip("/")
            self._files = pyarrow.fs.LocalFileSystem()
            self._renames = True
        else:
            raise InvalidLakeUrl("A lake is s3://BUCKET/FOLDER, without a password in it, or a folder's absolute path.")

    async def put(self, name: str, events: Iterable[str]) -> int:
        """Writes events, grouped by tenant and day; returns how many files. Raises `LakeError`."""
        groups: dict[tuple[str, str], list[list[Any]]] = defaultdict(list)
        for written in events:
            event = _decode(written)
            groups[event["tenant_id"] or NO_TENANT, event["timestamp"][:10]].append(_row(event, written))
        for (tenant, day), rows in groups.items():
            out = io.BytesIO()
            await write(Table(COLUMNS, _page(rows), documents=True), self.format, out)
            await self._write(f"{self._root}/tenant_id={tenant}/day={day}", f"{name}.{self.format}", out.getvalue())
        return len(groups)

    async def _write(self, folder: str, name: str, content: bytes) -> None:
        try:
            async with asyncio.timeout(REQUEST_SECONDS + CONNECT_SECONDS):
                await asyncio.to_thread(self._write_file, folder, name, content)
        except (OSError, TimeoutError) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise LakeError(
                f"{self.where} takes no files ({reason}): see that it is there, and that we may write to it."
            ) from error

    def _write_file(self, folder: str, name: str, content: bytes) -> None:
        """Whole or not at all: a bucket takes an object whole, in a folder the file is renamed at the end."""
        path = f"{folder}/{name}"
        if self._renames:
            self._files.create_dir(folder, recursive=True)
        with self._files.open_output_stream(path + ".new" if self._renames else path) as out:
            out.write(content)
        if self._renames:
            self._files.move(path + ".new", path)


async def _page(rows: Sequence[Sequence[Any]]) -> AsyncIterator[Sequence[Sequence[Any]]]:
    yield rows


def _s3_options(query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for name, value in parse_qsl(query):
        if name == "region":
            options["region"] = value
        elif name == "endpoint" and (match := _SCHEME.fullmatch(value)):
            options |= {"scheme": match["scheme"], "endpoint_override": match["host"]}
        else:
            raise InvalidLakeUrl(f"{name}={value} is not understood: region=NAME, endpoint=https://HOST:PORT.")
    return options


# --- segments -----------------------------------------------------------------------------------------------------


def hand_over(segment: Path, keep_free_bytes: int) -> bool:
    """Moves a segment to where it waits for the lake. False, and nothing is done, where the disk is getting short."""
    folder = segment.parent / FOLDER
    disk = os.statvfs(segment.parent)
    if disk.f_bavail * disk.f_frsize < keep_free_bytes:
        return False
    folder.mkdir(mode=0o700, exist_ok=True)
    segment.replace(folder / segment.name)
    return True


class LakeShipper:
    """Writes handed-over segments to the lake, oldest first. Several may run on one disk: a segment is locked."""

    def __init__(self, spool_dir: Path, lake: Lake) -> None:
        self.report = LakeReport()
        self._folder = spool_dir / FOLDER
        self._lake = lake

    async def run(self) -> None:
        """Until it is cancelled: what is not written is there for the next."""
        failures = 0
        while True:
            try:
                await self.run_once()
                self.report.error, failures = None, 0
            except (LakeError, OSError) as error:
                self.report.error = str(error)
                failures += 1
            await asyncio.sleep(min(BACKOFF_SECONDS, POLL_SECONDS * 2**failures))

    async def run_once(self) -> int:
        """Writes what waits; returns how many files. Raises `LakeError`, OSError: what was not written still waits."""
        before = self.report.files
        try:
            for path in self._waiting():
                await self._ship(path)
        finally:
            self.report.backlog_bytes = sum(path.stat().st_size for path in self._waiting() if path.exists())
        return self.report.files - before

    def _waiting(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        found = [(parsed, name) for name in os.listdir(self._folder) if (parsed := parse_segment_name(name))]
        return [self._folder / name for _, name in sorted(found)]

    async def _ship(self, path: Path) -> None:
        with _locked(path) as content:
            if content is not None:
                lines = (line.payload.decode() for line in read_lines(content, final=True) if line.kind == "E")
                self.report.files += await self._lake.put(path.stem, lines)
                os.unlink(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bytes | None]:
    """A waiting segment's content while nobody else has it; None where somebody has, or it is done."""
    try:
        file = path.open("r+b")  # writable: some file systems lock only such
    except FileNotFoundError:
        yield None
        return
    with file:
        yield file.read() if take_lock(file.fileno()) else None


async def fill(archive: Archive, lake: Lake, day: date) -> tuple[int, int]:
    """Makes a day's files from PostgreSQL, adjustments included; returns rows and files.

    They stand beside those of segments. Raises `ArchiveError` and `LakeError`.
    """
    rows = files = number = 0
    table = Exports(archive).ledger(Selection(first=day, last=day), whole_events=True)
    async for page in table.pages:
        files += await lake.put(f"filled-{number:06d}", [row[-1] for row in page])
        rows += len(page)
        number += 1
    return rows, files
