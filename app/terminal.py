"""What the commands share: how they fail, what they ask of PostgreSQL, and how days and numbers are written there."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from datetime import date
from typing import TYPE_CHECKING

from app.ambient import Ambient

if TYPE_CHECKING:
    from app.archive import Archive

BATCH_DEADLINE_SECONDS = 600.0
"""How long one statement of a batch may take: a day of some ten million rows is summed in that time, and dropping or
moving months of rows waits for locks and disks."""
WHICH_POSTGRES = "Which PostgreSQL? Set DATABASE_URL, or give --database-url."
WHICH_REDIS = "Which Redis? Set REDIS_URL, or give --redis-url."

Command = Callable[[str, object, str], argparse.ArgumentParser]
"""Makes a command: `command(name, run, help)`."""


def fail(sentence: str) -> int:
    """Says why it cannot be done; returns the exit code."""
    sys.stderr.write(sentence.rstrip() + "\n")
    return 1


def database_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--database-url", default=os.environ.get("DATABASE_URL"), help="DATABASE_URL by default")


def redis_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--redis-url", default=os.environ.get("REDIS_URL"), help="REDIS_URL by default")


def day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a day: YYYY-MM-DD.") from None


def months(text: str) -> int:
    """A number of whole months, for `--retention-months`."""
    if not text.isdecimal() or not 1 <= int(text) <= 1200:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of months, 1 to 1200.")
    return int(text)


def port(text: str) -> int:
    """A TCP port, 0 for any that is free: what is above would silently be another one."""
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535.")
    return int(text)


def count(text: str) -> int:
    """At least one of something."""
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, 1 to 1000.")
    return int(text)


def interval(text: str) -> float:
    """Seconds between two looks: none at all would be no pause."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time in seconds, 0.1 to 86400.")
    return seconds


def address(text: str) -> str:
    """An address of HTTP, without a slash at its end."""
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} is not an address: https://gateway.example")
    return text.rstrip("/")


def with_archive(arguments: argparse.Namespace, work: Callable[[Archive], Awaitable[int]]) -> int:
    """Runs `work` on an archive; the exit code is its own, or 1 after a sentence."""
    from app.archive import Archive, ArchiveError
    from app.reports.tables import PyarrowMissing

    if not arguments.database_url:
        return fail(WHICH_POSTGRES)

    async def run() -> int:
        archive = Archive(arguments.database_url, Ambient(), BATCH_DEADLINE_SECONDS)
        try:
            return await work(archive)
        finally:
            await archive.close()

    try:
        return asyncio.run(run())
    except (ArchiveError, PyarrowMissing) as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"{error.filename or 'The file'} cannot be read or written: {error.strerror or error}.")
