"""The archive: the ledger in PostgreSQL, its table and its connection. The only home of psycopg."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any, Protocol

import psycopg
from msgspec import Struct
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.errors import CheckViolation, DataError, NotNullViolation, ProgramLimitExceeded, UndefinedTable

from app.ambient import Ambient
from app.sql import statements

DEADLINE_SECONDS = 15.0
_PARTITIONS_SECONDS = 3600.0
_SCHEMA = (
    "create_ledger",
    "add_adjusts",
    "create_tenant_index",
    "create_default_partition",
    "create_partition_function",
)
_CONNECTION: Mapping[str, str | int] = {
    "connect_timeout": 5,
    "application_name": "llm-gateway ledger",
    # A host that vanished without a word is noticed in 25 s, or 15 s with data on the way.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
"""What holds unless DATABASE_URL says otherwise."""


class Run(Protocol):
    """Runs a statement with its parameters; returns its rows, none for a statement that has none."""

    async def __call__(
        self, statement: str, parameters: Mapping[str, object] | None = None
    ) -> list[tuple[Any, ...]]: ...


class ArchiveError(Exception):
    """A sentence without secrets that says what to do."""


class InvalidDatabaseUrl(ArchiveError):
    """DATABASE_URL cannot be read: write `postgresql://user:password@host:5432/database`."""


class ArchiveAway(ArchiveError):
    """PostgreSQL cannot be reached, or refuses: what was meant for it is kept; try again later."""


class NoLedger(ArchiveError):
    """The database has no ledger yet: no replica has shipped to it."""


class Maintained(Struct, frozen=True):
    """What `Archive.maintain` did: partitions dropped, rows that no month's partition holds, and what failed."""

    dropped: tuple[str, ...]
    default_rows: int
    warning: str | None


