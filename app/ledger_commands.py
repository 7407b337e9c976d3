"""`gateway ledger` and `gateway spool`: the ledger's partitions and schema, and what waits on a replica's disk."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from app.ledger import backlog
from app.ledger_schema import ledger_schema
from app.terminal import Command, database_option, day, fail, months, with_archive

if TYPE_CHECKING:
    from app.archive import Archive


def add(command: Command) -> None:
    """Adds the commands to the parser: `command(name, run, help)` makes one."""
    ledger = command("ledger", _maintain, "The ledger's table and schema.")
    actions = ledger.add_subparsers(required=True, metavar="ACTION")
    maintain = actions.add_parser(
        "maintain", help="Make partitions ahead, move stragglers, drop what is past retention."
    )
    maintain.set_defaults(run=_maintain)
    maintain.add_argument("--retention-months", type=months, help="drop months before so many (keeps all)")
    maintain.add_argument("--json", action="store_true", help="for machines")
    database_option(maintain)
    schema = actions.add_parser("schema", help="Print cost-ledger-v1.json, the JSON schema of an event.")
    schema.set_defaults(run=_schema)
    fill = actions.add_parser("fill-lake", help="Make the lake's files of some days from PostgreSQL.")
    fill.set_defaults(run=_fill_lake)
    fill.add_argument("--from", dest="first", type=day, required=True, help="first day, YYYY-MM-DD (UTC)")
    fill.add_argument("--to", dest="last", type=day, help="last day, included (the first day)")
    fill.add_argument("--lake", default=os.environ.get("LEDGER_LAKE_URL"), help="LEDGER_LAKE_URL by default")
    form = os.environ.get("LEDGER_LAKE_FORMAT", "parquet")
    fill.add_argument("--format", choices=("parquet", "jsonl"), default=form, help="LEDGER_LAKE_FORMAT by default")
    database_option(fill)

    spool = command("spool", _list, "What waits on a replica's disk, and what could not become a row.")
    actions = spool.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="Segments with their backlog, dead letters with their reasons.")
    listing.set_defaults(run=_list)
    replay = actions.add_parser("replay", help="Try dead letters again; what becomes a row leaves its file.")
    replay.set_defaults(run=_replay)
    database_option(replay)
    for action in (listing, replay):
        action.add_argument("--spool-dir", type=Path, default=Path(".gateway/spool"), help="the ledger's local disk")
        action.add_argument("--json", action="store_true", help="for machines")


def _schema(arguments: argparse.Namespace) -> int:
    sys.stdout.write(ledger_schema())
    return 0


def _maintain(arguments: argparse.Namespace) -> int:
    kept = arguments.retention_months

    async def work(archive: Archive) -> int:
        done = await archive.maintain(kept)
        if arguments.json:
            print(msgspec.json.encode(done).decode())
        else:
            months_kept = "all months are kept" if kept is None else f"{kept} months before this one are kept"
            print(f"Partitions are made ahead; {months_kept}; dropped: {', '.join(done.dropped) or 'none'}.")
            if done.default_rows:
                print(f"{done.default_rows:,} rows are in no month's partition: their clocks were wrong.")
        return fail(done.warning) if done.warning else 0

    return with_archive(arguments, work)


def _fill_lake(arguments: argparse.Namespace) -> int:
    from app.lake import Lake, LakeError, fill

    last = arguments.last or arguments.first
    if not arguments.lake:
        return fail("Which lake? Set LEDGER_LAKE_URL, or give --lake.")
    if last < arguments.first:
        return fail("--to is before --from.")
    try:
        lake = Lake(arguments.lake, arguments.format)
    except LakeError as error:
        return fail(str(error))

    async def work(archive: Archive) -> int:
        on = arguments.first
        while on <= last:
            rows, files = await fill(archive, lake, on)
            print(f"{on}: {rows:,} rows in {files:,} files")
            on += timedelta(days=1)
        return 0

    try:
        return with_archive(arguments, work)
    except LakeError as error:
        return fail(str(error))


def _list(arguments: argparse.Namespace) -> int:
    """What the files say; nobody is asked."""
    from app import dead_letters

    folder: Path = arguments.spool_dir
    if not folder.is_dir():
        return _no_folder(folder)
    waiting = backlog(folder)
    for_lake = backlog(folder / "lake") if (folder / "lake").is_dir() else {}
    dead = {path.name: _reasons(path) for path in dead_letters.files(folder)}
    if arguments.json:
        print(msgspec.json.encode({"segments": waiting, "for_lake": for_lake, "dead_letters": dead}).decode())
        return 0
    for name, size in waiting.items():
        print(f"{name}: {size:,} bytes not shipped")
    if for_lake:
        print(f"{len(for_lake):,} segments wait for the lake: {sum(for_lake.values()):,} bytes")
    for name, reasons in dead.items():
        print(f"{name}: {len(reasons):,} dead letters")
        for reason, count in Counter(reasons).items():
            print(f"  {count:,}: {reason}")
    if not waiting and not for_lake and not dead:
        print(f"{folder} is empty: every row is shipped.")
    return 0


def _no_folder(folder: Path) -> int:
    return fail(f"{folder} is no folder; --spool-dir names the replica's spool.")


def _reasons(path: Path) -> list[str]:
    from app import dead_letters

    letters = dead_letters.read(path)
    return ["it can be tried again" if letter.event else letter.reason for letter in letters]


def _replay(arguments: argparse.Namespace) -> int:
    from app import dead_letters

    folder: Path = arguments.spool_dir
    if not folder.is_dir():
        return _no_folder(folder)

    async def work(archive: Archive) -> int:
        await archive.prepare()
        done = [await dead_letters.replay(path, archive) for path in dead_letters.files(folder)]
        if arguments.json:
            print(msgspec.json.encode(done).decode())
        else:
            print(f"{sum(one.rows for one in done):,} rows replayed from {len(done):,} files.")
        for one in done:
            for reason in one.left:
                sys.stderr.write(f"{one.file}, {reason}\n")
        return 1 if any(one.left for one in done) else 0

    return with_archive(arguments, work)
