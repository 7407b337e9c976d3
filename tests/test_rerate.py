"""What calls cost by the vendors' price lists, and calls of the past at other prices: adjustments, never changes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import yaml

from app.archive import Archive
from app.cli import main
from app.config import Config, load
from app.core import Attempt, LedgerEvent, Usage, charge, event_cost, event_usage
from app.reports.day import usage
from app.reports.rollup import Rollups
from app.rerate import Rerated, rerate
from tests.ledger_parts import AMBIENT, Postgres, an_event, query, running_postgres
from tests.test_config import ENVIRON, SHIPPED
from tests.test_prices import MIDNIGHT, SOURCED

T = TypeVar("T")
COSTS = json.loads((Path(__file__).parent / "golden" / "costs.json").read_text())
DAY = date(2026, 11, 1)
NOON = datetime(2026, 11, 1, 12, tzinfo=UTC).timestamp()


# --- golden costs ---


@pytest.fixture(scope="module")
def vendors(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The shipped price table of the day, with a target for each model of the golden costs."""
    shipped = yaml.safe_load((SHIPPED / "gateway_models.yaml").read_text())["providers"]
    providers = {case["provider"] for case in COSTS} - set(shipped)
    file = tmp_path_factory.mktemp("vendors") / "overlay.yaml"
    vendor = {"kind": "openai_compatible", "base_url": "https://vendor.example", "api_key": "env:OPENAI_API_KEY"}
    targets = {
        f"golden/{number}": {"provider": case["provider"], "model": case["model"]} for number, case in enumerate(COSTS)
    }
    file.write_text(yaml.safe_dump({"providers": dict.fromkeys(providers, vendor), "targets": targets}))
    return load(SHIPPED, "prod", [file], environ=ENVIRON, day=DAY)


@pytest.mark.parametrize("number", range(len(COSTS)), ids=[case["name"] for case in COSTS])
def test_a_call_costs_what_its_vendor_s_price_list_says(vendors: Config, number: int) -> None:
    case = COSTS[number]
    hours, minutes = case.get("at", "12:00").split(":")
    at = MIDNIGHT + int(hours) * 3600 + int(minutes) * 60
    used = msgspec.convert(case["usage"], Usage)
    charged = charge(used, vendors.targets[f"golden/{number}"], "t", case.get("service_tier"), at)
    assert (Decimal(charged.input_nanos).scaleb(-9), Decimal(charged.output_nanos).scaleb(-9)) == (
        Decimal(case["input_usd"]),
        Decimal(case["output_usd"]),
    )


# --- re-rating ---


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.database()


def working(url: str, work: Callable[[Archive], Awaitable[T]]) -> T:
    async def run() -> T:
        archive = Archive(url, AMBIENT)
        try:
            await archive.prepare()
            return await work(archive)
        finally:
            await archive.close()

    return asyncio.run(run())


def priced(folder: Path, input_usd: str | None) -> Config:
    """A configuration in which `openai/m` costs so much for input and nothing for output; without a price for None."""
    overlay: dict[str, Any] = {"targets": {"openai/m": {"provider": "openai", "model": "m"}}}
    if input_usd is not None:
        overlay["prices"] = {"openai": {"m": {"input": float(input_usd), **SOURCED}}}
    file = folder / f"{input_usd}.yaml"
    file.write_text(yaml.safe_dump(overlay))
    config = load(SHIPPED, "prod", [file], environ=ENVIRON, day=DAY)
    return msgspec.structs.replace(config, price_version=f"at-{input_usd}")


def a_call(config: Config, at: float = NOON, tokens: int = 1000, **fields: Any) -> LedgerEvent:
    """A call of `openai/m` as `config` charged it."""
    used = Usage(input=tokens, output=5)
    charged = charge(used, config.targets["openai/m"], "acme-corp", None, at)
    attempt = Attempt("openai/m", "openai", "success", 200, 0.0, 1.0, "vendor-1")
    event = an_event(at=at, usage=used, cost=charged)
    given = {"attempts": (attempt,), "cost_usd": event_cost(charged, config.price_version), **fields}
    return msgspec.structs.replace(event, **given)


def record(url: str, *events: LedgerEvent) -> None:
    working(url, lambda archive: archive.insert([msgspec.json.encode(event).decode() for event in events]))


def rerated(url: str, config: Config, first: date = DAY, last: date = DAY, **options: Any) -> Rerated:
    return working(url, lambda archive: rerate(archive, config, first, last, **options))


def costs(url: str) -> list[tuple[str, str]]:
    """Cost and whether it is an adjustment, in the order of recording."""
    rows = query(url, "SELECT cost_usd, adjusts IS NOT NULL FROM ledger ORDER BY adjusts NULLS FIRST, cost_usd")
    return [(f"{cost:f}".rstrip("0"), "adjustment" if adjusts else "call") for cost, adjusts in rows]


