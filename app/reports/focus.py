"""Rollups as FOCUS 1.2 cost and usage records, for FinOps tools.

Columns and allowed values: FinOps Open Cost and Usage Specification 1.2 (focus.finops.org). Each line of a rollup is a
charge for what was read and one for what was written; calls that cost nothing and used nothing are no charge.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import msgspec

from app.reports.export import Exports, Selection
from app.reports.tables import Column, Table

COLUMNS = (
    Column("BilledCost", "usd"), Column("BillingAccountId"), Column("BillingAccountName"), Column("BillingCurrency"),
    Column("BillingPeriodEnd", "time"), Column("BillingPeriodStart", "time"), Column("ChargeCategory"),
    Column("ChargeClass"), Column("ChargeDescription"), Column("ChargeFrequency"), Column("ChargePeriodEnd", "time"),
    Column("ChargePeriodStart", "time"), Column("ConsumedQuantity", "integer"), Column("ConsumedUnit"),
    Column("ContractedCost", "usd"), Column("EffectiveCost", "usd"), Column("InvoiceIssuerName"),
    Column("ListCost", "usd"), Column("PricingCategory"), Column("PricingQuantity", "integer"), Column("PricingUnit"),
    Column("ProviderName"), Column("PublisherName"), Column("ServiceCategory"), Column("ServiceName"),
    Column("ServiceSubcategory"), Column("SkuId"), Column("SkuMeter"), Column("SubAccountId"), Column("SubAccountName"),
    Column("SubAccountType"), Column("Tags"),
)  # fmt: skip
_PAGE_ROWS = 5_000


def focus(exports: Exports, selection: Selection, billing_account: str) -> Table:
    """The charges of a selection. Its first page may raise `export.NotRolledUp`."""
    return Table(COLUMNS, _pages(exports, selection, billing_account))


async def _pages(
    exports: Exports, selection: Selection, billing_account: str
) -> AsyncIterator[Sequence[Sequence[Any]]]:
    page: list[list[Any]] = []
    async for line in exports.rollups(selection):
        read = line["total_tokens"] - line["output_tokens"]
        for meter, tokens, cost in (
            ("Input tokens", read, line["cost_input_usd"]),
            ("Output tokens", line["output_tokens"], line["cost_output_usd"]),
        ):
            if tokens or cost:
                charge = _charge(line, meter, tokens, cost, billing_account)
                page.append([charge[column.name] for column in COLUMNS])
        if len(page) >= _PAGE_ROWS:
            yield page
            page = []
    if page:
        yield page


def _charge(line: dict[str, Any], meter: str, tokens: int, cost: Decimal, billing_account: str) -> dict[str, Any]:
    day: date = line["day"]
    month = day.replace(day=1)
    model = line["model_resolved"] or "unknown"
    tags = {
        name: line[name] for name in ("feature_id", "environment", "model_alias", "provider") if line[name] is not None
    }
    return {
        "BilledCost": cost,
        "BillingAccountId": billing_account,
        "BillingAccountName": billing_account,
        "BillingCurrency": "USD",
        "BillingPeriodEnd": _midnight((month + timedelta(days=31)).replace(day=1)),
        "BillingPeriodStart": _midnight(month),
        "ChargeCategory": "Usage",
        "ChargeClass": None,
        "ChargeDescription": f"{meter} of {model} at {line['provider'] or 'unknown'}",
        "ChargeFrequency": "Usage-Based",
        "ChargePeriodEnd": _midnight(day + timedelta(days=1)),
        "ChargePeriodStart": _midnight(day),
        "ConsumedQuantity": tokens,
        "ConsumedUnit": "Tokens",
        "ContractedCost": cost,
        "EffectiveCost": cost,
        "InvoiceIssuerName": billing_account,
        "ListCost": cost,
        "PricingCategory": "Standard",
        "PricingQuantity": tokens,
        "PricingUnit": "Tokens",
        "ProviderName": billing_account,
        "PublisherName": line["provider"] or "unknown",
        "ServiceCategory": "AI and Machine Learning",
        "ServiceName": "LLM gateway",
        "ServiceSubcategory": "Generative AI",
        "SkuId": f"{line['provider'] or 'unknown'}/{model}",
        "SkuMeter": meter,
        "SubAccountId": line["tenant_id"],
        "SubAccountName": line["tenant_id"],
        "SubAccountType": None if line["tenant_id"] is None else "Tenant",
        "Tags": msgspec.json.encode(tags, order="sorted").decode(),
    }


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)
