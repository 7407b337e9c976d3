"""The running stack: what it is, and how it starts, is watched and stops."""

from __future__ import annotations

import json
import os
import ssl
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import msgspec
import yaml

from loadtest import local_ca, services
from loadtest.processes import ROOT, Child, Service
from loadtest.services import StackError, get, write_private

from . import replica_setup, service_account, state_folder
from .replica_setup import TENANT

START_SECONDS = 60
"""How long a service may take until it answers; the first start of PostgreSQL on a slow disk is the longest."""
DRAIN_SECONDS = 30
"""How long a stop waits for open streams. A replica would wait half an hour; a person at a terminal would not."""
HURRY_SECONDS = 5
"""How long a replica may then take to end its streams and write their rows."""
AGAIN_SECONDS = 1
"""After so long without an end it is told again."""
RESTART_SECONDS = 1.0
"""Until a replica that ended is started again, as with Docker's restart policy."""
DATABASE = "gateway"


class Replica(msgspec.Struct, frozen=True):
    """One gateway replica as it runs now; the pid is another after a restart, the URLs stay."""

    name: str
    url: str
    admin_url: str
    pid: int


class Stack:
    """The stack in `state_dir`: entering starts it and returns when everything answers, leaving stops it.

    port: Traefik's TLS port, 0 for a free one. overlay: merged over the configuration last, so that tests can shorten
    timeouts or add tenants and keys. dynamic: the folder of Traefik's dynamic files. environ: where vendor keys are
    looked for. replica_command: what is run instead of `gateway serve`, with its options appended. report: gets one
    line for each step and each event.
    Raises `StackError`. Services are named redis, postgres, simulator, traefik, replica-1, replica-2, ...
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        port: int = 0,
        replicas: int = 2,
        config: Path = ROOT / "config",
        dynamic: Path = services.TRAEFIK / "dynamic",
        environment: str = "dev",
        overlay: Mapping[str, Any] | Callable[[str], Mapping[str, Any]] | None = None,
        environ: Mapping[str, str] = os.environ,
        replica_command: Sequence[str] = (sys.executable, "-m", "app.cli", "serve"),
        ready_file: Path | None = None,
        drain_seconds: float = DRAIN_SECONDS,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.state_dir = Path(state_dir).resolve()
        self.config = Path(config).resolve()
        self.dynamic = Path(dynamic).resolve()
        self.environment = environment
        self.hurry = threading.Event()
        """Set: stop without waiting for open streams."""
        self.closing = False
        self.log_dir = self.state_dir / "log"
        self._extra = overlay or {}
        self._environ = environ
        self._replica_command = tuple(replica_command)
        self._replica_count = replicas
        self._ready_files = [self.state_dir / "ready.json"] + ([Path(ready_file).resolve()] if ready_file else [])
        self._drain_seconds = drain_seconds
        self._report = report
        self._wanted_port = port
        self._children: dict[str, Child] = {}
        self._ports: dict[str, int] = {}
        self._spawner = ThreadPoolExecutor(1, thread_name_prefix="spawner")
        self._watch_ends = threading.Event()
        self._watcher: threading.Thread | None = None
        self._change = threading.RLock()
        self._lock: IO[str] | None = None

    # --- what it is -------------------------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        return self._ports["traefik"]

    @property
    def url(self) -> str:
        """Traefik's address without /v1."""
        return f"https://127.0.0.1:{self.port}"

    @property
    def ca_file(self) -> Path:
        return self.state_dir / "tls" / "ca.pem"

    @property
    def key(self) -> str:
        return self._secrets.key

    @property
    def tenant(self) -> str:
        return TENANT

    @property
    def admin_token(self) -> str:
        return self._secrets.admin_token

    @property
    def replicas(self) -> list[Replica]:
        return [
            Replica(name, self._local_url(name), self._local_url(f"{name}-admin"), self._children[name].pid)
            for name in self._replica_names
            if name in self._children
        ]

    @property
    def admin_url(self) -> str:
        """The admin port of the first replica; each has its own."""
        return self._local_url("replica-1-admin")

    @property
    def redis_url(self) -> str:
        return f"redis://:{self._secrets.redis_password}@127.0.0.1:{self._ports['redis']}/0"

    @property
    def postgres_url(self) -> str:
        return services.postgres_url(self._ports["postgres"], self._secrets.postgres_password, DATABASE)

    @property
    def simulator_url(self) -> str | None:
        """None where every provider has a key in the environment."""
        return self._local_url("simulator") if "simulator" in self._children else None

    @property
    def traefik_metrics_url(self) -> str:
        return self._local_url("traefik-internal") + "/metrics"

    def tls(self) -> ssl.SSLContext:
        """A client's context that trusts the local CA and nothing else."""
        return ssl.create_default_context(cafile=str(self.ca_file))

    def ready(self) -> dict[str, Any]:
        """What the ready file holds."""
        return {
            "url": self.url,
            "ca_file": str(self.ca_file),
            "client_cert_file": str(self.ca_file.with_name("client.pem")),
            "client_key_file": str(self.ca_file.with_name("client.key")),
            "key": self.key,
            "tenant": self.tenant,
            "admin_url": self.admin_url,
            "admin_token": self.admin_token,
            "replicas": [{"url": r.url, "admin_url": r.admin_url, "pid": r.pid} for r in self.replicas],
            "redis_url": self.redis_url,
            "postgres_url": self.postgres_url,
            "simulator_url": self.simulator_url,
            "traefik_pid": self.pid("traefik"),
            "supervisor_pid": os.getpid(),
            "pids": {name: child.pid for name, child in self._children.items()},
        }

    # --- one service at a time, for drills and tests ----------------------------------------------------------------

    def pid(self, name: str) -> int:
        return self._children[name].pid

    def stop(self, name: str, seconds: float = 60) -> None:
        """Stops one service in its orderly way and leaves it stopped."""
        with self._change:
            child = self._children[name]
            child.ask_to_stop()
        if not child.wait(seconds):
            child.end()

    def kill(self, name: str) -> None:
        """Kills one service (SIGKILL) and leaves it dead. To see a replica restarted, kill its pid instead."""
        with self._change:
            self._children[name].end()

    def start(self, name: str) -> None:
        """Starts a stopped service on its old port with its old data, and waits until it answers."""
        with self._change:
            self._children[name].start()
            self._await([name])
            self._write_ready()

    def freeze(self, name: str) -> None:
        """SIGSTOP: its connections stay open and nothing answers, which is worse than dead."""
        self._children[name].freeze()

    def thaw(self, name: str) -> None:
        self._children[name].thaw()

    # --- starting ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Stack:
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _open(self) -> None:
        began = time.monotonic()
        self._lock = state_folder.take(self.state_dir)
        names = ["redis", "postgres", "simulator", "traefik", "traefik-internal"]
        names += [*self._replica_names, *(f"{name}-admin" for name in self._replica_names)]
        fixed = {"traefik": self._wanted_port} if self._wanted_port else {}
        self._ports = state_folder.kept_ports(self.state_dir, names, fixed)
        self._secrets = state_folder.kept_secrets(self.state_dir)
        certificates = local_ca.ensure(self.state_dir / "tls")
        simulated = services.providers_without_key(self.config, self.environment, self._environ)
        if simulated:
            self._launch(services.simulator(self._ports["simulator"]))
        self._launch(services.redis(self.state_dir / "redis", self._ports["redis"], self._secrets.redis_password))
        options, environ = self._prepare_replicas(simulated)
        if not (self.state_dir / "postgres").exists():
            self._report("  postgres   makes its data folder, on the first start only")
        self._launch(
            services.postgres(
                self.state_dir / "postgres", self._ports["postgres"], self._secrets.postgres_password, DATABASE
            )
        )
        self._await(list(self._children))
        for number, name in enumerate(self._replica_names, 1):
            ports = ["--port", str(self._ports[name]), "--admin-port", str(self._ports[f"{name}-admin"])]
            argv = [*self._replica_command, *ports, *options]
            self._launch(services.replica(number, self._ports[name], argv, environ))
        self._await(self._replica_names)
        # Last: Traefik takes replicas for healthy at first, so now it need not learn otherwise.
        self._launch(
            services.traefik(
                self.state_dir / "traefik",
                self.port,
                self._ports["traefik-internal"],
                [r.url for r in self.replicas],
                certificates,
                self.dynamic,
                edge_secret=self._secrets.edge_secret,
            )
        )
        self._await(["traefik"], answers=self._answers_through_traefik)
        self._report(f"everything answers after {time.monotonic() - began:.1f} s")
        watcher = threading.Thread(target=self._watch, name="watcher", daemon=True)
        watcher.start()
        self._watcher = watcher  # a Ctrl-C until here leaves nothing to join; the ready file says that one may come
        self._write_ready()

    @property
    def _replica_names(self) -> list[str]:
        return [f"replica-{number}" for number in range(1, self._replica_count + 1)]

    def _local_url(self, port_name: str) -> str:
        return f"http://127.0.0.1:{self._ports[port_name]}"

    def _prepare_replicas(
        self, simulated: Mapping[str, tuple[str, tuple[str, ...]]]
    ) -> tuple[list[str], dict[str, str]]:
        """What replicas are started with: the options that all share, and the environment. Raises `StackError`."""
        file = self.state_dir / "overlay.yaml"
        tenants = services.section(self.config, self.environment, "tenant_policy.yaml", "tenants")
        simulator_url = self._local_url("simulator")
        extra = self._extra(simulator_url) if callable(self._extra) else self._extra
        document = replica_setup.overlay(self.key, simulated, simulator_url, tenants, extra)
        write_private(file, yaml.safe_dump(document, sort_keys=False))
        given = {
            "REDIS_URL": self.redis_url,
            "DATABASE_URL": self.postgres_url,
            "GATEWAY_ADMIN_TOKEN": self.admin_token,
            "GATEWAY_USER_SALT": self._environ.get("GATEWAY_USER_SALT") or self._secrets.user_salt,
            "GATEWAY_EDGE_SECRET": self._secrets.edge_secret,
            "SIMULATOR_API_KEY": "simulator",
        }
        if any(members == services.ACCOUNT for _, members in simulated.values()):
            given["SIMULATOR_SERVICE_ACCOUNT"] = service_account.key_file()
        environ = services.replica_environment(self._environ, self.config, given)
        replica_setup.check(self.config, self.environment, file, environ)
        shared = {
            "host": "127.0.0.1",
            "config": self.config,
            "environment": self.environment,
            "overlay": file,
            "spool-dir": self.state_dir / "spool",
        }
        return [word for name, value in shared.items() for word in (f"--{name}", str(value))], environ

    def _launch(self, service: Service) -> None:
        child = Child(service, self.log_dir, self._spawner)
        self._children[service.name] = child
        child.start()

    def _await(self, names: Sequence[str], answers: Callable[[], bool] | None = None) -> None:
        """Waits until each of these services answers; raises StackError when one ends or takes too long."""
        waiting = [self._children[name] for name in names]
        deadline = time.monotonic() + START_SECONDS
        while waiting:
            for child in list(waiting):
                name = child.service.name
                if child.exit_status is not None:
                    raise StackError(
                        f"{name} ended while it was starting ({_how(child.exit_status)}). The end of {child.log}:\n"
                        f"{child.last_words()}"
                    )
                if child.answers() and (answers is None or answers()):
                    self._report(f"  {name:<10} answers after {time.monotonic() - child.started:.1f} s")
                    waiting.remove(child)
                elif time.monotonic() > deadline:
                    raise StackError(
                        f"{name} did not answer within {START_SECONDS} s. The end of {child.log}:\n{child.last_words()}"
                    )
            time.sleep(0.01)

    def _answers_through_traefik(self) -> bool:
        try:
            status, body = get("127.0.0.1", self.port, "/health", self.tls())
        except OSError:
            return False
        return status == 200 and b"ok" in body

    def _write_ready(self) -> None:
        for file in self._ready_files:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_private(file, json.dumps(self.ready(), indent=2) + "\n")

    # --- while it runs ----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._watch_ends.wait(0.1):
            self._watch_once()

    def _watch_once(self) -> None:
        for name, child in list(self._children.items()):
            with self._change:
                if child.held or child.exit_status is None:
                    continue
                how = _how(child.exit_status)
                if not child.service.restarts:
                    child.held = True
                    self._report(f"{name} ended ({how}) and is not started again; its log is {child.log}.")
                    continue
            # The lock is free meanwhile: a stop need not wait for this.
            if self._watch_ends.wait(RESTART_SECONDS):
                return
            with self._change:
                if child.held:
                    continue
                child.end()  # what it had started goes with it, as in a container
                child.start()
                began = child.started
            while child.exit_status is None and not child.answers():
                if self._watch_ends.wait(0.02):
                    return
            if child.exit_status is None:
                self._write_ready()
                self._report(
                    f"{name} ended ({how}) and was started again: process {child.pid}, "
                    f"answers after {time.monotonic() - began:.1f} s."
                )
            else:
                self._report(f"{name} ended ({how}), was started again and ended again; its log is {child.log}.")

    # --- stopping ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stops everything: Traefik takes no more calls, replicas finish theirs, then what they need. Never raises."""
        if self.closing:
            return
        self.closing = True
        self._watch_ends.set()
        if self._watcher:
            self._watcher.join()
        self._spawner.submit(int).result()  # an interrupted start may still be spawning
        for file in self._ready_files if self._lock else []:
            file.unlink(missing_ok=True)
        if self._children:
            self._report(
                f"Stopping: open streams may end within {self._drain_seconds:g} s. A second Ctrl-C ends them now."
            )
        with self._change:
            front = [child for name, child in self._children.items() if name == "traefik"]
            replicas = [child for child in self._children.values() if child.service.restarts]
            behind = [child for child in self._children.values() if child not in front + replicas]
            for child in self._children.values():
                child.thaw()
            for child in front + replicas:
                child.ask_to_stop()
            if not self._wait_for(replicas, self._drain_seconds):
                self.hurry.clear()
                # The second time a replica ends its streams and writes their rows; two signals at once may be one.
                for _ in range(round(HURRY_SECONDS / AGAIN_SECONDS)):
                    for child in replicas:
                        child.ask_to_stop()
                    if self._wait_for(replicas, AGAIN_SECONDS) or self.hurry.is_set():
                        break
            for child in replicas:
                child.end()
            self._wait_for(front, 1)  # with no replica left, Traefik has nothing to finish
            for child in behind:
                child.ask_to_stop()
            self._wait_for(behind, 10)
            for child in front + behind:
                child.end()
            self._children.clear()
        self._spawner.shutdown()
        if self._lock:
            self._lock.close()
            self._lock = None

    def _wait_for(self, children: Sequence[Child], seconds: float) -> bool:
        """Whether all are gone within `seconds`; gives up when somebody is in a hurry."""
        deadline = time.monotonic() + seconds
        while not all(child.wait(0) for child in children):
            if self.hurry.is_set() or time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def _how(status: int | None) -> str:
    return f"signal {-status}" if status and status < 0 else f"exit code {status}"