def total(url: str) -> Decimal:
    return query(url, "SELECT sum(cost_usd) FROM ledger")[0][0]


def test_a_doubtful_answer_is_re_rated_at_its_own_target(tmp_path: Path, url: str) -> None:
    before = priced(tmp_path, "2")
    doubted, answered = Usage(input=1000), Usage(input=500, output=50)
    cheap = charge(doubted, before.targets["openai/m"], "acme-corp", None, NOON)
    dear = charge(answered, before.targets["openai/gpt-4o"], "acme-corp", None, NOON)
    attempts = (
        Attempt(
            "openai/m", "openai", "doubtful", 200, 0.0, 1.0, usage=event_usage(doubted), cost_usd=event_cost(cheap, "x")
        ),
        Attempt("openai/gpt-4o", "openai", "success", 200, 1.0, 1.0),
    )
    event = an_event(at=NOON, usage=doubted + answered, cost=cheap + dear)
    record(url, msgspec.structs.replace(event, attempts=attempts))
    assert rerated(url, before).adjusted == 0
    assert rerated(url, priced(tmp_path, "1.5")).difference_nanos == {"acme-corp": -500_000}


def test_the_difference_becomes_a_row_that_names_its_call(tmp_path: Path, url: str) -> None:
    call = a_call(priced(tmp_path, "2"))
    record(url, call)
    rerated(url, priced(tmp_path, "1.5"))
    ((event, occurred_at),) = query(url, "SELECT event, occurred_at FROM ledger WHERE adjusts IS NOT NULL")
    assert (event["adjusts"], event["cost_usd"]) == (
        call.event_id,
        {"input": -0.0005, "output": 0, "total": -0.0005, "price_table_version": "at-1.5"},
    )
    assert (event["tenant_id"], event["usage"]["total_tokens"], occurred_at.timestamp()) == ("acme-corp", 0, NOON)


def test_the_call_s_own_row_stays_as_it_was(tmp_path: Path, url: str) -> None:
    call = a_call(priced(tmp_path, "2"))
    record(url, call)
    rerated(url, priced(tmp_path, "1.5"))
    ((kept,),) = query(url, "SELECT event FROM ledger WHERE adjusts IS NULL")
    assert kept == json.loads(msgspec.json.encode(call))


def test_re_rating_twice_changes_nothing(tmp_path: Path, url: str) -> None:
    record(url, a_call(priced(tmp_path, "2")))
    assert [rerated(url, priced(tmp_path, "3")).adjusted for _ in range(2)] == [1, 0]
    assert costs(url) == [("0.002", "call"), ("0.001", "adjustment")]


def test_going_back_to_an_earlier_price_is_an_adjustment_too(tmp_path: Path, url: str) -> None:
    record(url, a_call(priced(tmp_path, "2")))
    for price in ("3", "2", "3"):
        rerated(url, priced(tmp_path, price))
    assert costs(url) == [
        ("0.002", "call"), ("-0.001", "adjustment"), ("0.001", "adjustment"), ("0.001", "adjustment")
    ]  # fmt: skip


def test_two_at_a_time_adjust_once(tmp_path: Path, url: str) -> None:
    record(url, *(a_call(priced(tmp_path, "2"), NOON + second) for second in range(50)))
    config = priced(tmp_path, "3")

    async def both() -> None:
        archives = [Archive(url, AMBIENT) for _ in range(2)]
        await asyncio.gather(*(rerate(archive, config, DAY, DAY) for archive in archives))
        for archive in archives:
            await archive.close()

    asyncio.run(both())
    assert total(url) == 50 * Decimal("0.003")


def test_calls_charged_at_the_ceiling_get_their_price(tmp_path: Path, url: str) -> None:
    record(url, a_call(priced(tmp_path, None)))
    rerated(url, priced(tmp_path, "2"))
    assert total(url) == Decimal("0.002")
    assert query(url, "SELECT cost_status FROM ledger ORDER BY cost_status") == [("repriced",), ("unpriced",)]


def test_a_ceiling_that_was_the_price_is_no_longer_called_unpriced(tmp_path: Path, url: str) -> None:
    unpriced = a_call(priced(tmp_path, "2"), cost_status="unpriced")
    record(url, unpriced)
    assert [rerated(url, priced(tmp_path, "2")).adjusted for _ in range(2)] == [1, 0]


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"usage_source": "none", "cost_status": "none"}, Rerated()),
        ({"cache_hit": True}, Rerated()),
        ({"attempts": (Attempt("openai/gone", "openai", "success", 200, 0.0, 1.0),)}, Rerated(calls=1, unknown=1)),
    ],
)
def test_what_cost_nothing_or_went_nowhere_that_is_known_is_left_alone(
    tmp_path: Path, url: str, changes: dict[str, Any], left: Rerated
) -> None:
    record(url, a_call(priced(tmp_path, "2"), **changes))
    assert rerated(url, priced(tmp_path, "3")) == left


