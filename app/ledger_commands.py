"""`gateway ledger` and `gateway spool`: the ledger's partitions and schema, and what waits on a replica's disk."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec

from app.ambient import Ambient
from app.config import load
from app.ledger_schema import ledger_schema

if TYPE_CHECKING:
    from app.archive import Archive

BATCH_DEADLINE_SECONDS = 600.0
"""How long one statement may take: dropping or moving months of rows waits for locks and disks."""

Command = Callable[[str, object, str], argparse.ArgumentParser]


def add(command: Command, config_options: Callable[[argparse.ArgumentParser], None]) -> None:
    """Adds the commands to the parser: `command(name, run, help)` makes one."""
    ledger = command("ledger", _maintain, "The ledger's table and schema.")
    actions = ledger.add_subparsers(required=True, metavar="ACTION")
    maintain = actions.add_parser(
        "maintain", help="Make partitions ahead, move stragglers, drop what is past retention."
    )
    maintain.set_defaults(run=_maintain)
    config_options(maintain)
    maintain.add_argument("--json", action="store_true")
    _database(maintain)
    schema = actions.add_parser("schema", help="Print cost-ledger-v1.json, the JSON schema of an event.")
    schema.set_defaults(run=_schema)


def _database(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--database-url", default=os.environ.get("DATABASE_URL"), help="DATABASE_URL by default")


def _fail(sentence: str) -> int:
    sys.stderr.write(sentence.rstrip() + "\n")
    return 1


def _with_archive(arguments: argparse.Namespace, work: Callable[[Archive], Awaitable[int]]) -> int:
    from app.archive import Archive, ArchiveError

    if not arguments.database_url:
        return _fail("Which PostgreSQL? Set DATABASE_URL, or give --database-url.")

    async def run() -> int:
        archive = Archive(arguments.database_url, Ambient(), BATCH_DEADLINE_SECONDS)
        try:
            return await work(archive)
        finally:
            await archive.close()

    try:
        return asyncio.run(run())
    except ArchiveError as error:
        return _fail(str(error))


def _schema(arguments: argparse.Namespace) -> int:
    sys.stdout.write(ledger_schema())
    return 0


def _maintain(arguments: argparse.Namespace) -> int:
    config = load(arguments.config, arguments.environment, arguments.overlay, require_secrets=False)
    months = config.settings.ledger.retention_months

    async def work(archive: Archive) -> int:
        done = await archive.maintain(months)
        if arguments.json:
            print(msgspec.json.encode(done).decode())
        else:
            kept = "all months are kept" if months is None else f"{months} months before this one are kept"
            print(f"Partitions are made ahead; {kept}; dropped: {', '.join(done.dropped) or 'none'}.")
            if done.default_rows:
                print(f"{done.default_rows:,} rows are in no month's partition: their clocks were wrong.")
        return _fail(done.warning) if done.warning else 0

    return _with_archive(arguments, work)
