"""The local stack for real, without Docker: Traefik with TLS, gateway replicas, Redis 8, PostgreSQL 18, the simulator.

`gateway up` and `gateway down` are `up` and `down`; tests use `Stack` itself, as a context manager. Everything listens
on 127.0.0.1, keeps its state in one folder and ends with the process that started it, even when that one is killed.
"""

from loadtest.services import StackError

from .stack import Stack
from .updown import UpOptions, down, up

__all__ = ["Stack", "StackError", "UpOptions", "down", "up"]
