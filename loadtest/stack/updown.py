"""`gateway up` and `gateway down`: the local stack from a terminal, in the foreground or detached."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Protocol

import msgspec

from loadtest.processes import ROOT, has_ended
from loadtest.services import StackError, write_private

from . import state_folder
from .stack import DRAIN_SECONDS, Stack

SDK_SNIPPET = """\
import ssl
from openai import DefaultHttpxClient, OpenAI

client = OpenAI(
    base_url="{url}/v1",
    api_key="{key}",
    default_headers={{"X-Tenant-Id": "{tenant}"}},
    http_client=DefaultHttpxClient(verify=ssl.create_default_context(cafile={ca_file!r})),
)
answer = client.chat.completions.create(
    model="support-fast", messages=[{{"role": "user", "content": "Say hello."}}]
)
print(answer.choices[0].message.content)
"""
CURL = """\
curl --cacert {ca_file} {url}/v1/chat/completions \\
  -H 'Authorization: Bearer {key}' -H 'X-Tenant-Id: {tenant}' -H 'Content-Type: application/json' \\
  -d '{{"model": "support-fast", "messages": [{{"role": "user", "content": "Say hello."}}]}}'
"""


class UpOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `gateway up`."""

    port: int = 4000
    state_dir: Path = Path(".gateway")
    replicas: int = 2
    config: Path = Path("config")
    environment: str = "dev"
    ready_file: Path | None = None
    detach: bool = False


class DownOptions(Protocol):
    """The options of `gateway down`."""

    state_dir: Path


def up(options: UpOptions) -> int:
    """Starts the stack and prints a page that says how to use it; returns the exit code.

    In the foreground it stays until Ctrl-C, SIGTERM or SIGHUP has stopped everything; a second one does not wait for
    open streams. Detached it returns when the stack is ready. Any object with the fields of `UpOptions` will do.
    """
    return _detached(options) if options.detach else _foreground(options)


def down(options: DownOptions) -> int:
    """Stops the stack that `gateway up` runs in `state_dir`, waits until it has, and says so; returns the exit code."""
    state_dir = options.state_dir.resolve()
    pid = state_folder.supervisor(state_dir)
    if pid is None:
        print(f"No stack is running in {state_dir}.")
        return 0
    print(f"Stopping the stack in {state_dir} ...", flush=True)
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + DRAIN_SECONDS + 30
    while not has_ended(pid):
        if time.monotonic() > deadline:
            print(f"It still runs, as process {pid}; `kill -9 {pid}` ends it and all of its services.", file=sys.stderr)
            return 1
        time.sleep(0.05)
    print("Stopped.")
    return 0


def page(stack: Stack) -> str:
    """What the terminal shows once the stack is ready; its two examples work when pasted."""
    ready = {name: str(value) for name, value in stack.ready().items()}
    simulated = (
        f"simulated, at {stack.simulator_url}" if stack.simulator_url else "real, by the keys in your environment"
    )
    rows = {
        "URL": stack.url,
        "CA file": str(stack.ca_file),
        "Key": stack.key,
        "Tenant": stack.tenant,
        "Vendors": simulated,
        "Admin": f"{stack.admin_url}  (metrics; /status with the token {stack.admin_token})",
        "Logs": str(stack.log_dir),
        "Stop": f"Ctrl-C, or: gateway down --state-dir {shlex.quote(str(stack.state_dir))}",
    }
    table = "\n".join(f"  {name:<8} {value}" for name, value in rows.items())
    curl = CURL.format_map({**ready, "ca_file": shlex.quote(ready["ca_file"])})
    return f"\nThe gateway is ready.\n\n{table}\n\n{curl}\n{SDK_SNIPPET.format_map(ready)}"


def _foreground(options: UpOptions) -> int:
    stack = Stack(
        options.state_dir,
        port=options.port,
        replicas=options.replicas,
        config=options.config,
        environment=options.environment,
        ready_file=options.ready_file,
        report=lambda line: print(line, flush=True),
    )
    stopping = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if stopping.is_set():
            stack.hurry.set()
        else:
            stopping.set()
            if not stack.closing:
                raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        print(f"Starting in {stack.state_dir}", flush=True)
        with stack:
            print(page(stack), flush=True)
            while True:
                signal.pause()
    except KeyboardInterrupt:
        print("Stopped.", flush=True)
        return 0
    except StackError as error:
        print(error, file=sys.stderr, flush=True)
        return 1


def _detached(options: UpOptions) -> int:
    """Runs the same supervisor in a session of its own, and relays what it prints until the stack is ready."""
    state_dir = options.state_dir.resolve()
    fields = {
        "port": options.port,
        "state_dir": str(state_dir),
        "replicas": options.replicas,
        "config": str(options.config.resolve()),
        "environment": options.environment,
        "ready_file": str(options.ready_file.resolve()) if options.ready_file else None,
    }
    ready, log = state_dir / "ready.json", state_dir / "log" / "stack.log"
    try:
        state_folder.take(state_dir).close()  # a sentence now rather than in a log; the supervisor takes it again
        ready.unlink(missing_ok=True)
        write_private(log, "")
    except StackError as error:
        print(error, file=sys.stderr)
        return 1
    with open(log, "ab") as out:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "loadtest.stack", msgspec.json.encode(fields).decode()],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    with open(log) as lines:
        while True:
            exit_code = supervisor.poll()
            is_ready = exit_code is None and ready.exists()
            text = lines.read()
            sys.stdout.write(text)
            sys.stdout.flush()
            if exit_code is not None:
                return exit_code or 1
            if is_ready:
                url = msgspec.json.decode(ready.read_bytes())["url"]
                stop = f"gateway down --state-dir {shlex.quote(str(state_dir))}"
                print(f"The gateway is ready at {url}; its key and all else are in {ready}. To stop it: {stop}")
                return 0
            time.sleep(0.05)
