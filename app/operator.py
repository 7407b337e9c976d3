"""Who works with the command line, and the audit line of what was done there."""

from __future__ import annotations

import getpass
import os
import socket
import sys

from app.ambient import Ambient, timestamp
from app.audit import audit_line


def operator() -> str:
    """Who sits at the command line, before a `sudo` if there was one, and on which machine."""
    try:
        name = os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):  # a container's user that has no name
        name = str(os.getuid())
    return f"{name}@{socket.gethostname()}"


def audit(ambient: Ambient, action: str, **what: object) -> None:
    """One line; standard error is a command's log stream."""
    line = audit_line(timestamp(ambient.now()), operator(), action, what)
    sys.stderr.write(line.decode() + "\n")
