"""The commands that finance uses: rollup, export, reconcile, jobs."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Raw, Struct

from app.config import Secret
from app.reports.invoices import READERS, UnreadableInvoice, read
from app.reports.reconcile import ALARM_RATIO, span
from app.terminal import WHICH_POSTGRES, Command, database_option, day, fail, interval, months, port, with_archive

if TYPE_CHECKING:
    from app.archive import Archive
    from app.reports.export import Selection

DRIFT = 3
"""The exit code of a reconciliation above its threshold."""


def add(command: Command) -> None:
    """Adds the commands to the parser: `command(name, run, help)` makes one."""
    rollup = command("rollup", _rollup, "Sum the ledger by day, tenant, feature, model, provider and environment.")
    rollup.add_argument("--day", type=day, help="YYYY-MM-DD (UTC); by default every day with rows that are not summed")
    rollup.add_argument(
        "--reports", type=Path, default=Path("reports/cost"), help="the last day's {tenant}/daily.json (reports/cost)"
    )
    rollup.add_argument("--json", action="store_true", help="for machines")
    database_option(rollup)

    export = command("export", _export, "Write the ledger, its daily sums, FOCUS or the fine-tuning hand-off.")
    what = "every row, sums by day, FinOps' columns, or calls for training with a summary"
    export.add_argument("what", choices=("ledger", "daily", "focus", "fine-tuning"), help=what)
    export.add_argument("--from", dest="first", type=day, required=True, help="first day, YYYY-MM-DD (UTC)")
    export.add_argument("--to", dest="last", type=day, help="last day, included (the first day)")
    export.add_argument("--tenant", help="only this tenant's")
    export.add_argument("--environment", help="only this environment's, such as prod")
    export.add_argument("--format", choices=("csv", "jsonl", "parquet"), default="jsonl", help="(jsonl)")
    export.add_argument("--out", type=Path, default=Path("-"), help="the file; - is standard output (-)")
    export.add_argument("--billing-account", default="llm-gateway", help="FOCUS: who is billed (llm-gateway)")
    export.add_argument("--without-cache-hits", action="store_true", help="fine-tuning: leave out what the cache said")
    export.add_argument("--eval-baseline", type=Path, help="fine-tuning: a JSON file for the summary, as it is")
    database_option(export)

    _add_reconcile(command)
    _add_jobs(command)


def _add_reconcile(command: Command) -> None:
    reconcile = command("reconcile", _reconcile, "Compare the ledger with a vendor's invoice; exit code 3 above 5 %.")
    reconcile.add_argument("--vendor", choices=READERS, required=True, help="whose export; calls: any list of calls")
    reconcile.add_argument("--invoice", type=Path, action="append", required=True, help="the file; repeatable")
    reconcile.add_argument("--provider", action="append", help="the ledger's provider; repeatable (the vendor's name)")
    reconcile.add_argument(
        "--map", type=Path, help='JSON: {"models": {invoice\'s: ledger\'s}, "keys": {invoice\'s: provider}}'
    )
    reconcile.add_argument("--from", dest="first", type=day, help="first day (the invoice's first)")
    reconcile.add_argument("--to", dest="last", type=day, help="last day, included (the invoice's last)")
    reconcile.add_argument("--threshold", type=float, default=ALARM_RATIO, help="share of the whole (0.05)")
    reconcile.add_argument("--format", choices=("text", "json", "html"), default="text", help="(text)")
    reconcile.add_argument("--out", type=Path, default=Path("-"), help="the report's file; - is standard output (-)")
    reconcile.add_argument("--keep", action="store_true", help="note it in PostgreSQL, where the alert looks")
    database_option(reconcile)


def _add_jobs(command: Command) -> None:
    jobs = command("jobs", _jobs, "Run rollups, partitions and reconciliation on a schedule; several may run at once.")
    jobs.add_argument("--once", action="store_true", help="run what is due and exit, as a CronJob does")
    jobs.add_argument("--host", default="127.0.0.1", help="the address of that port (127.0.0.1)")
    jobs.add_argument("--port", type=port, default=9091, help="metrics and status, with GATEWAY_ADMIN_TOKEN (9091)")
    jobs.add_argument("--rollup-seconds", type=interval, default=900.0, help="how often days are summed (900)")
    jobs.add_argument("--reports", type=Path, help="a folder for {tenant}/daily.json")
    jobs.add_argument("--retention-months", type=months, help="drop older months of the ledger (keeps all)")
    jobs.add_argument("--invoices", type=Path, help="a folder with a folder of exports for each vendor, read weekly")
    database_option(jobs)


def _say(sentence: str) -> None:
    """Progress: on standard error, so that standard output holds results only."""
    sys.stderr.write(sentence + "\n")


def _rollup(arguments: argparse.Namespace) -> int:
    from app.reports.rollup import DayRolled, Rollups, write_daily

    def progress(day: DayRolled, left: int) -> None:
        _say(f"{day.day}: {day.rows:,} rows in {day.lines:,} lines; {left:,} days left")

    async def work(archive: Archive) -> int:
        rollups = Rollups(archive)
        await rollups.prepare()
        if arguments.day:
            days = [await rollups.sum_day(arguments.day)]
            progress(days[0], 0)
        else:
            days = await rollups.run_once(progress)
        files = write_daily(arguments.reports, await rollups.daily(days[-1].day)) if days else []
        if arguments.json:
            print(msgspec.json.encode({"days": days, "reports": [str(file) for file in files]}).decode())
        elif not days:
            print("Every day is summed already.")
        else:
            rows = sum(day.rows for day in days)
            print(f"{len(days):,} days summed from {rows:,} rows; {len(files):,} reports in {arguments.reports}.")
        return 0

    return with_archive(arguments, work)


def _export(arguments: argparse.Namespace) -> int:
    from app.reports.export import Exports, Selection
    from app.reports.focus import focus
    from app.reports.tables import Destination, write

    selection = Selection(
        first=arguments.first,
        last=arguments.last or arguments.first,
        tenant=arguments.tenant,
        environment=arguments.environment,
    )
    if selection.last < selection.first:
        return fail("--to is before --from.")
    if arguments.what == "fine-tuning":
        return _handoff(arguments, selection)

    async def work(archive: Archive) -> int:
        exports = Exports(archive)
        if arguments.what == "ledger":
            table = exports.ledger(selection, whole_events=arguments.format == "jsonl")
        elif arguments.what == "daily":
            table = exports.daily(selection)
        else:
            table = focus(exports, selection, arguments.billing_account)
        with Destination(arguments.out, sys.stdout.buffer) as out:
            rows = await write(table, arguments.format, out)
        _say(f"{rows:,} rows.")
        return 0

    return with_archive(arguments, work)


def _handoff(arguments: argparse.Namespace, selection: Selection) -> int:
    from app.reports.export import Exports
    from app.reports.tables import Destination, write

    if str(arguments.out) == "-":
        return fail("The hand-off is two files: give --out FILE; its summary is written to FILE.summary.json.")
    baseline = None
    if arguments.eval_baseline:
        try:
            baseline = Raw(msgspec.json.encode(msgspec.json.decode(arguments.eval_baseline.read_bytes())))
        except OSError as error:
            return fail(f"{arguments.eval_baseline} cannot be read ({error.strerror}).")
        except msgspec.DecodeError as error:
            return fail(f"{arguments.eval_baseline} is not JSON: {error}.")
    cache_hits = not arguments.without_cache_hits

    async def work(archive: Archive) -> int:
        exports = Exports(archive)
        table, totals = exports.handoff(selection, cache_hits=cache_hits)
        with Destination(arguments.out, sys.stdout.buffer) as out:
            await write(table, arguments.format, out)
        summary = await exports.summary(selection, totals, cache_hits=cache_hits, eval_baseline=baseline)
        text = msgspec.json.format(msgspec.json.encode(summary), indent=2)
        with Destination(arguments.out.with_name(arguments.out.name + ".summary.json"), sys.stdout.buffer) as out:
            out.write(text + b"\n")
        print(text.decode())
        return 0

    return with_archive(arguments, work)


class _Names(Struct, frozen=True, forbid_unknown_fields=True):
    """The file of `--map`."""

    models: dict[str, str] = {}
    keys: dict[str, str] = {}


def _reconcile(arguments: argparse.Namespace) -> int:
    from app.reports import drift_report
    from app.reports.tables import Destination

    try:
        names = msgspec.json.decode(arguments.map.read_bytes(), type=_Names) if arguments.map else _Names()
        lines = [line for file in arguments.invoice for line in read(arguments.vendor, file.read_bytes())]
    except OSError as error:
        return fail(f"{error.filename} cannot be read ({error.strerror}).")
    except msgspec.DecodeError as error:
        return fail(f"{arguments.map} is not a map of names: {error}.")
    except UnreadableInvoice as error:
        return fail(str(error))
    if not lines:
        return fail("The invoice has no lines.")
    first, last = span(lines)
    days = (arguments.first or first, arguments.last or last)

    async def work(archive: Archive) -> int:
        found = await drift_report.compare(
            archive,
            arguments.vendor,
            lines,
            providers=arguments.provider or [arguments.vendor],
            days=days,
            models=names.models,
            keys=names.keys,
            threshold=arguments.threshold,
        )
        if arguments.format == "text":
            text = drift_report.as_text(found).encode() + b"\n"
        else:
            text = drift_report.as_html(found) if arguments.format == "html" else drift_report.as_json(found)
        with Destination(arguments.out, sys.stdout.buffer) as out:
            out.write(text)
        if arguments.keep:
            await drift_report.keep(archive, found)
        return DRIFT if found.alarm else 0

    return with_archive(arguments, work)


def _jobs(arguments: argparse.Namespace) -> int:
    from app.jobs import JobsOptions, serve

    if not arguments.database_url:
        return fail(WHICH_POSTGRES)
    token = os.environ.get("GATEWAY_ADMIN_TOKEN")
    return serve(
        JobsOptions(
            database_url=arguments.database_url,
            host=arguments.host,
            port=arguments.port,
            admin_token=Secret(token) if token else None,
            reports=arguments.reports,
            invoices=arguments.invoices,
            retention_months=arguments.retention_months,
            rollup_seconds=arguments.rollup_seconds,
        ),
        once=arguments.once,
    )
