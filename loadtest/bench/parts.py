"""What the benchmark starts: real Redis and PostgreSQL, the mock vendor, and the proxies to be measured, each pinned.

The proxy under test has one core for itself and all of its threads and children; everything else shares the others.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import psycopg
import yaml
from redis import Redis

from app.limits.scopes import WHOLE
from loadtest import local_ca, services
from loadtest.bench import peers
from loadtest.processes import Child, Service, family, free_port
from loadtest.services import StackError, get

TENANT, TRIPPED = "bench", "bench-tripped"
URGENT, PATIENT = "bench-urgent", "bench-patient"
"""Tenants of high and of low priority."""
CACHED, MEANT = "bench-cached", "bench-meant"
"""An alias whose answers are kept."""
ENVIRONMENT = "dev"
START_SECONDS = WHOLE_SECONDS = 60
NO_SHEDDING = {"max_delay_ms": 60_000}
"""So late no loop is, on the busiest machine: what is measured is work, and overload protection's refusals are none."""
LIMITS = {"rpm": 1_000_000_000, "daily_token_cap": 1_000_000_000_000_000}
GLOBAL_TPM = 1_000_000_000_000
"""Real limits, counted in Redis on every call, that no benchmark reaches."""
_CPU_CLOCK = 2
"""A process's CPU clock by its id, in nanoseconds (clock_getcpuclockid(3), CPUCLOCK_SCHED in posix-timers.h): what
/proc has is in hundredths of a second."""


class Subject(msgspec.Struct, frozen=True):
    """One thing that is measured: where chat requests go and whose CPU time counts."""

    name: str
    url: str
    headers: dict[str, str]
    pid: int
    whole_family: bool = True
    """Whether its children do its work (nginx), and not something beside it (the gateway's shipper)."""
    beside: tuple[int, ...] = ()
    """Processes that do its work with it, with their children."""
    ca_file: str = ""
    """Whose certificates its own is trusted by, where it speaks TLS."""


class Usage(msgspec.Struct, frozen=True):
    """Since the process began. Memory is in bytes: what is resident, and of pages that processes share, their share."""

    cpu_seconds: float
    children_cpu_seconds: float
    memory_bytes: int
    children_memory_bytes: int


def usage(subject: Subject) -> Usage:
    """CPU time of all threads, and memory, of the subject and of its children."""
    own = cpu_seconds(subject.pid), _memory_bytes(subject.pid)
    pids = [pid for pid, _ in family(subject.pid)]
    for beside in subject.beside:
        pids += [beside, *(pid for pid, _ in family(beside))]
    children = [(cpu_seconds(pid), _memory_bytes(pid)) for pid in pids]
    cpu, memory = sum(c for c, _ in children), sum(m for _, m in children)
    if subject.whole_family:
        return Usage(own[0] + cpu, 0.0, own[1] + memory, 0)
    return Usage(own[0], cpu, own[1], memory)


def cpu_seconds(pid: int) -> float:
    """Of all threads since the process began; 0 when there is none."""
    try:
        return time.clock_gettime(~pid << 3 | _CPU_CLOCK)
    except OSError:
        return 0.0


def _memory_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


