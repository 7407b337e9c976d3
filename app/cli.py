"""The command line. Every runbook step is one of these, or curl."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import msgspec

from app import (
    cache_commands,
    content_commands,
    explain,
    keys,
    ledger_commands,
    mode_commands,
    money_commands,
    price_commands,
    top,
)
from app.ambient import Ambient
from app.config import NAME, ConfigError, Secret, load, price_tables, utc_day
from app.operator import audit, operator
from app.release import VERSION
from app.terminal import WHICH_POSTGRES, address, count, database_option, day, fail, port, redis_option


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 1 it could not be done (the sentence is on standard error), 2 wrong usage."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except ConfigError as error:
        return fail(f"The configuration is not valid:\n{error}")
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gateway", description="The LLM gateway.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help.replace("%", "%%"), description=help)  # `help` is a format
        made.set_defaults(run=run)
        return made

    up = command("up", _up, "Start the whole stack on this machine: Traefik, replicas, Redis, PostgreSQL, simulator.")
    up.add_argument("--port", type=port, default=4000, help="Traefik's TLS port (4000)")
    up.add_argument("--state-dir", type=Path, default=Path(".gateway"), help="data, logs, certificates (.gateway)")
    up.add_argument("--replicas", type=count, default=2, help="gateway replicas (2)")
    _config_options(up, overlays=False)
    up.add_argument("--ready-file", type=Path, help="write the ready page as JSON here")
    up.add_argument("--detach", action="store_true", help="return when ready; `gateway down` stops it")

    down = command("down", _down, "Stop a stack that `gateway up --detach` started.")
    down.add_argument("--state-dir", type=Path, default=Path(".gateway"), help="that it was started with (.gateway)")

    serve = command("serve", _serve, "Run one replica.")
    serve.add_argument("--host", default="127.0.0.1", help="the address of both ports (127.0.0.1)")
    serve.add_argument("--port", type=port, default=8080, help="calls, from Traefik alone (8080)")
    serve.add_argument("--admin-port", type=port, default=9090, help="metrics, status, administration (9090)")
    spool = "the ledger's local disk (.gateway/spool)"
    serve.add_argument("--spool-dir", type=Path, default=Path(".gateway/spool"), help=spool)
    _config_options(serve)

    check = command("check", _check, "Load the configuration as a replica would, and say every fault at once.")
    check.add_argument("--no-secrets", action="store_true", help="pass where env: and file: references are missing")
    _config_options(check)
    explain.add(check)

    _keys_options(command("keys", _keys_list, "Service keys: make, rotate, revoke, list."))

    prices = command("prices", price_commands.list_prices, "What calls cost: the price table in force.")
    price_commands.add(prices, _config_options)

    usage = command("usage", _usage, "A tenant's day, from the ledger in PostgreSQL.")
    usage.add_argument("--tenant", required=True, help="whose")
    usage.add_argument("--day", type=day, help="YYYY-MM-DD (UTC; today by default)")
    usage.add_argument("--json", action="store_true", help="for machines")
    database_option(usage)

    lint = command("lint-apps", _lint_apps, "Find direct vendor calls in an app's source: hosts, SDK addresses, keys.")
    lint.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="a folder or file of the app")
    lint.add_argument("--json", action="store_true", help="for machines")

    preship = command("preship", _preship, "Run the six gates of a release; 1 when a blocking one is missed.")
    _gate_options(preship)
    database_option(preship)
    preship.add_argument(
        "--apps", type=Path, action="append", default=[], help="an app's source, for lint-apps; repeatable"
    )
    preship.add_argument("--report", type=Path, help="write an HTML page here, and JSON beside it")

    drills = command("drill", _drill, "Let something fail on purpose, and see that callers notice nothing.")
    drill = drills.add_subparsers(required=True, metavar="DRILL").add_parser(
        "fallback", help="block the primary vendor under load: preship's gate, alone; 1 when calls do not get through"
    )
    _gate_options(drill)

    mode_commands.add(command)
    cache_commands.add(command)
    content_commands.add(command)
    top.add(command)
    money_commands.add(command)
    ledger_commands.add(command)
    return parser


def _gate_options(parser: argparse.ArgumentParser) -> None:
    """What `preship` and its drill have to know of the gateway that they call."""
    parser.add_argument("--target", type=address, metavar="URL", help="the gateway to call (a stack of its own)")
    parser.add_argument("--key", default=os.environ.get("HELLO_SHIP_GATEWAY_KEY"), help="HELLO_SHIP_GATEWAY_KEY")
    parser.add_argument("--tenant", default="smoke-test", help="on whose behalf the calls are (smoke-test)")
    parser.add_argument("--ca-file", type=Path, help="what the target's certificate is verified with")
    parser.add_argument("--simulator-url", type=address, metavar="URL", help="where the target's vendors are simulated")
    parser.add_argument(
        "--admin-url",
        type=address,
        action="append",
        default=[],
        metavar="URL",
        help="a replica's admin port; repeatable",
    )
    parser.add_argument("--admin-token", default=os.environ.get("GATEWAY_ADMIN_TOKEN"), help="GATEWAY_ADMIN_TOKEN")
    parser.add_argument("--gates", type=Path, help="thresholds, evals and faults (loadtest/gate/gates.yaml)")


def _keys_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def action(name: str, run: object, help: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=help, description=help)
        made.set_defaults(run=run)
        made.add_argument("--config", type=Path, default=Path("config"), help="the configuration folder (config)")
        return made

    new = action("new", _keys_new, "Make a key: shown once, its digest is added to service_keys.yaml.")
    new.add_argument("--service", required=True, help="who will call with it")
    new.add_argument("--tenant", required=True, action="append", help="whom it may act for; repeatable; '*' for all")
    new.add_argument(
        "--role", choices=("call", "usage"), action="append", help="call models, or read usage; repeatable (call)"
    )
    new.add_argument("--expires", type=day, help="last valid day, YYYY-MM-DD (UTC)")

    rotate = action("rotate", _keys_rotate, "Make a key that takes another's place; the old one stays for a while.")
    rotate.add_argument("key", help="the old key's id: its 12 characters after sk-gw-")
    rotate.add_argument("--overlap-days", type=int, default=7, help="how long the old key stays valid (7)")
    rotate.add_argument("--expires", type=day, help="the new key's last valid day, YYYY-MM-DD (UTC)")

    revoke = action("revoke", _keys_revoke, "Revoke a key for good: in the file, and on every replica within 2 s.")
    revoke.add_argument("key", help="its id: the 12 characters after sk-gw-")
    revoke.add_argument("--reason", default="", help="a word for the audit line")
    redis_option(revoke)

    lists = action("list", _keys_list, "Ids, services, tenants and states. The keys themselves are stored nowhere.")
    lists.add_argument("--json", action="store_true", help="for machines")


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
        return fail(f"`gateway up` needs the development dependencies ({error.name} is missing): run `make up`.")
    return stack.up(arguments)


def _down(arguments: argparse.Namespace) -> int:
    try:
        from loadtest import stack
    except ImportError as error:
        return fail(f"`gateway down` needs the development dependencies ({error.name} is missing): run `make up`.")
    return stack.down(arguments)


def _lint_apps(arguments: argparse.Namespace) -> int:
    from app.lint_apps import direct_calls

    if missing := [str(path) for path in arguments.paths if not path.exists()]:
        return fail(f"There is no {', '.join(missing)}.")
    found = [call for path in arguments.paths for call in direct_calls(path)]
    if arguments.json:
        print(msgspec.json.encode(found).decode())
    else:
        print("\n".join(map(str, found)) or "No direct vendor call.")
    return 1 if found else 0


def _drill(arguments: argparse.Namespace) -> int:
    try:
        from loadtest.gate import drill
    except ImportError as error:
        return fail(f"`gateway drill` needs the development dependencies ({error.name} is missing): run `make up`.")
    return drill(arguments)


def _preship(arguments: argparse.Namespace) -> int:
    try:
        from loadtest.gate import preship
    except ImportError as error:
        return fail(f"`gateway preship` needs the development dependencies ({error.name} is missing): run `make up`.")
    return preship(arguments)


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
    if arguments.explain:
        return explain.run(arguments, config)
    print(
        f"The configuration is valid: version {config.version}, environment {config.environment}, "
        f"{len(config.aliases)} aliases, {len(config.tenants)} tenants, {len(config.keys)} keys, "
        f"prices of {config.price_version}."
    )
    for table in price_tables(arguments.config):
        if table.stem > config.price_version:  # in force on a later day: its faults would be found at midnight
            load(
                arguments.config, arguments.environment, arguments.overlay,
                require_secrets=False, day=date.fromisoformat(table.stem),
            )  # fmt: skip
    unpriced = sorted(
        f"{target.name} ({target.provider.name} {target.priced_as})"
        for target in config.targets.values()
        if not target.priced
    )
    if unpriced:
        return fail(
            f"Without a price, and so charged at the ceiling: {', '.join(unpriced)}. Add them to a price table in "
            f"{arguments.config / 'prices'}; `gateway prices sync` writes one."
        )
    return 0


def _keys_new(arguments: argparse.Namespace) -> int:
    if not NAME.fullmatch(arguments.service):
        return fail(f"--service must match {NAME.pattern}.")
    ambient = Ambient()
    try:
        roles = arguments.role or ("call",)
        made = keys.new(arguments.config, ambient, arguments.service, arguments.tenant, arguments.expires, roles)
    except OSError as error:
        return fail(_unwritable(arguments.config, error))
    _show_key(made, arguments.config)
    audit(ambient, "key.make", key=made.id, service=arguments.service, tenants=arguments.tenant, roles=roles)
    return 0


def _keys_rotate(arguments: argparse.Namespace) -> int:
    ambient = Ambient()
    if not 0 <= arguments.overlap_days <= 366:
        return fail("--overlap-days is from 0 to 366; `gateway keys revoke` ends a key at once.")
    try:
        made = keys.rotate(arguments.config, ambient, arguments.key, arguments.overlap_days, arguments.expires)
    except keys.UnknownKey as error:
        return fail(str(error))
    except OSError as error:
        return fail(_unwritable(arguments.config, error))
    _show_key(made, arguments.config)
    audit(ambient, "key.rotate", key=made.id, replaces=arguments.key, overlap_days=arguments.overlap_days)
    return 0


def _keys_revoke(arguments: argparse.Namespace) -> int:
    """The file first: what it says outlives every Redis. Then the channel, which is faster than the file."""
    import asyncio

    from app.control import REVOKED, tell
    from app.redis_pipe import RedisAway, RedisRefused

    ambient = Ambient()
    try:
        keys.revoke(arguments.config, ambient, arguments.key)
    except keys.UnknownKey as error:
        return fail(str(error))
    except OSError as error:
        return fail(_unwritable(arguments.config, error))
    audit(ambient, "key.revoke", key=arguments.key, reason=arguments.reason)
    slower = f"{arguments.key} is revoked in {arguments.config / keys.FILE}; replicas take it within 5 s of having it. "
    if not arguments.redis_url:
        return fail(slower + "To reach them within 2 s, set REDIS_URL or give --redis-url, and run this again.")
    try:
        asyncio.run(tell(arguments.redis_url, ambient, REVOKED, arguments.key, arguments.reason, operator()))
    except (RedisAway, RedisRefused) as error:
        return fail(slower + f"Redis could not be told ({error}).")
    print(f"{arguments.key} is revoked: every replica refuses it within 2 s.")
    return 0


def _keys_list(arguments: argparse.Namespace) -> int:
    shown = keys.listed(arguments.config, Ambient())
    if arguments.json:
        print(msgspec.json.encode(shown).decode())
        return 0
    if not shown:
        sys.stderr.write(f"There is no key in {arguments.config / keys.FILE}; `gateway keys new` makes one.\n")
    for key in shown:
        until = f"until {key.expires}" if key.expires else ""
        print(f"{key.id}  {key.state:<8} {key.service:<24} {','.join(key.tenants):<32} {until}".rstrip())
    return 0


def _show_key(made: keys.MadeKey, folder: Path) -> None:
    print(made.key)
    sys.stderr.write(
        f"This is the only time the key is shown. Its digest is in {folder / keys.FILE} as {made.id}; "
        "replicas take it within 5 s of the file reaching them.\n"
    )


def _unwritable(folder: Path, error: OSError) -> str:
    return f"{folder / keys.FILE} cannot be changed ({error.strerror}); --config names the configuration folder."


def _usage(arguments: argparse.Namespace) -> int:
    import asyncio

    from app.archive import ArchiveError
    from app.reports import day as reports

    if not arguments.database_url:
        return fail(WHICH_POSTGRES)
    on = arguments.day or utc_day(Ambient())
    try:
        report = asyncio.run(reports.usage(arguments.database_url, arguments.tenant, on))
    except ArchiveError as error:
        return fail(str(error))
    print(report.json() if arguments.json else report.text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
