"""Synthetic invoices with planted errors: every one is found, none is invented. And vendors' own shapes are read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.cli import main
from app.core import Attempt, Cost, Usage, event_cost, event_usage
from app.reports.invoices import InvoiceLine, UnreadableInvoice, read
from app.reports.reconcile import Drift, LedgerLine, reconcile
from tests.ledger_parts import Postgres, an_event, query, running_postgres
from tests.test_rollup import NOON, record

DAYS = [date(2025, 11, number) for number in (3, 4, 5)]
MODELS = ["gpt-4o-mini-2024-07-18", "gpt-4o-2024-11-20"]
KEYS = {"key_a": "openai", "key_b": "openai-eu"}
PRICE = {MODELS[0]: (150, 600), MODELS[1]: (2_500, 10_000)}
"""Nano-dollars a token, read and written."""


def call(number: int, day: date, model: str, key: str, tokens: tuple[int, int]) -> LedgerLine:
    price = PRICE[model]
    return LedgerLine(
        day=day, model=model, key=key, request_id=f"req-{number}", input_tokens=tokens[0], output_tokens=tokens[1],
        input_nanos=tokens[0] * price[0], output_nanos=tokens[1] * price[1],
    )  # fmt: skip


CALLS = st.lists(
    st.tuples(
        st.sampled_from(DAYS),
        st.sampled_from(MODELS),
        st.sampled_from(list(KEYS.values())),
        st.tuples(st.integers(1, 100_000), st.integers(1, 20_000)),
    ),
    min_size=1,
    max_size=40,
).map(lambda rows: [call(number, *row) for number, row in enumerate(rows)])


def billed(line: LedgerLine, **changes: Any) -> InvoiceLine:
    """The line of an invoice that agrees, but for the changes."""
    vendor_key = {ours: theirs for theirs, ours in KEYS.items()}[line.key]
    agrees = InvoiceLine(
        day=line.day, model=line.model, key=vendor_key, request_id=line.request_id, requests=1,
        input_tokens=line.input_tokens, output_tokens=line.output_tokens,
        cost_nanos=line.input_nanos + line.output_nanos,
    )  # fmt: skip
    return msgspec.structs.replace(agrees, **changes)


def grouped(lines: list[InvoiceLine]) -> list[InvoiceLine]:
    """An invoice by day, model and key, as most vendors write it."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for line in lines:
        sums = groups.setdefault((line.day, line.model, line.key), [0, 0, 0, 0])
        for place, value in enumerate((line.requests, line.input_tokens, line.output_tokens, line.cost_nanos)):
            sums[place] += value or 0
    return [
        InvoiceLine(
            day=day, model=model, key=key, requests=requests, input_tokens=read, output_tokens=written, cost_nanos=cost
        )
        for (day, model, key), (requests, read, written, cost) in groups.items()
    ]


def found(drift: Drift) -> list[tuple[Any, ...]]:
    return sorted((each.cause, each.request_id, each.nanos) for each in drift.differences)


PLANTS = st.sampled_from(
    ["missing_here", "missing_there", "tokens", "price", "tokens and price", "no error", "no error"]
)


@given(CALLS, st.data())
def test_every_planted_error_is_found_by_request_id_and_none_is_invented(
    calls: list[LedgerLine], data: st.DataObject
) -> None:
    invoice, ledger, planted = [], [], []
    for line in calls:
        plant, cost = data.draw(PLANTS), line.input_nanos + line.output_nanos
        more = data.draw(st.integers(1, 5_000)) if "tokens" in plant else 0
        dearer = cost // 20 + 2_000 if "price" in plant else 0
        worth = more * PRICE[line.model][0]
        if plant != "missing_there":
            tokens = line.input_tokens + more
            invoice.append(billed(line, input_tokens=tokens, cost_nanos=cost + worth + dearer))
        if plant != "missing_here":
            ledger.append(line)
        planted += {
            "missing_here": [("missing_here", line.request_id, cost)],
            "missing_there": [("missing_there", line.request_id, -cost)],
        }.get(plant, [])
        planted += [("tokens", line.request_id, worth)] if more else []
        planted += [("price", line.request_id, dearer)] if dearer else []
    if not invoice:
        return
    drift = reconcile(ledger, invoice, keys=KEYS)
    assert found(drift) == sorted(planted)
    assert sum(each.nanos for each in drift.differences) == drift.invoice_nanos - drift.ledger_nanos


