"""The command line. Every runbook step is one of these, or curl."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from app.ambient import Ambient, timestamp
from app.config import NAME, ConfigError, Secret, load

_EMPTY_SECTION = re.compile(r"^service_keys:\s*(\{\s*\})?\s*$", re.MULTILINE)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 1 it could not be done (the sentence is on standard error), 2 wrong usage."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except ConfigError as error:
        return _fail(f"The configuration is not valid:\n{error}")
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0


def _fail(sentence: str) -> int:
    sys.stderr.write(sentence.rstrip() + "\n")
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gateway", description="The LLM gateway.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help)
        made.set_defaults(run=run)
        return made

    up = command("up", _up, "Start the whole stack on this machine: Traefik, replicas, Redis, PostgreSQL, simulator.")
    up.add_argument("--port", type=int, default=4000, help="Traefik's TLS port (4000)")
    up.add_argument("--state-dir", type=Path, default=Path(".gateway"), help="data, logs, certificates (.gateway)")
    up.add_argument("--replicas", type=int, default=2, help="gateway replicas (2)")
    _config_options(up, overlays=False)
    up.add_argument("--ready-file", type=Path, help="write the ready page as JSON here")
    up.add_argument("--detach", action="store_true", help="return when ready; `gateway down` stops it")

    down = command("down", _down, "Stop a stack that `gateway up --detach` started.")
    down.add_argument("--state-dir", type=Path, default=Path(".gateway"))

    serve = command("serve", _serve, "Run one replica.")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8080)
    serve.add_argument("--admin-port", type=int, default=9090)
    serve.add_argument("--spool-dir", type=Path, default=Path(".gateway/spool"), help="the ledger's local disk")
    _config_options(serve)

    check = command("check", _check, "Load the configuration as a replica would, and say every fault at once.")
    check.add_argument("--no-secrets", action="store_true", help="pass where env: and file: references are missing")
    _config_options(check)

    keys = command("keys", _keys_new, "Service keys.")
    actions = keys.add_subparsers(required=True, metavar="ACTION")
    new = actions.add_parser("new", help="Make a key: shown once, its digest is added to service_keys.yaml.")
    new.set_defaults(run=_keys_new)
    new.add_argument("--service", required=True, help="who will call with it")
    new.add_argument("--tenant", required=True, action="append", help="whom it may act for; repeatable; '*' for all")
    new.add_argument("--expires", type=date.fromisoformat, help="last valid day, YYYY-MM-DD (UTC)")
    new.add_argument("--config", type=Path, default=Path("config"))

    usage = command("usage", _usage, "A tenant's day, from the ledger in PostgreSQL.")
    usage.add_argument("--tenant", required=True)
    usage.add_argument("--day", help="YYYY-MM-DD (UTC; today by default)")
    usage.add_argument("--json", action="store_true")
    usage.add_argument("--database-url", default=os.environ.get("DATABASE_URL"), help="DATABASE_URL by default")
    return parser


def _config_options(parser: argparse.ArgumentParser, overlays: bool = True) -> None:
    parser.add_argument("--config", type=Path, default=Path("config"), help="the configuration folder (config)")
    parser.add_argument(
        "--environment", default=os.environ.get("GATEWAY_ENVIRONMENT", "dev"), help="ci, dev, staging, prod (dev)"
    )
    if overlays:
        parser.add_argument("--overlay", type=Path, action="append", default=[], help="YAML merged over it; repeatable")


def _up(arguments: argparse.Namespace) -> int:
    try:
        from loadtest import stack
    except ImportError as error:
        return _fail(f"`gateway up` needs the development dependencies ({error.name} is missing): run `make up`.")
    return stack.up(arguments)


def _down(arguments: argparse.Namespace) -> int:
    try:
        from loadtest import stack
    except ImportError as error:
        return _fail(f"`gateway down` needs the development dependencies ({error.name} is missing): run `make up`.")
    return stack.down(arguments)


def _serve(arguments: argparse.Namespace) -> int:
    from app.asgi import Options, serve

    token = os.environ.get("GATEWAY_ADMIN_TOKEN")
    return serve(
        Options(
            host=arguments.host,
            port=arguments.port,
            admin_port=arguments.admin_port,
            config=arguments.config,
            environment=arguments.environment,
            overlays=tuple(arguments.overlay),
            spool_dir=arguments.spool_dir,
            name=f"{os.environ.get('GATEWAY_REPLICA_ID', 'replica')}-{os.getpid()}-{Ambient().key_id()[:6]}",
            redis_url=os.environ.get("REDIS_URL"),
            database_url=os.environ.get("DATABASE_URL"),
            admin_token=Secret(token) if token else None,
        )
    )


def _check(arguments: argparse.Namespace) -> int:
    config = load(arguments.config, arguments.environment, arguments.overlay, require_secrets=not arguments.no_secrets)
    print(
        f"The configuration is valid: version {config.version}, environment {config.environment}, "
        f"{len(config.aliases)} aliases, {len(config.tenants)} tenants, {len(config.keys)} keys, "
        f"prices of {config.price_version}."
    )
    unpriced = sorted({t.name for alias in config.aliases.values() for t in alias.targets if not t.priced})
    if unpriced:
        print(f"Without a price, charged at the ceiling: {', '.join(unpriced)}.")
    return 0


def _keys_new(arguments: argparse.Namespace) -> int:
    ambient = Ambient()
    if not NAME.fullmatch(arguments.service):
        return _fail(f"--service must match {NAME.pattern}.")
    public = ambient.key_id()
    key = f"sk-gw-{public}-{ambient.key_secret()}"
    file = arguments.config / "service_keys.yaml"
    try:
        before = file.read_text()
    except OSError as error:
        return _fail(f"{file} cannot be read ({error.strerror}); --config names the configuration folder.")
    tenants = ", ".join(f'"{tenant}"' for tenant in arguments.tenant)
    entry = (
        f"  {public}:  # made {timestamp(ambient.now())[:10]}\n"
        f"    digest: sha256:{hashlib.sha256(key.encode()).hexdigest()}\n"
        f"    service: {arguments.service}\n"
        f"    tenants: [{tenants}]\n"
    )
    if arguments.expires:
        entry += f"    expires: {arguments.expires.isoformat()}\n"
    text = _EMPTY_SECTION.sub("service_keys:", before)
    if not re.search(r"^service_keys:", text, re.MULTILINE):
        text += "service_keys:\n"
    _replace(file, text.rstrip("\n") + "\n" + entry)
    try:
        for environment in sorted(path.stem for path in (arguments.config / "environments").glob("*.yaml")):
            load(arguments.config, environment, require_secrets=False)
    except ConfigError:
        _replace(file, before)
        raise
    print(key)
    sys.stderr.write(
        f"This is the only time the key is shown. Its digest is in {file} as {public}; "
        "replicas take it within 5 s of the file reaching them.\n"
    )
    return 0


def _replace(file: Path, text: str) -> None:
    """Writes the file whole or not at all."""
    beside = file.with_name(f".{file.name}.new")
    beside.write_text(text)
    beside.replace(file)


def _usage(arguments: argparse.Namespace) -> int:
    import asyncio

    from app import reports
    from app.archive import ArchiveError

    if not arguments.database_url:
        return _fail("Which PostgreSQL? Set DATABASE_URL, or give --database-url.")
    day = arguments.day or timestamp(Ambient().now())[:10]
    try:
        on = date.fromisoformat(day)
    except ValueError:
        return _fail(f"{day!r} is not a day: YYYY-MM-DD.")
    try:
        report = asyncio.run(reports.usage(arguments.database_url, arguments.tenant, on))
    except ArchiveError as error:
        return _fail(str(error))
    print(report.json() if arguments.json else report.text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
