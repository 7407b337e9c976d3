"""`gateway preship`: runs the six gates, prints the table, writes the report."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from loadtest.gate import checks, report, settings
from loadtest.gate.checks import Found
from loadtest.gate.settings import BadSettings, Settings
from loadtest.gate.target import NotRun, Target
from loadtest.services import StackError
from loadtest.stack import Stack


class Options(Protocol):
    """The options of `gateway drill`."""

    target: str | None
    key: str | None
    tenant: str
    ca_file: Path | None
    simulator_url: str | None
    admin_url: list[str]
    admin_token: str | None
    gates: Path | None


class PreshipOptions(Options, Protocol):
    """The options of `gateway preship`."""

    database_url: str | None
    apps: list[Path]
    report: Path | None


class NoKey(Exception):
    """A target without a key; the text says where to put one."""


FAULTS = (BadSettings, StackError, NotRun, NoKey)
"""Why nothing could be run, as a sentence."""


def drill(options: Options) -> int:
    """The fallback drill alone. The exit code: 0 when every call got through, 1 when not, or it could not be run."""
    try:
        wanted = settings.read(options.gates or settings.DEFAULT)
        with _target(options, wanted) as target:
            found = checks.fallback(target, wanted.fallback, f"drill{uuid.uuid4().hex[:12]}")
    except FAULTS as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join([found.measured, *found.details, "The drill passed." if found.passed else "The drill failed."]))
    return 0 if found.passed else 1


def preship(options: PreshipOptions) -> int:
    """The exit code: 0 when no blocking gate was missed, 1 when one was, or nothing could be run."""
    try:
        wanted = settings.read(options.gates or settings.DEFAULT)
        with _target(options, wanted, options.database_url) as target:
            results = run(target, wanted, options.apps)
    except FAULTS as error:
        print(error, file=sys.stderr)
        return 1
    print(report.table(results))
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_bytes(report.page(target.url, results))
        options.report.with_suffix(".json").write_bytes(msgspec.json.format(report.document(target.url, results)))
        print(f"The report: {options.report}")
    return 0 if report.shippable(results) else 1


def run(target: Target, wanted: Settings, apps: list[Path]) -> list[report.Result]:
    """Every gate's result, in the order of the table. The ledger's comes from the calls that the others made."""
    name = f"preship{uuid.uuid4().hex[:12]}"
    sent: dict[str, int] = {f"{name}evals": len(wanted.evals.cases)}
    found: dict[str, Found] = {}

    def gate(key: str, check: Callable[[], Found]) -> None:
        print(f"  {getattr(wanted.gates, key).title} ...", flush=True)
        try:
            found[key] = check()
        except NotRun as reason:
            found[key] = Found(False, f"not run: {reason}")

    gate("smoke", lambda: checks.smoke(target))
    gate("direct", lambda: checks.direct(apps))
    gate("evals", lambda: checks.evals(target, wanted.evals, f"{name}evals"))
    gate("load", lambda: checks.load(target, wanted.load, f"{name}load"))
    gate("fallback", lambda: checks.fallback(target, wanted.fallback, name))
    sent |= {load.run: len(load.calls) for result in found.values() for load in result.loads.values()}
    gate("rows", lambda: checks.rows(target, sent))
    return [
        report.Result(key, getattr(wanted.gates, key), **msgspec.structs.asdict(found[key]))
        for key in wanted.gates.__struct_fields__
    ]


@contextlib.contextmanager
def _target(options: Options, wanted: Settings, database_url: str | None = None) -> Iterator[Target]:
    """The gateway of --target, or a stack of its own."""
    if options.target:
        if not options.key:
            raise NoKey("Which key? Set HELLO_SHIP_GATEWAY_KEY to a gateway key that may act for --tenant.")
        yield Target(
            options.target.rstrip("/"), options.key, options.tenant, options.ca_file, options.simulator_url,
            database_url, tuple(options.admin_url), options.admin_token,
        )  # fmt: skip
        return
    # The drill's hanging vendor would else be waited for as long as a reasoning model is.
    patience = {"first_token_seconds": 1, "answer_seconds": 1, "idle_seconds": 5, "total_seconds": 20}
    overlay = {"aliases": {wanted.fallback.model: {"timeouts": patience}}}
    with tempfile.TemporaryDirectory(prefix="gateway-preship-") as folder:
        print("Starting a stack with simulated vendors ...", flush=True)
        with Stack(Path(folder), overlay=overlay, environ=_without_vendor_keys()) as stack:
            yield of_stack(stack)


def of_stack(stack: Stack) -> Target:
    """A stack of this machine, with all that can be reached of it."""
    return Target(
        stack.url, stack.key, stack.tenant, stack.ca_file, stack.simulator_url, stack.postgres_url,
        tuple(replica.admin_url for replica in stack.replicas), stack.admin_token,
    )  # fmt: skip


def _without_vendor_keys() -> dict[str, str]:
    """A gate that starts its own stack costs nothing, whatever keys its shell has."""
    return {name: value for name, value in os.environ.items() if not name.endswith(("_API_KEY", "_ACCESS_KEY"))}