@given(CALLS, st.data())
def test_every_planted_error_is_found_by_day_model_and_key_and_none_is_invented(
    calls: list[LedgerLine], data: st.DataObject
) -> None:
    groups: dict[tuple[Any, ...], list[LedgerLine]] = {}
    for line in calls:
        groups.setdefault((line.day, line.model, line.key), []).append(line)
    invoice, ledger, planted = [], [], []
    for (day, model, key), lines in groups.items():
        plant = data.draw(PLANTS)
        cost = sum(line.input_nanos + line.output_nanos for line in lines)
        (summed,) = grouped([billed(line) for line in lines])
        if plant == "missing_here":
            planted.append((plant, day, model, key, cost))
        else:
            ledger += lines
        if plant == "missing_there":
            planted.append((plant, day, model, key, -cost))
            continue
        if "tokens" in plant:
            written = data.draw(st.integers(1, 5_000))
            worth = written * PRICE[model][1]
            summed = msgspec.structs.replace(
                summed, output_tokens=summed.output_tokens + written, cost_nanos=summed.cost_nanos + worth
            )
            planted.append(("tokens", day, model, key, worth))
        if "price" in plant:
            dearer = cost // 20 + 2_000
            summed = msgspec.structs.replace(summed, cost_nanos=summed.cost_nanos + dearer)
            planted.append(("price", day, model, key, dearer))
        invoice.append(summed)
    if not invoice:
        return
    drift = reconcile(ledger, invoice, keys=KEYS)
    differences = [(each.cause, each.day, each.model, each.key, each.nanos) for each in drift.differences]
    assert sorted(differences) == sorted(planted)


@given(CALLS, st.data())
def test_calls_missing_from_a_group_are_told_from_other_counts(calls: list[LedgerLine], data: st.DataObject) -> None:
    lost = data.draw(st.sampled_from(calls))
    kept = [line for line in calls if line is not lost]
    (missing,) = reconcile(kept, grouped([billed(line) for line in calls]), keys=KEYS).differences
    assert (missing.cause, missing.requests, missing.input_tokens) == ("missing_here", 1, lost.input_tokens)


@given(CALLS)
def test_an_invoice_without_amounts_is_compared_by_tokens(calls: list[LedgerLine]) -> None:
    invoice = [msgspec.structs.replace(line, cost_nanos=None) for line in grouped([billed(line) for line in calls])]
    assert reconcile(calls, invoice, keys=KEYS).differences == ()
    drift = reconcile(calls[1:], invoice, keys=KEYS)
    assert not drift.priced
    assert [each.cause for each in drift.differences] == ["missing_here"]


@given(CALLS)
def test_an_invoice_without_keys_is_compared_by_day_and_model(calls: list[LedgerLine]) -> None:
    invoice = grouped([billed(line, key=None) for line in calls])
    assert reconcile(calls, invoice, keys=KEYS).differences == ()


@given(CALLS)
def test_a_vendors_rounding_is_no_difference(calls: list[LedgerLine]) -> None:
    cents = [billed(line, cost_nanos=round(line.input_nanos + line.output_nanos, -3)) for line in calls]
    assert reconcile(calls, cents, keys=KEYS).differences == ()


def test_errors_that_cancel_out_are_drift_all_the_same() -> None:
    one, two = (
        call(1, DAYS[0], MODELS[0], "openai", (1_000_000, 0)),
        call(2, DAYS[0], MODELS[0], "openai", (1_000_000, 0)),
    )
    drift = reconcile([one, two], [billed(one, cost_nanos=100_000_000), billed(two, cost_nanos=200_000_000)])
    assert drift.ledger_nanos == drift.invoice_nanos
    assert drift.ratio == pytest.approx(1 / 3)


# --- vendors' own shapes ----------------------------------------------------------------------------------------------

MIDNIGHT = int(datetime(2025, 11, 24, tzinfo=UTC).timestamp())
DAY = date(2025, 11, 24)