class Parts:
    """A context manager: nothing runs before it and nothing is left after it. All paths are below `folder`."""

    def __init__(
        self,
        folder: Path,
        config: Path,
        subject_core: int,
        other_cores: set[int],
        trace_ratio: float = 0.1,
        overload: Mapping[str, object] = NO_SHEDDING,
        meaning: bool = False,
    ) -> None:
        self._folder = folder
        self._cached = {CACHED: "exact"} | ({MEANT: "verified"} if meaning else {})
        self._trace_ratio = trace_ratio
        self._overload = overload
        self._config = config
        self._spawners = {
            place: ThreadPoolExecutor(1, initializer=os.sched_setaffinity, initargs=(0, cores))
            for place, cores in (
                ("subject", {subject_core}),
                ("other", other_cores),
                ("all", {subject_core, *other_cores}),
            )
        }
        self._children: list[Child] = []
        self._subjects: list[Child] = []
        self._ports: set[int] = set()
        self._redis_password = secrets.token_hex(16)
        self._postgres_password = secrets.token_hex(16)
        self.redis_url = ""
        self.postgres_url = ""
        self.mock_url = ""

    def __enter__(self) -> Parts:
        # PostgreSQL runs as another user when we are root; it passes through here, and sees nothing.
        self._folder.chmod(0o711)
        (self._folder / "log").mkdir()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for child in self._subjects:
            child.end()  # a drain would only keep the terminal waiting: its spool is deleted with the folder
        for child in reversed(self._children):
            child.ask_to_stop()
        for child in reversed(self._children):
            if not child.wait(5):
                child.end()
        for spawner in self._spawners.values():
            spawner.shutdown()

    def start_backing_services(self) -> None:
        redis_port, postgres_port = self._port(), self._port()
        self._start(services.redis(self._folder / "redis", redis_port, self._redis_password))
        self._start(services.postgres(self._folder / "postgres", postgres_port, self._postgres_password, "gateway"))
        self.redis_url = f"redis://:{self._redis_password}@127.0.0.1:{redis_port}/0"
        self.postgres_url = services.postgres_url(postgres_port, self._postgres_password, "gateway")

    def pid(self, name: str) -> int:
        return next(child.pid for child in self._children if child.service.name == name)

    def start_mock(self, chunk_interval_ms: float) -> Subject:
        port = self._port()
        argv = [sys.executable, "-m", "loadtest.mock_vendor"]
        argv += ["--port", str(port), "--chunk-interval-ms", str(chunk_interval_ms)]
        child = self._start(_http_service("mock", argv, services.plain_environment(os.environ), port, "/"))
        self.mock_url = f"http://127.0.0.1:{port}"
        return Subject("mock", f"{self.mock_url}/openai/v1/chat/completions", {}, child.pid)

    def start_gateway(self, starts: int, bare: bool = False) -> tuple[Subject, list[float]]:
        """The gateway with everything on, and the seconds from each of `starts` spawns to the first 200.

        `bare`: with all off that can be: no limits, so Redis is not asked, no PostgreSQL, no spans.
        """
        service, subject = self._gateway("gateway-bare" if bare else "gateway", _identity(), bare)
        cold_starts = []
        for number in range(starts):
            child = self._start(service, "subject")
            cold_starts.append(time.monotonic() - child.started)
            if number == 0 and not bare:
                self._until_budgets_are_whole()
            if number < starts - 1:
                child.end()
        return msgspec.structs.replace(subject, pid=child.pid), cold_starts

    def _until_budgets_are_whole(self) -> None:
        """A replica rebuilds the counters of a new Redis, and judges by its share until then, without asking it. One
        that is ended over that leaves a mark which keeps the others from it for minutes.
        """
        deadline = time.monotonic() + WHOLE_SECONDS
        with Redis.from_url(self.redis_url) as client:
            while not client.exists(WHOLE):
                if time.monotonic() > deadline:
                    raise StackError(f"The gateway has not rebuilt its budgets in Redis within {WHOLE_SECONDS} s.")
                time.sleep(0.1)

    def start_replicas(self, count: int) -> Subject:
        """So many replicas with everything on, behind Traefik; all of them have all cores, as everything else has."""
        identity = _identity()
        started = [self._gateway(f"replica-{n + 1}-of-{count}", identity) for n in range(count)]
        pids = [self._start(service, "all").pid for service, _ in started]
        urls = [subject.url.removesuffix("/v1/chat/completions") for _, subject in started]
        traefik = self._traefik(f"traefik-{count}", urls, "/health/ready", "all")
        url = f"{traefik.url.removesuffix('/openai/v1/chat/completions')}/v1/chat/completions"
        return Subject(f"replicas-{count}", url, started[0][1].headers, traefik.pid, beside=tuple(pids))

    def _gateway(self, name: str, identity: tuple[str, str], bare: bool = False) -> tuple[Service, Subject]:
        """A replica that is not started, and where calls to it go."""
        port, admin_port = self._port(), self._port()
        public_id, key = identity
        overlay = self._folder / f"{name}.yaml"
        services.write_private(overlay, yaml.safe_dump(self._overlay(public_id, key, bare)))
        argv = gateway_command(port, admin_port, self._config, overlay, self._folder / f"{name}-spool")
        given = {
            "REDIS_URL": self.redis_url,
            "GATEWAY_ADMIN_TOKEN": secrets.token_urlsafe(32),
            "GATEWAY_USER_SALT": secrets.token_urlsafe(32),
            "SIMULATOR_API_KEY": "sk-mock",
        }
        if not bare:
            given |= {"DATABASE_URL": self.postgres_url, "OTEL_EXPORTER_OTLP_ENDPOINT": self.mock_url}
        env = services.replica_environment(os.environ, self._config, given)
        headers = {"authorization": f"Bearer {key}", "x-tenant-id": TENANT}
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        return _http_service(name, argv, env, port, "/health/ready"), Subject(name, url, headers, 0, whole_family=False)

    def _overlay(self, public_id: str, key: str, bare: bool) -> Mapping[str, object]:
        digest = f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"
        providers = services.providers_without_key(self._config, ENVIRONMENT, {})
        return {
            "providers": {
                name: {"base_url": f"{self.mock_url}/{name}/v1"}
                | services.simulated_key(members, f"{self.mock_url}/{name}/token")
                for name, (_, members) in providers.items()
            },
            "service_keys": {
                public_id: {"digest": digest, "service": "bench", "tenants": [TENANT, TRIPPED, URGENT, PATIENT]}
            },
            "plans": {"bench": {"allowed_models": ["*"]}},
            "tenants": {
                TENANT: {"plan": "bench", **({} if bare else LIMITS)},
                TRIPPED: {"plan": "bench", "daily_token_cap": 1},
                URGENT: {"plan": "bench", "priority": "high", **LIMITS},
                PATIENT: {"plan": "bench", "priority": "low", **LIMITS},
            },
            "aliases": {
                name: {"targets": ["openai/gpt-4o-mini"], "cache": {"mode": mode}}
                for name, mode in self._cached.items()
            },
            "global": {"tpm": None if bare else GLOBAL_TPM},
            "gateway": {
                "trace_sample_ratio": 0.0 if bare else self._trace_ratio,
                "overload": self._overload,
            },
        }

    def ledger_rows(self, expected: int, seconds: float) -> int:
        """The rows in PostgreSQL once there are `expected`, or what is there when the time is up."""
        deadline = time.monotonic() + seconds
        try:
            with psycopg.connect(self.postgres_url, autocommit=True) as connection:
                while True:
                    found = connection.execute("SELECT count(*) FROM ledger WHERE tenant_id = %s", [TENANT]).fetchone()
                    count = found[0] if found else 0
                    if count >= expected or time.monotonic() > deadline:
                        return count
                    time.sleep(0.2)
        except psycopg.Error as error:
            raise StackError(f"The ledger could not be counted in PostgreSQL: {error}") from error

    def looks_ms(self, alias: str, since: float) -> float | None:
        """The median of how long the alias's calls looked for an answer from before, as their rows say: of those that
        came after the unix second `since`, when the warming up was over.
        """
        with psycopg.connect(self.postgres_url, autocommit=True) as connection:
            found = connection.execute(
                "SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY (event #>> '{latency_ms,cache_lookup}')::float8)"
                " FROM ledger WHERE tenant_id = %s AND model_alias = %s AND occurred_at >= to_timestamp(%s)",
                [TENANT, alias, since],
            ).fetchone()
        return found[0] if found else None

    def start_traefik(self, tls: bool = False) -> Subject:
        """Traefik as a mere reverse proxy: one router, no middleware, no access log; `tls`: with its end of TLS."""
        name = "traefik-tls" if tls else "traefik"
        return self._traefik(name, [self.mock_url], "/openai/v1/models", "subject", tls)

    def _traefik(self, name: str, servers: Sequence[str], health: str, place: str, tls: bool = False) -> Subject:
        port = self._port()
        dynamic: dict[str, Any] = {
            "http": {
                "routers": {"all": {"rule": "PathPrefix(`/`)", "service": "mock"}},
                "services": {"mock": {"loadBalancer": {"servers": [{"url": url} for url in servers]}}},
            }
        }
        file = self._folder / f"{name}-dynamic.yml"
        argv = [services.traefik_program(), f"--entrypoints.web.address=127.0.0.1:{port}"]
        ca_file = ""
        if tls:
            (folder := self._folder / name).mkdir()
            certificates = local_ca.ensure(folder)
            ca_file = str(certificates.ca_file)
            shown = {"certFile": str(certificates.cert_file), "keyFile": str(certificates.key_file)}
            dynamic["tls"] = {"stores": {"default": {"defaultCertificate": shown}}}
            argv += ["--entrypoints.web.http.tls=true"]
        file.write_text(yaml.safe_dump(dynamic))
        argv += [f"--providers.file.filename={file}", "--providers.file.watch=false"]
        argv += ["--global.checknewversion=false", "--global.sendanonymoususage=false", "--log.level=ERROR"]
        # One core is what it has; told so, its scheduler does not spread over cores that it may not use.
        env = {**services.plain_environment(os.environ), **({"GOMAXPROCS": "1"} if place == "subject" else {})}
        child = self._start(_http_service(name, argv, env, port, health, ca_file), place)
        url = f"http{'s' if tls else ''}://127.0.0.1:{port}/openai/v1/chat/completions"
        return Subject(name, url, {}, child.pid, ca_file=ca_file)

    def start_edge(self, subject: Subject) -> Subject:
        """Traefik as shipped, with TLS and all its middlewares, before the subject and not on its core."""
        port = self._port()
        folder = self._folder / "edge"
        folder.mkdir()
        certificates = local_ca.ensure(folder)
        replica = subject.url.removesuffix("/v1/chat/completions")
        service = services.traefik(folder, port, self._port(), [replica], certificates)
        self.ca_file = certificates.ca_file
        child = self._start(service)
        return Subject("edge", subject.url.replace(replica, f"https://127.0.0.1:{port}"), subject.headers, child.pid)

    def start_peer(self, name: str) -> tuple[Subject, str]:
        """LiteLLM's proxy or Portkey's gateway, and its version; installs it where that was not done. StackError."""
        port = self._port()
        peer = (
            peers.portkey(port, self.mock_url)
            if name == "portkey"
            else peers.litellm(port, self.mock_url, self._folder)
        )
        child = self._start(_http_service(peer.name, peer.argv, peer.env, port, peer.health), "subject")
        return Subject(peer.name, f"http://127.0.0.1:{port}{peer.chat}", peer.headers, child.pid), peer.version

    def start_nginx(self, prefix: Sequence[str] = (), options: Sequence[str] = ()) -> Subject:
        """nginx proxy_pass with kept-alive upstream connections, unbuffered. `prefix` is what it is run under."""
        program = nginx_program()
        if program is None:
            raise StackError("nginx is not installed.")
        port = self._port()
        configuration = self._folder / "nginx.conf"
        configuration.write_text(_nginx_configuration(self._folder, port, self.mock_url.removeprefix("http://")))
        argv = [*prefix, program, "-p", str(self._folder), "-c", str(configuration)]
        argv += ["-e", str(self._folder / "log/nginx.err"), *options]
        child = self._start(
            _http_service("nginx", argv, services.plain_environment(os.environ), port, "/openai/v1/models"), "subject"
        )
        return Subject("nginx", f"http://127.0.0.1:{port}/openai/v1/chat/completions", {}, child.pid)

    def stop(self, subject: Subject, seconds: float) -> None:
        """Asks it to end and waits for that; raises `StackError` where it does not."""
        child = next(one for one in [*self._subjects, *self._children] if one.pid == subject.pid)
        child.ask_to_stop()
        if not child.wait(seconds):
            raise StackError(f"{subject.name} did not end within {seconds:g} s of being asked to.")

    def _port(self) -> int:
        port = free_port(self._ports)
        self._ports.add(port)
        return port

    def _start(self, service: Service, place: str = "other") -> Child:
        """Starts it and waits until it answers; raises `StackError` with the end of its log otherwise."""
        child = Child(service, self._folder / "log", self._spawners[place])
        (self._children if place == "other" else self._subjects).append(child)
        child.start()
        deadline = time.monotonic() + START_SECONDS
        while not child.answers():
            if child.exit_status is not None:
                raise StackError(f"{service.name} ended while it was starting. Its last words:\n{child.last_words()}")
            if time.monotonic() > deadline:
                raise StackError(
                    f"{service.name} did not answer within {START_SECONDS} s. Its last words:\n{child.last_words()}"
                )
            time.sleep(0.005)
        return child


