"""`gateway cache`: what is kept, what it did, and that something of it is to be found no more."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from datetime import date, timedelta
from pathlib import Path

import msgspec

from app.ambient import Ambient
from app.cache import INVALIDATED, Scope, shelf
from app.cache.epochs import instruction
from app.cache_door import read
from app.config import utc_day
from app.control import tell
from app.errors import InvalidRequest
from app.operator import audit, operator
from app.redis_cluster import reached
from app.redis_pipe import RedisAway, RedisPipe, RedisRefused
from app.terminal import WHICH_POSTGRES, WHICH_REDIS, Command, database_option, day, fail, redis_option

REACH_SECONDS = 3.0
DATABASE_SECONDS = 60.0
MAX_DAYS = 366
WORST = 20


def add(command: Command) -> None:
    parser = command("cache", _stats, "Answers from before: what is kept, what it did, what is invalid.")
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def action(name: str, run: object, help: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=help, description=help)
        made.set_defaults(run=run)
        made.add_argument("--tenant", help="whose (show needs it; everybody's)")
        made.add_argument("--json", action="store_true", help="for machines")
        redis_option(made)
        return made

    action("stats", _stats, "Entries and bytes of each tenant.")
    show = action("show", _show, "A tenant's entries, the ones used last first.")
    show.add_argument("--alias", help="only this alias'")
    show.add_argument("--limit", type=int, default=20, help="how many (20)")
    invalidate = action("invalidate", _invalidate, "From now on, within a second on every replica, it is not found.")
    invalidate.add_argument("--alias", help="what this alias answered")
    invalidate.add_argument("--revision", help="what came from this revision of the knowledge: X-KB-Revision")
    invalidate.add_argument("--tag", help="what came from this document: X-Cache-Tags")
    invalidate.add_argument("--id", help="the same one again changes nothing")
    report = action("report", _report, "Hits, savings, right and wrong answers over some days; --out writes a page.")
    report.add_argument("--from", dest="first", type=day, help="first day, YYYY-MM-DD (a week ago, UTC)")
    report.add_argument("--to", dest="last", type=day, help="last day, included (today)")
    report.add_argument("--out", type=Path, help="write an HTML page here")
    database_option(report)


def _with_redis(arguments: argparse.Namespace, work: Callable[[RedisPipe], Awaitable[int]]) -> int:
    if not arguments.redis_url:
        return fail(WHICH_REDIS)

    async def run() -> int:
        async with reached(arguments.redis_url, Ambient(), REACH_SECONDS) as pipe:
            return await work(pipe)

    try:
        return asyncio.run(run())
    except (RedisAway, RedisRefused) as error:
        return fail(f"Redis could not be reached: {error}.")


def _stats(arguments: argparse.Namespace) -> int:
    async def work(pipe: RedisPipe) -> int:
        names = [name async for name in shelf.tenants(pipe)] if arguments.tenant is None else [arguments.tenant]
        found = [await shelf.held(pipe, name) for name in sorted(set(names))]
        if arguments.json:
            print(msgspec.json.encode(found).decode())
            return 0
        for each in found:
            print(f"{each.tenant:<32} {each.entries:>9,} entries {each.bytes:>15,} bytes")
        if not found:
            print("Nothing is kept.")
        return 0

    return _with_redis(arguments, work)


def _show(arguments: argparse.Namespace) -> int:
    if arguments.tenant is None:
        return fail("Whose? Give --tenant.")

    async def work(pipe: RedisPipe) -> int:
        now = Ambient().now()
        found = await shelf.entries(pipe, arguments.tenant, arguments.alias, max(1, arguments.limit), now)
        if arguments.json:
            print(msgspec.json.encode(found).decode())
            return 0
        for each in found:
            by = "damaged" if each.model is None else f"{each.provider}/{each.model}"
            print(
                f"{each.alias:<24} {each.digest[:12]} {each.bytes:>9,} bytes  {each.age_seconds:>8.0f} s old, "
                f"{each.ends_seconds:>8.0f} s left  {by}  {each.question[:60]}"
            )
        if not found:
            print("Nothing is kept.")
        return 0

    return _with_redis(arguments, work)


def _invalidate(arguments: argparse.Namespace) -> int:
    if not arguments.redis_url:
        return fail(WHICH_REDIS)
    asked = {name: getattr(arguments, name) for name in ("tenant", "alias", "revision", "tag", "id")}
    try:
        scope, id = read(msgspec.json.encode(asked))
    except InvalidRequest as error:
        return fail(error.message)
    ambient = Ambient()
    name, value, until, epoch = instruction(scope, id, ambient)
    try:
        asyncio.run(tell(arguments.redis_url, ambient, INVALIDATED, name, value, operator(), until))
    except (RedisAway, RedisRefused) as error:
        return fail(f"Redis could not be reached, so nothing was invalidated: {error}.")
    what = msgspec.to_builtins(scope)
    audit(ambient, "cache.invalidate", **what, id=epoch)
    print(msgspec.json.encode({"invalidated": what, "id": epoch}).decode() if arguments.json else _said(scope))
    return 0


def _said(scope: Scope) -> str:
    named = ", ".join(f"{name} {value}" for name, value in msgspec.to_builtins(scope).items())
    return f"Nothing from before of {named} is found any more, within a second on every replica."


def _report(arguments: argparse.Namespace) -> int:
    from app.archive import Archive, ArchiveError
    from app.reports import cache

    if not arguments.database_url:
        return fail(WHICH_POSTGRES)
    ambient = Ambient()
    last = arguments.last or utc_day(ambient)
    first = arguments.first or last - timedelta(days=6)
    if not 0 <= (last - first).days < MAX_DAYS:
        return fail(f"--from and --to span 1 to {MAX_DAYS} days, in that order.")

    async def work(pipe: RedisPipe) -> int:
        archive = Archive(arguments.database_url, ambient, DATABASE_SECONDS)
        try:
            lines = await cache.lines(archive, first, last, arguments.tenant)
        finally:
            await archive.close()
        names = [name async for name in shelf.tenants(pipe)] if arguments.tenant is None else [arguments.tenant]
        judged, worst = await _judged(pipe, sorted(set(names)), first, last)
        report = cache.CacheReport(
            first=first, last=last, tenant=arguments.tenant, lines=lines, judged=judged, worst=worst
        )
        if arguments.out is not None:
            arguments.out.write_bytes(cache.as_html(report))
        print(cache.as_json(report).decode() if arguments.json else cache.as_text(report))
        return 0

    try:
        return _with_redis(arguments, work)
    except (ArchiveError, OSError) as error:
        return fail(str(error))


async def _judged(pipe: RedisPipe, names: list[str], first: date, last: date) -> tuple[list[object], list[object]]:
    from app.reports.cache import Judged, Wrong

    judged: list[Judged] = []
    worst: list[Wrong] = []
    for name in names:
        for n in range((last - first).days + 1):
            on = first + timedelta(days=n)
            found = await shelf.figures(pipe, name, on.isoformat())
            judged += [Judged(on, name, alias, figures) for alias, figures in sorted(found.items())]
        worst += [Wrong(name, *each) for each in await shelf.worst(pipe, name, WORST)]
    return judged, sorted(worst, key=lambda each: -each.times)[:WORST]
