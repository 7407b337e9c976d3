"""The end of a child process that works off what its standard input brought."""

from __future__ import annotations

import asyncio
import contextlib


async def end(process: asyncio.subprocess.Process | None, seconds: float) -> None:
    """Closes its standard input, so that it does what is left and exits; after `seconds` it is killed."""
    if process is None or process.returncode is not None:
        return
    process.stdin.close()
    try:
        async with asyncio.timeout(seconds):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            process.kill()
        await process.wait()
