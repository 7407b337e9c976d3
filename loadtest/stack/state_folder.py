"""The folder that a local stack keeps: its lock, its secrets, its ports."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import msgspec

from loadtest.processes import free_port, is_free
from loadtest.services import StackError, write_private

PUBLIC_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


class Secrets(msgspec.Struct, frozen=True):
    """What is made on first start and kept in the state folder, readable by its owner only."""

    key: str
    admin_token: str
    redis_password: str
    postgres_password: str
    user_salt: str
    edge_secret: str


def take(state_dir: Path) -> IO[str]:
    """Makes the folder and locks it for this process; the lock lasts until the file is closed. Raises `StackError`."""
    try:
        # Others may pass through, as PostgreSQL runs as another user when we are root, but not look around.
        state_dir.mkdir(parents=True, exist_ok=True)
        state_dir.chmod(0o711)
        for name in ("log", "spool", "tls", "traefik"):
            (state_dir / name).mkdir(mode=0o700, exist_ok=True)
        lock = open(state_dir / "lock", "a+")  # noqa: SIM115 - it stays open as long as the stack runs
    except OSError as error:
        raise StackError(cannot_write(state_dir, error)) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise StackError(
            f"A stack is already running in {state_dir} (process {supervisor(state_dir)}). "
            "`gateway down` with the same --state-dir stops it; another --state-dir and --port start a second one."
        ) from error
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def cannot_write(state_dir: Path, error: OSError) -> str:
    return f"The state folder {state_dir} cannot be written ({error.strerror}). Choose another with --state-dir."


def supervisor(state_dir: Path) -> int | None:
    """The process that runs a stack in `state_dir`, None when none does. The lock tells: it ends with its holder."""
    try:
        with open(state_dir / "lock", "r+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return None
            except BlockingIOError:
                return int(lock.read() or 0)
    except FileNotFoundError:
        return None


def kept_secrets(state_dir: Path) -> Secrets:
    """The secrets of earlier starts, made on the first."""
    file = state_dir / "secrets.json"
    public = "".join(secrets.choice(PUBLIC_ALPHABET) for _ in range(12))
    made = {
        "key": f"sk-gw-{public}-{secrets.token_urlsafe(32)}",
        "admin_token": secrets.token_urlsafe(32),
        "redis_password": secrets.token_hex(24),
        "postgres_password": secrets.token_hex(24),
        "user_salt": secrets.token_urlsafe(32),
        "edge_secret": secrets.token_urlsafe(32),
    }
    try:
        kept = json.loads(file.read_bytes())
    except (OSError, ValueError):
        kept = {}
    if kept.keys() != made.keys():  # the databases know the old ones: what is there stays
        kept = made | {name: kept[name] for name in made.keys() & kept.keys()}
        write_private(file, json.dumps(kept))
    return msgspec.convert(kept, Secrets)


def kept_ports(state_dir: Path, names: Sequence[str], fixed: dict[str, int]) -> dict[str, int]:
    """A port for each name: `fixed`, else that of the last start if it is still free, else a free one.

    Raises `StackError` when a fixed port cannot be had.
    """
    for port in fixed.values():
        _must_be_free(port)
    file = state_dir / "ports.json"
    try:
        old: dict[str, int] = json.loads(file.read_text())
    except (OSError, ValueError):
        old = {}
    ports = dict(fixed)
    for name in names:
        taken = set(ports.values())
        port = old.get(name, 0)
        if name not in fixed:
            ports[name] = port if port and port not in taken and is_free(port) else free_port(taken)
    write_private(file, json.dumps(ports))
    return ports


def _must_be_free(port: int) -> None:
    if not 0 < port < 65536:
        raise StackError(f"{port} is no port: --port takes 1 to 65535.")
    try:
        if is_free(port):
            return
    except PermissionError as error:
        raise StackError(
            f"Port {port} is for root only. Choose one above 1023, as in `gateway up --port 4000`."
        ) from error
    raise StackError(
        f"Port {port} on 127.0.0.1 is in use. Choose another, as in `gateway up --port {port % 65535 + 1}`, "
        "or stop what listens there."
    )
