"""Child processes that log to a file, can be frozen, and cannot outlive the process that started them."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The checkout: where children start, so that `python -m app.cli` and `python -m loadtest.simulator` are found."""
EXEC_TIED = Path(__file__).with_name("exec_tied.py")
PORTS = range(15_000, 32_000)
"""Below the range that Linux gives to outgoing connections (32768 and up): a service that is started again finds
its port free."""

STATE, PARENT, SESSION, BORN = 0, 1, 3, 19
"""Places in /proc/PID/stat after the program's name (proc_pid_stat(5))."""


def tied(program: Sequence[str], *, dies_by: signal.Signals = signal.SIGKILL, user: str | None = None) -> list[str]:
    """`program` (its first word an absolute path) as a command that ends with the thread that starts it."""
    return [sys.executable, "-I", "-S", str(EXEC_TIED), str(os.getpid()), str(int(dies_by)), user or "-", *program]


@dataclass(frozen=True)
class Service:
    """How one part of the stack is started, and how one knows that it answers."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    answers: Callable[[], bool]
    """Whether it answers now; may raise OSError while it does not."""
    stop_signal: signal.Signals = signal.SIGTERM
    user: str | None = None
    restarts: bool = False
    """Whether it is started again when it ends by itself, on the same port."""


class Child:
    """One service's process. `spawner` is one thread that outlives it: Linux ties a child to a thread."""

    def __init__(self, service: Service, log_folder: Path, spawner: ThreadPoolExecutor) -> None:
        self.service = service
        self.log = log_folder / f"{service.name}.log"
        self.started = 0.0
        self.held = True
        """Not running because somebody asked for it, so that its end is no event."""
        self._spawner = spawner
        self._process: subprocess.Popen[bytes] | None = None
        self._frozen: set[int] = set()
        self._family: list[tuple[int, str]] = []

    def start(self) -> None:
        """Starts the process, without waiting until it answers."""
        self.started = time.monotonic()
        self._spawner.submit(self._spawn).result()
        self.held = False

    def _spawn(self) -> None:
        service = self.service
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                tied(service.argv, dies_by=_death_signal(service), user=service.user),
                cwd=ROOT,
                env=dict(service.env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the terminal's Ctrl-C is for the supervisor alone, who stops them in order
            )

    @property
    def pid(self) -> int:
        """The process id; of the last process when none runs, 0 when it was never started."""
        return self._process.pid if self._process else 0

    @property
    def exit_status(self) -> int | None:
        """None while it runs; minus the signal's number when a signal ended it."""
        return self._process.poll() if self._process else 0

    def answers(self) -> bool:
        try:
            return self.service.answers()
        except OSError:
            return False

    def ask_to_stop(self) -> None:
        """Sends the stop signal; a frozen process is thawed first, as it could not hear it."""
        self.held = True
        self.thaw()
        self._family = list({*self._family, *family(self.pid)})
        self._send(self.service.stop_signal)

    def wait(self, seconds: float) -> bool:
        """Whether it and the processes it had started are gone within `seconds` of being asked to stop."""
        deadline = time.monotonic() + seconds
        while self.exit_status is None or any(_alive(*member) for member in self._family):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def end(self) -> None:
        """Kills what is left of it and of the processes it had started, and waits for that."""
        self.held = True
        self._family = list({*self._family, *family(self.pid)})
        self._send(signal.SIGKILL)
        for pid, born in self._family:
            if _alive(pid, born):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.wait(10)

    def freeze(self) -> None:
        """Stops it in its tracks (SIGSTOP), with the processes it started: connections stay open and silent."""
        self._frozen = {self.pid, *(pid for pid, _ in family(self.pid))}
        for pid in self._frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        for pid in self._frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._frozen = set()

    def last_words(self, lines: int = 12) -> str:
        """The end of its log, indented."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])

    def _send(self, number: signal.Signals) -> None:
        if self._process and self._process.poll() is None:
            self._process.send_signal(number)


def _death_signal(service: Service) -> signal.Signals:
    # PostgreSQL's own immediate shutdown takes its other processes with it; they notice a SIGKILL only later.
    return signal.SIGQUIT if service.name == "postgres" else signal.SIGKILL


def family(pid: int) -> list[tuple[int, str]]:
    """The processes that `pid`, a session leader, has started, as (pid, when born); Linux only, else empty.

    Found by parent and by session: PostgreSQL's processes have sessions of their own, and the children of a process
    that was killed have no parent left.
    """
    by_parent: dict[int, list[tuple[int, str]]] = {}
    found: set[tuple[int, str]] = set()
    for entry in Path("/proc").glob("[0-9]*"):
        member, fields = int(entry.name), _stat(int(entry.name))
        if fields:
            by_parent.setdefault(int(fields[PARENT]), []).append((member, fields[BORN]))
            if int(fields[SESSION]) == pid != member:
                found.add((member, fields[BORN]))
    parents = [pid] if pid else []
    while parents:
        members = by_parent.get(parents.pop(), [])
        found.update(members)
        parents += [member for member, _ in members]
    return list(found)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return []


def _alive(pid: int, born: str) -> bool:
    fields = _stat(pid)
    return bool(fields) and fields[BORN] == born and fields[STATE] != "Z"


def has_ended(pid: int) -> bool:
    """Whether no such process runs; one that only waits for its parent to take note has ended."""
    fields = _stat(pid)
    return not fields or fields[STATE] == "Z"


def is_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:`port` now; raises PermissionError where only root may."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except PermissionError:
            raise
        except OSError:
            return False
    return True


def free_port(taken: Collection[int] = ()) -> int:
    """A port of 127.0.0.1 on which nobody listens and that is not in `taken`.

    Nobody else is given it as long as this process lives, though what it is for may listen much later.
    """
    while True:
        port = random.choice(PORTS)
        if port not in taken and is_free(port) and _claim(port):
            return port


def _claim(port: int) -> bool:
    """A name beside the file system (unix(7), abstract) is one process's, and goes with it."""
    if sys.platform != "linux":
        return True
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0llm-gateway-port-{port}")
    except OSError as error:
        claim.close()
        if error.errno == errno.EADDRINUSE:
            return False
        raise  # else another port would be tried for ever
    claim.detach()  # open for good: nobody closes it, and no child has it
    return True
