"""`gateway prices`: what calls cost, and new tables."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from app.ambient import Ambient
from app.config import (
    CLASSES,
    ConfigError,
    PriceTable,
    WrittenPrice,
    load,
    price_table,
    price_tables,
    read_price_table,
    usd,
    utc_day,
    write_price_table,
)
from app.core import usd as dollars
from app.price_sync import SyncError, Wanted, sync
from app.terminal import database_option, day, fail, with_archive

if TYPE_CHECKING:
    from app.archive import Archive
    from app.rerate import Rerated

STALE = timedelta(days=7)
"""A price that nobody has checked for longer is said to be old: vendors announce changes a few weeks ahead."""


def add(prices: argparse.ArgumentParser, config_options: Callable[[argparse.ArgumentParser], None]) -> None:
    """The options and actions of `gateway prices`."""
    prices.set_defaults(run=list_prices)
    prices.add_argument("--json", action="store_true", help="for machines")
    config_options(prices)
    actions = prices.add_subparsers(metavar="ACTION")
    new = actions.add_parser("sync", help="Write a new price table from genai-prices, and show what changes.")
    new.set_defaults(run=sync_prices)
    config_options(new)
    new.add_argument("--day", type=day, help="from when it is in force, YYYY-MM-DD (today, UTC)")
    new.add_argument("--dry-run", action="store_true", help="only show what would change")
    again = actions.add_parser(
        "rerate", help="Charge calls of the past anew; the differences become rows of their own."
    )
    again.set_defaults(run=rerate_calls)
    config_options(again)
    again.add_argument("--from", dest="first", type=day, required=True, help="first day, YYYY-MM-DD (UTC)")
    again.add_argument("--to", dest="last", type=day, required=True, help="last day, included")
    again.add_argument("--table", type=day, help="the price table's day (the one in force)")
    again.add_argument("--dry-run", action="store_true", help="only say what it would come to")
    again.add_argument("--json", action="store_true", help="for machines")
    database_option(again)


def list_prices(arguments: argparse.Namespace) -> int:
    """Every price of the table in force, by provider and model."""
    today = utc_day(Ambient())
    path = price_table(arguments.config, today)
    if path is None:
        raise ConfigError([f"{arguments.config / 'prices'}: no price table; write one named by its date"])
    table = read_price_table(path)
    if arguments.json:
        sys.stdout.write(_json(path.stem, table))
        return 0
    print(f"Prices of {path.stem}, USD per million tokens")
    later = [other.stem for other in price_tables(arguments.config) if other.stem > max(path.stem, today.isoformat())]
    if later:
        print(f"Tables of later days: {', '.join(later)}")
    for provider, models in sorted(table.prices.items()):
        for model, price in sorted(models.items()):
            old = "" if today - price.checked_on <= STALE else ", OLD"
            print(f"\n{provider} {model}  ({price.source}; checked on {price.checked_on.isoformat()}{old})")
            for line in _lines(price):
                print(f"  {line}")
    if table.discounts:
        print("\nDiscounts; of those that hold for a call, the first")
    for discount in table.discounts:
        whom = ", ".join(
            f"{what} {name}"
            for what in ("tenant", "target", "provider")
            if (name := getattr(discount, what)) is not None
        )
        print(f"  {usd(discount.percent)} % for {whom}  ({discount.source})")
    return 0


def _lines(price: WrittenPrice) -> list[str]:
    lines = [_classes(price)]
    lines += [f"above {step.above_input_tokens:,} input tokens: {_classes(step)}" for step in price.long_context]
    for label, rate in [
        *((f"service tier {name}", rate) for name, rate in price.service_tiers.items()),
        *((f"{window.from_} to {window.to} UTC", window) for window in price.windows),
    ]:
        lines.append(f"{label}: {_classes(rate)}")
        lines += [f"{label}, above {step.above_input_tokens:,}: {_classes(step)}" for step in rate.long_context]
    return lines


def _classes(written: object) -> str:
    return ", ".join(f"{name} {usd(value)}" for name in CLASSES if (value := getattr(written, name)) is not None)


def _json(version: str, table: PriceTable) -> str:
    """Prices as JSON numbers in USD per million tokens; what is not set is left out."""
    encode = msgspec.json.Encoder(decimal_format="number").encode
    written = json.loads(encode({"version": version, "prices": table.prices, "discounts": table.discounts}))
    return json.dumps(_set(written), indent=2) + "\n"


def _set(value: object) -> object:
    if isinstance(value, dict):
        return {key: _set(part) for key, part in value.items() if part is not None and part != [] and part != {}}
    return [_set(part) for part in value] if isinstance(value, list) else value


def sync_prices(arguments: argparse.Namespace) -> int:
    """A new dated table from the library's data. Rows carry a table's name: one that exists is never written over."""
    today = utc_day(Ambient())
    starts = arguments.day or today
    config: Path = arguments.config
    path = config / "prices" / f"{starts.isoformat()}.yaml"
    tables = price_tables(config)
    if not arguments.dry_run and path.exists():
        return fail(f"{path} exists, and rows may carry its name: give a later day with --day, or correct it by hand.")
    old = read_price_table(tables[-1]) if tables else PriceTable("", {})
    configured = load(config, arguments.environment, arguments.overlay, require_secrets=False)
    wanted = [
        Wanted(target.provider.name, target.provider.base_url, target.priced_as)
        for target in configured.targets.values()
    ]
    try:
        synced = sync(old, wanted, min(starts, today))
    except SyncError as error:
        return fail(str(error))
    for title, lines in (
        ("Changed, USD per million tokens:", synced.changes),
        ("Kept, for the library does not know them; check them yourself:", synced.kept),
        ("Without a price; add them by hand:", synced.missing),
    ):
        if lines:
            print("\n  ".join([title, *lines]))
    if not synced.changes:
        print("No price has changed.")
    if not arguments.dry_run:
        path.write_text(write_price_table(synced.table))
        try:
            load(config, arguments.environment, arguments.overlay, require_secrets=False, day=starts)
        except ConfigError:
            path.unlink()
            raise
        print(f"Written: {path}, in force from {starts.isoformat()} 00:00 UTC.")
    return 0


def rerate_calls(arguments: argparse.Namespace) -> int:
    """Adjustments for the calls of some days, by the prices of one table."""
    from app.rerate import rerate

    if arguments.last < arguments.first:
        return fail("--to is before --from.")
    priced_on = arguments.table or utc_day(Ambient())
    if arguments.table and arguments.table.isoformat() not in {table.stem for table in price_tables(arguments.config)}:
        return fail(f"{arguments.config / 'prices'} has no table of {arguments.table.isoformat()}.")
    config = load(arguments.config, arguments.environment, arguments.overlay, require_secrets=False, day=priced_on)

    def progress(so_far: Rerated) -> None:
        sys.stderr.write(f"{so_far.calls:,} calls looked at, {so_far.adjusted:,} differ\n")

    async def work(archive: Archive) -> int:
        await archive.prepare()
        done = await rerate(
            archive, config, arguments.first, arguments.last, write=not arguments.dry_run, progress=progress
        )
        return _say_rerated(done, config.price_version, arguments)

    return with_archive(arguments, work)


def _say_rerated(result: Rerated, price_version: str, arguments: argparse.Namespace) -> int:
    differences = {tenant or "": nanos for tenant, nanos in sorted(result.difference_nanos.items(), key=str)}
    if arguments.json:
        by_tenant = {tenant: dollars(nanos) for tenant, nanos in differences.items()}
        report = {"price_table_version": price_version, "calls": result.calls, "adjusted": result.adjusted,
                  "without_price": result.unpriced, "unknown_target": result.unknown,
                  "difference_usd": by_tenant}  # fmt: skip
        print(msgspec.json.encode(report).decode())
        return 0
    verb = "would differ" if arguments.dry_run else "differ, and have an adjustment"
    print(f"{result.calls:,} calls at the prices of {price_version}: {result.adjusted:,} {verb}.")
    if result.unpriced or result.unknown:
        left = f"{result.unpriced:,} without a price, {result.unknown:,} whose target is not configured"
        print(f"Left as they were: {left}.")
    for tenant, nanos in differences.items():
        print(f"  {tenant or '(no tenant)'}: {bytes(dollars(nanos)).decode()} USD")
    return 0
