"""Vendors' usage and cost exports, read into one kind of line. Pure: bytes in, lines out.

Sources of the shapes: OpenAI API reference (organization usage and costs), Anthropic Admin API reference (usage and
cost reports), Microsoft Cost Management (cost details file), AWS Data Exports (CUR), FOCUS 1.x (focus.finops.org).
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, date, datetime
from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation
from typing import Any

from msgspec import Struct


class UnreadableInvoice(Exception):
    """The file is not of the shape that its vendor exports; the message names the place."""


class InvoiceLine(Struct, frozen=True, kw_only=True):
    """What a vendor says of one call, or of a day's calls of one model under one key. None: it does not say.

    `key` names the vendor's credential or account. Tokens read include cached ones. Nano-dollars.
    """

    day: date
    model: str
    key: str | None = None
    request_id: str | None = None
    requests: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_nanos: int | None = None


def read(vendor: str, content: bytes) -> list[InvoiceLine]:
    """The lines of one file. Raises `UnreadableInvoice`."""
    try:
        return list(READERS[vendor](content))
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"has a value that cannot be read ({error})"
        raise UnreadableInvoice(f"This is not an export of {vendor} as we know it: it {what}.") from None


def _nanos(dollars: object) -> int:
    try:
        value = Decimal(str(dollars).replace(",", "") or "0")
    except InvalidOperation:
        raise ValueError(f"{dollars!r} is not an amount") from None
    return int((value * 1_000_000_000).to_integral_value(ROUND_HALF_EVEN))


def _whole(amount: object, factor: int = 1) -> int:
    """Tokens: vendors write them with fractions of their unit, such as 1.5 of 1K."""
    return int((Decimal(str(amount).replace(",", "") or "0") * factor).to_integral_value(ROUND_HALF_EVEN))


# --- OpenAI -----------------------------------------------------------------------------------------------------------


def _openai(content: bytes) -> Iterator[InvoiceLine]:
    """Pages of /v1/organization/usage/* or /v1/organization/costs in daily buckets: a JSON document, or a list."""
    for bucket in _buckets(content):
        day = datetime.fromtimestamp(bucket["start_time"], UTC).date()
        for result in bucket["results"]:
            if "amount" in result:
                item = result.get("line_item") or "unknown"
                yield InvoiceLine(
                    day=day,
                    model=item.rpartition(", ")[0] or item,
                    key=result.get("api_key_id"),
                    cost_nanos=_nanos(result["amount"]["value"]),
                )
            else:
                yield InvoiceLine(
                    day=day,
                    model=result.get("model") or "unknown",
                    key=result.get("api_key_id"),
                    requests=result["num_model_requests"],
                    input_tokens=result["input_tokens"],
                    output_tokens=result.get("output_tokens", 0),
                )


def _buckets(content: bytes) -> Iterator[dict[str, Any]]:
    pages = json.loads(content, parse_float=Decimal)
    for page in pages if isinstance(pages, list) else [pages]:
        yield from page["data"]


# --- Anthropic --------------------------------------------------------------------------------------------------------


def _anthropic(content: bytes) -> Iterator[InvoiceLine]:
    """Pages of /v1/organizations/usage_report/messages or /v1/organizations/cost_report in daily buckets.

    The cost report's amounts are in cents.
    """
    for bucket in _buckets(content):
        day = date.fromisoformat(bucket["starting_at"][:10])
        for result in bucket["results"]:
            if "amount" in result:
                yield InvoiceLine(
                    day=day,
                    model=result.get("model") or result.get("description") or "unknown",
                    cost_nanos=_nanos(Decimal(str(result["amount"])) / 100),
                )
            else:
                written = result.get("cache_creation") or {}
                yield InvoiceLine(
                    day=day,
                    model=result.get("model") or "unknown",
                    key=result.get("api_key_id"),
                    input_tokens=result["uncached_input_tokens"]
                    + result.get("cache_read_input_tokens", 0)
                    + sum(written.values()),
                    output_tokens=result["output_tokens"],
                )


# --- tables -----------------------------------------------------------------------------------------------------------

_UNIT = re.compile(r"([\d.,]*)\s*([KkMm]?)")
_WRITTEN = re.compile(r"(?<![a-z])(?:out|outp|output|opt|completion)(?![a-z])", re.IGNORECASE)
_READ = re.compile(r"(?<![a-z])(?:in|inp|input|prompt|cached|cache|cchd)(?![a-z])", re.IGNORECASE)


def _rows(content: bytes) -> Iterator[dict[str, str]]:
    """The rows of a CSV with their columns in lower case."""
    for row in csv.DictReader(io.StringIO(content.decode("utf-8-sig"))):
        yield {name.strip().lower(): (value or "").strip() for name, value in row.items() if name is not None}


def _first(row: Mapping[str, str], *names: str) -> str:
    """The first of these columns that the row has."""
    for name in names:
        if name in row:
            return row[name]
    raise KeyError(names[0])


def _on(text: str) -> date:
    """2026-11-24, with or without a time, or 11/24/2026 as Azure writes it."""
    if "/" in text:
        return datetime.strptime(text.partition(" ")[0], "%m/%d/%Y").replace(tzinfo=UTC).date()
    return date.fromisoformat(text[:10])


def _tokens(meter: str, amount: str, unit: str) -> dict[str, int]:
    """A meter's quantity as tokens read or written; neither where its name says neither."""
    match = _UNIT.match(unit.strip())
    number, letter = (match[1], match[2].lower()) if match else ("", "")
    factor = {"": 1, "k": 1_000, "m": 1_000_000}[letter] * _whole(number or 1)
    if _WRITTEN.search(meter):
        return {"output_tokens": _whole(amount, factor)}
    return {"input_tokens": _whole(amount, factor)} if _READ.search(meter) else {}


def _azure(content: bytes) -> Iterator[InvoiceLine]:
    """The cost details file: a row a day, meter and resource. The model is the meter's name; `--map` gives ours."""
    for row in _rows(content):
        meter = _first(row, "metername", "meter name")
        resource = _first(row, "resourceid", "instanceid", "resource id").rpartition("/")[2]
        unit = _first(row, "unitofmeasure", "unit of measure")
        yield InvoiceLine(
            day=_on(_first(row, "date", "usagedatetime", "usagedate")),
            model=meter,
            key=resource or None,
            cost_nanos=_nanos(_first(row, "costinbillingcurrency", "costinusd", "pretaxcost", "cost")),
            **_tokens(meter, _first(row, "quantity", "usagequantity"), unit),
        )


def _aws(content: bytes) -> Iterator[InvoiceLine]:
    """A cost and usage report as CSV (`lineItem/UsageType` or `line_item_usage_type`), or a FOCUS export."""
    rows = list(_rows(content))
    if rows and "chargeperiodstart" in rows[0]:
        yield from _focus(content)
        return
    for plain in rows:
        row = {re.sub(r"[^a-z]", "", name): value for name, value in plain.items()}
        meter = row["lineitemusagetype"]
        unit = row.get("pricingunit", "")
        yield InvoiceLine(
            day=_on(row["lineitemusagestartdate"]),
            model=meter,
            key=row.get("lineitemusageaccountid") or None,
            cost_nanos=_nanos(row["lineitemunblendedcost"]),
            **_tokens(meter, row["lineitemusageamount"], unit),
        )


def _focus(content: bytes) -> Iterator[InvoiceLine]:
    """FOCUS 1.x: the model is the SKU, the key the sub-account."""
    for row in _rows(content):
        meter = " ".join(filter(None, (row.get("skumeter"), row.get("chargedescription"))))
        yield InvoiceLine(
            day=_on(row["chargeperiodstart"]),
            model=row.get("skuid") or row.get("chargedescription") or "unknown",
            key=row.get("subaccountid") or None,
            cost_nanos=_nanos(row["billedcost"]),
            **_tokens(meter, row.get("consumedquantity") or "0", row.get("consumedunit", "")),
        )


def _calls(content: bytes) -> Iterator[InvoiceLine]:
    """A row a call: `request_id`, `day` or `timestamp`, `model`, and any of `key`, tokens and `cost_usd`."""
    for row in _rows(content):
        read, written, cost = row.get("input_tokens"), row.get("output_tokens"), row.get("cost_usd")
        yield InvoiceLine(
            day=_on(_first(row, "day", "date", "timestamp", "created_at")),
            model=row["model"],
            key=row.get("key") or None,
            request_id=row["request_id"] or None,
            requests=1,
            input_tokens=_whole(read) if read else None,
            output_tokens=_whole(written) if written else None,
            cost_nanos=_nanos(cost) if cost else None,
        )


READERS: Mapping[str, Callable[[bytes], Iterator[InvoiceLine]]] = {
    "openai": _openai,
    "anthropic": _anthropic,
    "azure": _azure,
    "aws": _aws,
    "focus": _focus,
    "calls": _calls,
}
"""By what `gateway reconcile --vendor` says; `calls` is any vendor's list of calls as CSV."""