def _identity() -> tuple[str, str]:
    """A service key's public id, and the key."""
    public_id = "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(12))
    return public_id, f"sk-gw-{public_id}-{secrets.token_urlsafe(32)}"


def gateway_command(port: int, admin_port: int, config: Path, overlay: Path, spool: Path) -> Sequence[str]:
    argv = [sys.executable, "-m", "app.cli", "serve", "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--admin-port", str(admin_port), "--config", str(config), "--environment", ENVIRONMENT]
    return [*argv, "--overlay", str(overlay), "--spool-dir", str(spool)]


def nginx_program() -> str | None:
    """The nginx of this machine, from wherever distributions put it; None when there is none."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


def traefik_installed() -> bool:
    try:
        services.traefik_program()
    except StackError:
        return False
    return True


def versions(names: Sequence[str]) -> dict[str, str]:
    """What the measured programs call themselves; empty for those that do not say."""
    commands = {"nginx": [nginx_program() or "nginx", "-v"]}
    if {"traefik", "traefik-tls"} & set(names):
        commands["traefik"] = [services.traefik_program(), "version"]
    found = {}
    for name in set(names) & commands.keys():
        said = subprocess.run(commands[name], capture_output=True, text=True, check=False, timeout=10)
        words = (said.stdout + said.stderr).replace("nginx/", "").split()
        found[name] = next((word for word in words if word[:1].isdigit()), "")
    return found


def _http_service(
    name: str, argv: Sequence[str], env: Mapping[str, str], port: int, path: str, ca_file: str = ""
) -> Service:
    tls = ssl.create_default_context(cafile=ca_file) if ca_file else None
    return Service(name, argv, env, lambda: get("127.0.0.1", port, path, tls)[0] == 200)


def _nginx_configuration(folder: Path, port: int, upstream: str) -> str:
    temporary = "\n".join(
        f"  {kind}_temp_path {folder}/nginx-{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    return f"""
{user}
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
events {{ worker_connections 4096; }}
http {{
{temporary}
  access_log off;
  keepalive_requests 1000000000;
  upstream mock {{ server {upstream}; keepalive 256; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    location / {{
      proxy_pass http://mock;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""
