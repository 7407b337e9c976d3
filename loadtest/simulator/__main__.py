"""`python -m loadtest.simulator`: run the simulator until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from loadtest.simulator.server import Simulator


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.simulator", description="Run the vendor simulator.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=4010, help="0 takes a free port (default: 4010)")
    parser.add_argument("--ready-file", type=Path, help="where to write {url, pid} as JSON once listening")
    parser.add_argument("--api-key-env", metavar="NAME", help="accept only the key in this environment variable")
    parser.add_argument("--latency-ms", type=float, default=0, help="waited before every vendor answer (0)")
    options = parser.parse_args()
    api_key = None
    if options.api_key_env:
        api_key = os.environ.get(options.api_key_env)
        if not api_key:
            parser.error(f"the environment variable {options.api_key_env} is empty or not set")
    try:
        import uvloop
    except ImportError:
        run = asyncio.run
    else:
        run = uvloop.run
    try:
        run(_serve(options.host, options.port, options.ready_file, Simulator(api_key, options.latency_ms)))
    except OSError as error:
        print(f"The simulator cannot start on {options.host}:{options.port}: {error.strerror}.", file=sys.stderr)
        return 1
    return 0


async def _serve(host: str, port: int, ready_file: Path | None, simulator: Simulator) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    url = await simulator.start(host, port)
    if ready_file is not None:
        # Renamed into place, so that a reader never sees half of it.
        unfinished = ready_file.with_name(f"{ready_file.name}.{os.getpid()}")
        unfinished.write_text(json.dumps({"url": url, "pid": os.getpid()}))
        unfinished.replace(ready_file)
    print(f"simulator listening on {url}", flush=True)
    await stopped.wait()
    await simulator.stop()


if __name__ == "__main__":
    sys.exit(main())
