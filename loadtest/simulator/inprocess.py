"""The simulator inside the caller's process, for tests that need no process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

from loadtest.simulator.server import Simulator


@contextlib.contextmanager
def running(api_key: str | None = None) -> Iterator[str]:
    """Run a simulator on a free port of 127.0.0.1 in a thread of its own; yields its base URL."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="simulator", daemon=True)
    thread.start()
    simulator = Simulator(api_key)
    try:
        yield asyncio.run_coroutine_threadsafe(simulator.start(), loop).result()
        asyncio.run_coroutine_threadsafe(simulator.stop(), loop).result()
    finally:
        asyncio.run_coroutine_threadsafe(_end_tasks(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end_tasks() -> None:
    """Let the tasks that `stop` cancelled end before their loop closes."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