class Archive:
    """One connection to the ledger, made when it is needed and again after a failure.

    Every method raises `ArchiveAway` within `deadline_seconds`, frozen servers included. `warning` is a sentence about
    something that is wrong while rows still arrive.
    """

    def __init__(self, database_url: str, ambient: Ambient, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        """Raises `InvalidDatabaseUrl`."""
        try:
            written = conninfo_to_dict(database_url)
            if not written:
                raise psycopg.ProgrammingError("empty")
            self._conninfo = make_conninfo("", **{**_CONNECTION, **written})
        except psycopg.ProgrammingError:
            # The driver's own message quotes the URL, password included.
            raise InvalidDatabaseUrl(
                "DATABASE_URL is not set, or not a PostgreSQL URL: write postgresql://user:password@host:5432/database"
            ) from None
        self.where = f"{written.get('host') or 'localhost'}:{written.get('port') or 5432}"
        self.warning: str | None = None
        self._ambient = ambient
        self._deadline_seconds = deadline_seconds
        self._sql = statements("ledger.sql")
        self._connection: psycopg.AsyncConnection[tuple[Any, ...]] | None = None
        self._partitions_at = 0.0

    async def prepare(self) -> None:
        """Sees to it that the server answers, and that the table and the partitions ahead exist."""
        async with self._connected() as connection:
            await connection.execute("SELECT 1")
            now = self._ambient.monotonic()
            if now < self._partitions_at:
                return
            cursor = await self._run(connection, "exists")
            if (await cursor.fetchone()) != (True,):
                async with connection.transaction():
                    await self._run(connection, "lock")
                    for name in _SCHEMA:
                        await self._run(connection, name)
            self.warning = None
            for name in ("make_partitions", "make_straggler_partitions"):
                try:
                    async with connection.transaction():
                        await self._run(connection, "lock")
                        await self._run(connection, name, today=self._today())
                except psycopg.Error as error:
                    if connection.closed:
                        raise
                    self.warning = self.warning or (
                        f"{name.replace('_', ' ')} failed, rows stay in ledger_default; `gateway ledger maintain` has "
                        f"more time for it: {_reason(error)}"
                    )
            self._partitions_at = now + _PARTITIONS_SECONDS

    async def maintain(self, retention_months: int | None) -> Maintained:
        """Makes the partitions ahead, moves stragglers into those of their months, drops what is past retention.

        `retention_months` are the whole months kept before this one; None keeps all. Doing it twice changes nothing.
        """
        self._partitions_at = 0.0
        await self.prepare()
        today = {"today": self._today()}
        async with self.transaction() as run:
            await run(self._sql["lock"])
            dropped = []
            if retention_months is not None:
                await run(self._sql["create_retention_function"])
                dropped = await run(self._sql["drop_before"], {**today, "months": retention_months})
            ((left,),) = await run(self._sql["default_rows"])
        return Maintained(tuple(name for (name,) in dropped), left, self.warning)

    async def insert(self, events: Sequence[str]) -> tuple[int, list[int]]:
        """Takes JSON events; returns how many were new, and the places of those that can never be a row.

        One statement, so all or none. A JSON array instead of COPY into a staging table: one round trip, no temporary
        table, nothing that a transaction pooler would mind, and about as fast (16 interleaved rounds of 10,000 rows on
        a busy machine: median 1.15 times COPY's rate, from 0.7 to 1.8).
        """
        if not events:
            return 0, []
        try:
            async with self._connected() as connection:
                rows = f"[{','.join(events)}]"
                try:
                    cursor = await self._run(connection, "insert_events", events=rows)
                except CheckViolation:  # while it waited, another replica made the partition of a row's month
                    cursor = await self._run(connection, "insert_events", events=rows)
                return cursor.rowcount, []
        except _Unfit:
            if len(events) == 1:
                return 0, [0]
        middle = len(events) // 2
        new, unfit = await self.insert(events[:middle])
        new_too, unfit_too = await self.insert(events[middle:])
        return new + new_too, unfit + [middle + place for place in unfit_too]

    async def rows(self, statement: str, parameters: Mapping[str, object]) -> list[tuple[Any, ...]]:
        """The answer to a reading statement. Raises `NoLedger` besides."""
        async with self._connected() as connection:
            cursor = await connection.execute(statement, parameters)
            return await cursor.fetchall()

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Run]:
        """One transaction within one deadline; yields what runs a statement in it. Raises `NoLedger` besides."""
        async with self._connected() as connection, connection.transaction():

            async def run(statement: str, parameters: Mapping[str, object] | None = None) -> list[tuple[Any, ...]]:
                cursor = await connection.execute(statement, parameters)
                return await cursor.fetchall() if cursor.description else []

            yield run

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    def _today(self) -> date:
        return datetime.fromtimestamp(self._ambient.now(), UTC).date()

    async def _run(
        self, connection: psycopg.AsyncConnection[tuple[Any, ...]], name: str, **parameters: object
    ) -> psycopg.AsyncCursor[tuple[Any, ...]]:
        return await connection.execute(self._sql[name], parameters or None)

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[psycopg.AsyncConnection[tuple[Any, ...]]]:
        """The connection, for one piece of work with a deadline. The border where psycopg's errors become ours."""
        try:
            if self._connection is None:
                self._connection = await self._connect()
            with _cut_after(self._connection, self._deadline_seconds):
                yield self._connection
        except (DataError, NotNullViolation, ProgramLimitExceeded) as error:
            raise _Unfit from error
        except UndefinedTable as error:
            await self.close()
            self._partitions_at = 0.0
            raise NoLedger(
                f"The database at {self.where} holds no ledger: no replica has shipped to it. Check DATABASE_URL."
            ) from error
        except (psycopg.Error, TimeoutError, OSError) as error:
            await self.close()
            raise ArchiveAway(
                f"PostgreSQL at {self.where} does not take part ({_reason(error)}): see that it runs, and that "
                "DATABASE_URL names it."
            ) from error
        except BaseException:
            await self.close()  # cancelled in the middle of something
            raise

    async def _connect(self) -> psycopg.AsyncConnection[tuple[Any, ...]]:
        async with asyncio.timeout(self._deadline_seconds):
            # Not prepared, for a transaction pooler hands each statement to another server connection.
            connection = await psycopg.AsyncConnection.connect(self._conninfo, autocommit=True, prepare_threshold=None)
        try:
            with _cut_after(connection, self._deadline_seconds):
                milliseconds = int(self._deadline_seconds * 1000)
                await self._run(connection, "settings", statement_ms=milliseconds, lock_ms=milliseconds // 3)
        except BaseException:
            await connection.close()
            raise
        return connection


class _Unfit(Exception):
    """An event in the batch that cannot be a row."""


@contextlib.contextmanager
def _cut_after(connection: psycopg.AsyncConnection[Any], seconds: float) -> Iterator[None]:
    """Shuts the socket at the deadline: cancelling would first ask the server to cancel, and a frozen one is silent."""
    timer = asyncio.get_running_loop().call_later(seconds, _cut, connection.pgconn.socket)
    try:
        yield
    finally:
        timer.cancel()


def _cut(fd: int) -> None:
    with socket.socket(fileno=os.dup(fd)) as line, contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
