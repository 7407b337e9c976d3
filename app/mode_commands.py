"""`gateway mode`: turns an incident mode on and off on every replica, and tells what is on."""

from __future__ import annotations

import argparse
import asyncio
import re

import msgspec

from app.ambient import Ambient, timestamp
from app.config import NAME
from app.control import Entry, tell, told
from app.modes import EVERYBODY, MODE, TENANT_MODE
from app.operator import audit, operator
from app.redis_pipe import RedisAway, RedisRefused
from app.terminal import WHICH_REDIS, Command, fail, redis_option

MODES = {"normal": None, "cache-only": "cache_only", "read-only": "read_only"}
MAX_SECONDS = 31 * 86_400
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def add(command: Command) -> None:
    mode = command("mode", run, "Incident modes: cache-only, read-only, normal again; without a word, what is on.")
    mode.add_argument("mode", choices=MODES, nargs="?", help="what every replica does within 2 s")
    mode.add_argument("--tenant", help="for this tenant alone; the stricter of its mode and everybody's counts")
    mode.add_argument("--for", type=seconds, dest="seconds", metavar="TIME", help="then normal again: 90s, 30m, 2h, 1d")
    mode.add_argument("--reason", default="", help="a word for the audit line")
    mode.add_argument("--json", action="store_true", help="for machines")
    redis_option(mode)


def seconds(text: str) -> int:
    """`30m` and the like."""
    match = re.fullmatch(r"([0-9]{1,7})([smhd])", text)
    if match is None or not 0 < (found := int(match[1]) * _UNITS[match[2]]) <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time up to 31d: 90s, 30m, 2h, 1d")
    return found


def run(arguments: argparse.Namespace) -> int:
    ambient = Ambient()
    if not arguments.redis_url:
        return fail(f"{WHICH_REDIS} {_WITHOUT}")
    if arguments.tenant is not None and not NAME.fullmatch(arguments.tenant):
        return fail(f"--tenant must match {NAME.pattern}.")
    if arguments.seconds and MODES.get(arguments.mode) is None:
        return fail("--for is for cache-only and read-only: normal has no end.")
    try:
        if arguments.mode is not None:
            _tell(arguments, ambient)
        held = asyncio.run(told(arguments.redis_url, ambient, MODE, TENANT_MODE))
    except (RedisAway, RedisRefused) as error:
        return fail(f"Redis could not be reached ({error}). {_WITHOUT}")
    everybody = held[MODE].get(EVERYBODY)
    if arguments.json:
        print(msgspec.json.encode({"everybody": everybody, "tenants": held[TENANT_MODE]}).decode())
        return 0
    print(f"{'everybody':<24} {_said(everybody)}")
    for name, entry in sorted(held[TENANT_MODE].items()):
        print(f"{name:<24} {_said(entry)}")
    return 0


_WITHOUT = "Without Redis, `gateway.mode` in the configuration's gateway.yaml reaches every replica within 5 s."


def _tell(arguments: argparse.Namespace, ambient: Ambient) -> None:
    kind, name = (MODE, EVERYBODY) if arguments.tenant is None else (TENANT_MODE, arguments.tenant)
    until = ambient.now() + arguments.seconds if arguments.seconds else None
    asyncio.run(tell(arguments.redis_url, ambient, kind, name, MODES[arguments.mode], operator(), until))
    audit(
        ambient, "mode.set", mode=arguments.mode, tenant=arguments.tenant, reason=arguments.reason,
        until=None if until is None else timestamp(until),
    )  # fmt: skip


def _said(entry: Entry | None) -> str:
    if entry is None or entry.value is None:
        return "normal"
    until = "" if entry.until is None else f" until {timestamp(entry.until)[:19]}Z"
    return f"{entry.value.replace('_', '-')}{until}, by {entry.by} at {entry.at[:19]}Z"