def table(*rows: dict[str, Any]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


OPENAI_USAGE = json.dumps({"object": "page", "has_more": False, "data": [{
    "object": "bucket", "start_time": MIDNIGHT, "end_time": MIDNIGHT + 86_400, "results": [{
        "object": "organization.usage.completions.result", "input_tokens": 1000, "input_cached_tokens": 300,
        "output_tokens": 500, "num_model_requests": 5, "project_id": None, "api_key_id": "key_a",
        "model": "gpt-4o-mini-2024-07-18", "batch": False,
    }],
}]}).encode()  # fmt: skip
OPENAI_COSTS = json.dumps([{"object": "page", "data": [{
    "object": "bucket", "start_time": MIDNIGHT, "end_time": MIDNIGHT + 86_400, "results": [
        {"object": "organization.costs.result", "amount": {"value": 0.06, "currency": "usd"},
         "line_item": "gpt-4o-mini-2024-07-18, input", "project_id": "proj_1"},
    ],
}]}]).encode()  # fmt: skip
ANTHROPIC_USAGE = json.dumps({"data": [{
    "starting_at": "2025-11-24T00:00:00Z", "ending_at": "2025-11-25T00:00:00Z", "results": [{
        "uncached_input_tokens": 1500, "cache_creation": {"ephemeral_1h_input_tokens": 1000,
        "ephemeral_5m_input_tokens": 500}, "cache_read_input_tokens": 200, "output_tokens": 700,
        "api_key_id": "apikey_1", "model": "claude-sonnet-4-20250514", "service_tier": "standard",
    }],
}], "has_more": False}).encode()  # fmt: skip
ANTHROPIC_COSTS = json.dumps({"data": [{
    "starting_at": "2025-11-24T00:00:00Z", "ending_at": "2025-11-25T00:00:00Z", "results": [
        {"currency": "USD", "amount": "123.78912", "description": "Claude Sonnet 4 Usage - Input Tokens",
         "cost_type": "tokens", "model": "claude-sonnet-4-20250514", "token_type": "uncached_input_tokens"},
    ],
}]}).encode()  # fmt: skip
AZURE = table({
    "Date": "11/24/2025", "MeterCategory": "Cognitive Services", "MeterName": "gpt-4o-mini-0718-Inp-glbl Tokens",
    "Quantity": "12.345", "UnitOfMeasure": "1K", "CostInBillingCurrency": "0.00185175",
    "ResourceId": "/subscriptions/s/providers/Microsoft.CognitiveServices/accounts/our-openai",
})  # fmt: skip
CUR = table({
    "line_item_usage_account_id": "123456789012", "line_item_usage_start_date": "2025-11-24T00:00:00Z",
    "line_item_usage_type": "USE1-Claude3.5Sonnet-output-tokens", "line_item_usage_amount": "0.7",
    "line_item_unblended_cost": "0.0105", "pricing_unit": "1K tokens",
})  # fmt: skip
OLD_CUR = CUR.replace(b"line_item_usage_", b"lineItem/Usage").replace(
    b"line_item_unblended_cost", b"lineItem/UnblendedCost"
)
FOCUS = table({
    "BilledCost": "0.0105", "ChargePeriodStart": "2025-11-24T00:00:00Z", "ConsumedQuantity": "700",
    "ConsumedUnit": "Tokens", "SkuMeter": "Output tokens", "SkuId": "anthropic/claude", "SubAccountId": "1234",
    "ChargeDescription": "",
})  # fmt: skip


@pytest.mark.parametrize(
    ("vendor", "content", "line"),
    [
        ("openai", OPENAI_USAGE, {
            "model": MODELS[0], "key": "key_a", "requests": 5, "input_tokens": 1000, "output_tokens": 500,
        }),
        ("openai", OPENAI_COSTS, {"model": MODELS[0], "cost_nanos": 60_000_000}),
        ("anthropic", ANTHROPIC_USAGE, {
            "model": "claude-sonnet-4-20250514", "key": "apikey_1", "input_tokens": 3200, "output_tokens": 700,
        }),
        ("anthropic", ANTHROPIC_COSTS, {"model": "claude-sonnet-4-20250514", "cost_nanos": 1_237_891_200}),
        ("azure", AZURE, {
            "model": "gpt-4o-mini-0718-Inp-glbl Tokens", "key": "our-openai", "input_tokens": 12_345,
            "cost_nanos": 1_851_750,
        }),
        *(("aws", content, {
            "model": "USE1-Claude3.5Sonnet-output-tokens", "key": "123456789012", "output_tokens": 700,
            "cost_nanos": 10_500_000,
        }) for content in (CUR, OLD_CUR)),
        ("aws", FOCUS, {
            "model": "anthropic/claude", "key": "1234", "output_tokens": 700, "cost_nanos": 10_500_000,
        }),
        ("calls", b"request_id,day,model,input_tokens,output_tokens,cost_usd\nreq-1,2025-11-24,m,3,4,0.000000007\n", {
            "model": "m", "request_id": "req-1", "requests": 1, "input_tokens": 3, "output_tokens": 4, "cost_nanos": 7,
        }),
    ],
)  # fmt: skip
def test_vendors_exports_are_read(vendor: str, content: bytes, line: dict[str, Any]) -> None:
    assert read(vendor, content) == [InvoiceLine(day=DAY, **line)]


@pytest.mark.parametrize("vendor", ["openai", "anthropic", "azure", "aws", "focus", "calls"])
@pytest.mark.parametrize("content", [b"\xff\xfe", b"a,b\n1,2\n", b'{"data": [{}]}', b"[1]"])
def test_a_file_of_another_shape_is_a_sentence(vendor: str, content: bytes) -> None:
    try:
        said: object = read(vendor, content)
    except UnreadableInvoice as error:
        said = str(error)
    # A table without rows has no lines in any shape.
    assert said == [] or str(said).startswith(f"This is not an export of {vendor} as we know it")


# --- the command, on a real ledger ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture
def url(postgres: Postgres) -> str:
    """Ten calls at openai, one that the cache answered, one that was refused, one at another provider."""
    url = postgres.database()
    events = [
        msgspec.structs.replace(
            an_event(at=NOON + number, usage=Usage(input=1000, output=100), cost=Cost(150_000, 60_000)),
            vendor_request_id=f"v-{number}",
        )
        for number in range(13)
    ]
    events[10] = msgspec.structs.replace(events[10], cache_hit=True)
    events[11] = msgspec.structs.replace(events[11], usage_source="none", vendor_request_id=None)
    events[12] = msgspec.structs.replace(events[12], provider="openrouter")
    record(url, events)
    return url


def invoice_of(numbers: range, cost: str = "0.00021") -> bytes:
    rows = [
        {"request_id": f"v-{number}", "day": "2025-11-24", "model": MODELS[0], "input_tokens": 1000,
         "output_tokens": 100, "cost_usd": cost}
        for number in numbers
    ]  # fmt: skip
    return table(*rows)


def run(url: str, tmp_path: Path, vendor: str, content: bytes, *more: str) -> tuple[int, dict[str, Any]]:
    (tmp_path / "invoice").write_bytes(content)
    out = tmp_path / "report.json"
    arguments = ["--vendor", vendor, "--invoice", str(tmp_path / "invoice"), "--provider", "openai", "--format", "json"]
    code = main(["reconcile", *arguments, "--out", str(out), "--database-url", url, *more])
    return code, json.loads(out.read_text(), parse_float=Decimal) if out.exists() else {}


def test_an_invoice_that_agrees_is_exit_code_0(url: str, tmp_path: Path) -> None:
    code, report = run(url, tmp_path, "calls", invoice_of(range(10)))
    assert (code, report["alarm"], report["differences"], report["matched"]) == (0, False, [], 10)
    assert report["ledger_usd"] == report["invoice_usd"] == Decimal("0.0021")


def test_a_call_and_its_adjustment_are_one(url: str, tmp_path: Path) -> None:
    (call,) = query(url, "SELECT event_id::text, extract(epoch FROM occurred_at)::float8 FROM ledger"
                         " WHERE vendor_request_id = 'v-3'")  # fmt: skip
    adjusts = {"adjusts": call[0], "usage_source": "none", "cost_status": "repriced"}
    record(url, [msgspec.structs.replace(an_event(at=call[1], usage=Usage(), cost=Cost(0, 90_000)), **adjusts)])
    dearer = invoice_of(range(10)).decode().splitlines()
    dearer[4] = dearer[4].replace("0.00021", "0.0003")
    for content in (dearer, [line.replace(f"v-{number - 1},", ",", 1) for number, line in enumerate(dearer)]):
        code, report = run(url, tmp_path, "calls", "\n".join(content).encode())
        assert (code, report["differences"]) == (0, [])


@pytest.mark.parametrize("by_call", [True, False])
def test_a_doubtful_answer_is_reconciled_where_it_was_given(url: str, tmp_path: Path, by_call: bool) -> None:
    used, cost = Usage(input=500, output=40), Cost(75_000, 24_000)
    doubtful = Attempt(
        "openai/mini", "openai", "doubtful", 200, 0.0, 9.0, "v-cheap", doubt="length", model=MODELS[0],
        usage=event_usage(used), cost_usd=event_cost(cost, "2026-11-01"),
    )  # fmt: skip
    both = an_event(at=NOON + 20, usage=used + Usage(input=500, output=50), cost=cost + Cost(1_250_000, 500_000))
    answered = msgspec.structs.replace(both, model_resolved=MODELS[1], vendor_request_id="v-dear", attempts=(doubtful,))
    record(url, [answered])
    rows = list(csv.DictReader(io.StringIO(invoice_of(range(10)).decode())))
    facts = {"day": "2025-11-24", "input_tokens": 500}
    rows.append(facts | {"request_id": "v-cheap", "model": MODELS[0], "output_tokens": 40, "cost_usd": "0.000099"})
    rows.append(facts | {"request_id": "v-dear", "model": MODELS[1], "output_tokens": 50, "cost_usd": "0.00175"})
    content = table(*(row if by_call else {**row, "request_id": ""} for row in rows))
    code, report = run(url, tmp_path, "calls", content)
    assert (code, report["differences"]) == (0, [])


def test_drift_above_5_percent_is_exit_code_3(url: str, tmp_path: Path) -> None:
    code, report = run(url, tmp_path, "calls", invoice_of(range(11)))
    assert (code, report["alarm"]) == (3, True)
    assert [(each["cause"], each["request_id"], each["usd"]) for each in report["differences"]] == [
        ("missing_here", "v-10", Decimal("0.00021"))
    ]


def test_a_month_without_ids_is_compared_by_day(url: str, tmp_path: Path) -> None:
    usage = json.loads(OPENAI_USAGE)
    result = usage["data"][0]["results"][0]
    result |= {"input_tokens": 10_000, "output_tokens": 1_000, "num_model_requests": 10}
    code, report = run(url, tmp_path, "openai", json.dumps(usage).encode())
    assert (code, report["differences"], report["invoice_usd"]) == (0, [], None)


def test_names_are_translated(url: str, tmp_path: Path) -> None:
    content = invoice_of(range(10)).replace(MODELS[0].encode(), b"mini").replace(b"v-", b"")
    (tmp_path / "map.json").write_text(json.dumps({"models": {"mini": MODELS[0]}}))
    plain = content.replace(b"request_id", b"ignored").replace(b"ignored,", b"request_id,")
    rows = list(csv.DictReader(io.StringIO(plain.decode())))
    without_ids = table(*({**row, "request_id": ""} for row in rows))
    code, report = run(url, tmp_path, "calls", without_ids, "--map", str(tmp_path / "map.json"))
    assert (code, report["differences"]) == (0, [])


@pytest.mark.parametrize(
    ("kind", "sentence"), [("text", "ABOVE 5%, investigate."), ("html", "<h1>Reconciliation of calls")]
)
def test_the_report_is_text_or_a_page(url: str, tmp_path: Path, kind: str, sentence: str) -> None:
    (tmp_path / "invoice").write_bytes(invoice_of(range(10), "0.00042"))
    arguments = ["--vendor", "calls", "--invoice", str(tmp_path / "invoice"), "--provider", "openai", "--format", kind]
    out = tmp_path / "report"
    assert main(["reconcile", *arguments, "--out", str(out), "--database-url", url]) == 3
    assert sentence in out.read_text()
    assert "same tokens, other price" in out.read_text()


def test_what_was_found_is_kept_for_the_alert(url: str, tmp_path: Path) -> None:
    run(url, tmp_path, "calls", invoice_of(range(11)), "--keep")
    ((vendor, ratio),) = query(url, "SELECT vendor, ratio FROM reconciliation")
    assert (vendor, round(ratio, 4)) == ("calls", round(1 / 11, 4))


def test_a_file_that_is_no_invoice_is_a_sentence(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(url, tmp_path, "openai", b"PK\x03\x04") == (1, {})
    assert "not an export of openai" in capsys.readouterr().err