def test_a_call_still_without_a_price_is_left_alone(tmp_path: Path, url: str) -> None:
    record(url, a_call(priced(tmp_path, None)))
    assert rerated(url, priced(tmp_path, None)).unpriced == 1


def test_an_interrupted_call_is_known_by_its_provider_and_model(tmp_path: Path, url: str) -> None:
    record(url, a_call(priced(tmp_path, "2"), attempts=(), provider="openai", model_resolved="m"))
    assert rerated(url, priced(tmp_path, "3")).adjusted == 1


def test_only_the_days_asked_for_are_re_rated(tmp_path: Path, url: str) -> None:
    days = [NOON - 86_400, NOON - 43_200.000001, NOON - 43_200, NOON + 43_199, NOON + 43_200]
    record(url, *(a_call(priced(tmp_path, "2"), at) for at in days))
    assert rerated(url, priced(tmp_path, "3")).calls == 2


def test_many_pages_miss_no_call(tmp_path: Path, url: str) -> None:
    record(url, *(a_call(priced(tmp_path, "2"), NOON + number // 10) for number in range(50)))
    assert rerated(url, priced(tmp_path, "3"), page_rows=7).adjusted == 50
    assert total(url) == 50 * Decimal("0.003")


def test_a_dry_run_writes_nothing(tmp_path: Path, url: str) -> None:
    record(url, a_call(priced(tmp_path, "2")))
    assert rerated(url, priced(tmp_path, "3"), write=False).difference_nanos == {"acme-corp": 1_000_000}
    assert costs(url) == [("0.002", "call")]


# --- what the reports make of it ---


@pytest.fixture
def adjusted(tmp_path: Path, url: str) -> str:
    record(url, a_call(priced(tmp_path, None)), a_call(priced(tmp_path, "2"), NOON + 1))
    rerated(url, priced(tmp_path, "3"))
    return url


def test_a_tenant_s_day_has_the_calls_once_and_the_new_cost(adjusted: str) -> None:
    day = asyncio.run(usage(adjusted, "acme-corp", DAY)).total
    assert (day.requests, bytes(day.cost_usd), day.unpriced) == (2, b"0.006", 0)


def test_a_rollup_has_the_calls_once_and_the_new_cost(adjusted: str) -> None:
    async def work(archive: Archive) -> None:
        rollups = Rollups(archive)
        await rollups.prepare()
        await rollups.run_once()

    working(adjusted, work)
    ((requests, success, cost, unpriced),) = query(
        adjusted, "SELECT sum(requests), sum(success), sum(cost_usd), sum(unpriced) FROM rollup"
    )
    assert (requests, success, cost, unpriced) == (2, 2, Decimal("0.006"), 0)


def test_the_hand_off_has_a_line_per_call(tmp_path: Path, adjusted: str) -> None:
    out = tmp_path / "calls.jsonl"
    assert main(["export", "fine-tuning", "--from", str(DAY), "--out", str(out), "--database-url", adjusted]) == 0
    assert len(out.read_text().splitlines()) == 2


# --- the command ---


def test_the_command_says_what_it_came_to(tmp_path: Path, url: str, capsys: Any) -> None:
    cheap = a_call(priced(tmp_path, "2"))
    attempt = Attempt("openai/gpt-4o-mini", "openai", "success", 200, 0.0, 1.0)
    record(url, msgspec.structs.replace(cheap, attempts=(attempt,)))
    command = [
        "prices",
        "rerate",
        "--from",
        str(DAY),
        "--to",
        str(DAY),
        "--database-url",
        url,
        "--config",
        str(SHIPPED),
    ]
    assert main([*command, "--table", "2026-11-01", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["adjusted"], said["difference_usd"]) == (1, {"acme-corp": -0.001847})
    assert main([*command, "--dry-run"]) == 0
    assert "1 calls at the prices of 2026-11-01: 0 would differ." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--from", "2026-11-02", "--to", "2026-11-01", "--database-url", "postgresql://h/d"],
            "--to is before --from.",
        ),
        (["--from", "2026-11-01", "--to", "2026-11-01"], "Set DATABASE_URL"),
        (
            [
                "--from",
                "2026-11-01",
                "--to",
                "2026-11-01",
                "--table",
                "2020-01-01",
                "--database-url",
                "postgresql://h/d",
            ],
            "no table of 2020-01-01",
        ),
    ],
)
def test_what_cannot_be_re_rated_is_said_in_a_sentence(
    options: list[str], sentence: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    assert main(["prices", "rerate", "--config", str(SHIPPED), *options]) == 1
    assert sentence in capsys.readouterr().err
