"""What a call costs beside its tokens: long contexts, service tiers, times of day, discounts; and the price tables."""

from __future__ import annotations

import json
import shutil
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from app.ambient import Ambient
from app.cli import main
from app.config import (
    Config,
    ConfigError,
    ConfigSource,
    Price,
    PriceTable,
    Target,
    WrittenPrice,
    load,
    read_price_table,
    write_price_table,
)
from app.core import Usage, charge, saved_nanos
from app.price_sync import Wanted, sync
from app.providers.openai import OPENAI
from app.providers.translator import Stamp
from tests.test_config import ENVIRON, SHIPPED

DAY = date(2026, 11, 1)
MIDNIGHT = 1_793_491_200.0  # 2026-11-01T00:00:00Z
SOURCED = {"source": "the vendor's page", "checked_on": DAY}
TABLE = {
    "openai": {
        "plain": {"input": 2, "output": 10, "cache_read": 1, **SOURCED},
        "layered": {
            "input": 1, "output": 8, "cache_read": 0.1, "cache_write": 2,
            "long_context": [{"above_input_tokens": 200_000, "input": 2}, {"above_input_tokens": 1000, "output": 9}],
            "service_tiers": {
                "priority": {"input": 4, "long_context": [{"above_input_tokens": 500, "input": 5}]},
                "batch": {"output": 4},
            },
            "windows": [{"from": "16:30", "to": "00:30", "input": 0.5}, {"from": "00:00", "to": "06:00", "input": 0.7}],
            **SOURCED,
        },
    },
}  # fmt: skip


def configured(folder: Path, discounts: list[dict[str, Any]] = (), prices: Any = TABLE) -> Config:  # type: ignore[assignment]
    """A configuration with the targets `openai/plain`, `openai/layered`, `openai/deployed` and these prices."""
    overlay = {
        "targets": {
            "openai/plain": {"provider": "openai", "model": "plain"},
            "openai/layered": {"provider": "openai", "model": "layered"},
            "openai/deployed": {"provider": "openai", "model": "my-deployment", "priced_as": "plain"},
        },
        "prices": prices,
        "discounts": [{**SOURCED, **discount} for discount in discounts],
    }
    file = folder / "overlay.yaml"
    file.write_text(yaml.safe_dump(overlay, sort_keys=False))
    return load(SHIPPED, "prod", [file], environ=ENVIRON, day=DAY)


@pytest.fixture
def layered(tmp_path: Path) -> Target:
    return configured(tmp_path).targets["openai/layered"]


def usd(nanos: int) -> Decimal:
    return Decimal(nanos).scaleb(-9)


def price(
    target: Target, input_tokens: int = 1, tier: str | None = None, clock: str = "12:00", tenant: str = "t"
) -> Price:
    hours, minutes = clock.split(":")
    at = MIDNIGHT + int(hours) * 3600 + int(minutes) * 60
    return target.price_for(tenant, Usage(input=input_tokens), tier, at)


# --- what a price depends on ---


@pytest.mark.parametrize(
    ("input_tokens", "paid"), [(1000, (1, 8)), (1001, (1, 9)), (200_000, (1, 9)), (200_001, (2, 8))]
)
def test_a_long_context_is_one_token_above_its_threshold(layered: Target, input_tokens: int, paid: Any) -> None:
    found = price(layered, input_tokens)
    assert (usd(found.input), usd(found.output)) == paid


def test_cached_tokens_count_for_a_long_context(layered: Target) -> None:
    used = Usage(input=1, cache_read=199_999, cache_write=1)
    assert charge(used, layered, "t", None, MIDNIGHT + 43_200).input_nanos == 2_000 + 19_999_900 + 2_000


@pytest.mark.parametrize(
    ("tier", "tokens", "paid"),
    [
        ("priority", 1, (4, 8)),
        ("priority", 501, (5, 8)),
        ("batch", 5000, (1, 4)),
        ("default", 1, (1, 8)),
        (None, 1, (1, 8)),
    ],
)
def test_a_service_tier_has_its_own_prices(layered: Target, tier: str | None, tokens: int, paid: Any) -> None:
    found = price(layered, tokens, tier)
    assert (usd(found.input), usd(found.output)) == paid


@pytest.mark.parametrize(
    ("clock", "paid"),
    [("16:29", "1"), ("16:30", "0.5"), ("23:59", "0.5"), ("00:00", "0.5"), ("00:29", "0.5"), ("00:30", "0.7"),
     ("05:59", "0.7"), ("06:00", "1")],
)  # fmt: skip
def test_a_time_window_holds_to_its_minute_and_past_midnight(layered: Target, clock: str, paid: str) -> None:
    assert usd(price(layered, clock=clock).input) == Decimal(paid)


def test_a_service_tier_goes_before_the_time_of_day(layered: Target) -> None:
    assert usd(price(layered, tier="priority", clock="17:00").input) == 4


def test_a_class_that_a_rate_leaves_out_follows_the_rate_s_own_plain_class(layered: Target) -> None:
    found = price(layered, tier="priority")
    assert (usd(found.audio_input), usd(found.cache_read)) == (4, Decimal("0.1"))


def test_hourly_cache_writes_cost_what_the_short_ones_do_unless_priced(layered: Target) -> None:
    assert price(layered).cache_write_1h == price(layered).cache_write == 2_000_000_000


def test_a_plain_price_has_no_tariff_to_go_through(tmp_path: Path) -> None:
    target = configured(tmp_path).targets["openai/plain"]
    assert (target.tariff, target.tenant_tariffs) == (None, {})


def test_a_deployment_is_priced_as_the_model_it_names(tmp_path: Path) -> None:
    targets = configured(tmp_path).targets
    assert targets["openai/deployed"].price == targets["openai/plain"].price


@pytest.mark.parametrize(
    ("written", "tier"), [(b'"priority"', "priority"), (b"null", None), (b"3", None), (b'{"a":1}', None)]
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_service_tier_that_the_vendor_names_is_read(written: bytes, tier: str | None, stream: bool) -> None:
    stamp = Stamp("chatcmpl-1", 0, "m")
    choice = b'"choices":[{"index":0,"%b":{"content":"hi"},"finish_reason":"stop"}],"service_tier":%b}'
    if not stream:
        assert OPENAI.response(b'{"model":"m",' + choice % (b"message", written), stamp).service_tier == tier
        return
    reader = OPENAI.stream(stamp)
    list(reader.feed(b'data: {"model":"m",' + choice % (b"delta", written) + b"\n\n"))
    assert reader.service_tier == tier


# --- discounts ---


def test_of_the_discounts_that_hold_the_first_counts(tmp_path: Path) -> None:
    target = configured(
        tmp_path,
        [
            {"percent": 50, "tenant": "acme-corp", "target": "openai/layered"},
            {"percent": 25, "tenant": "acme-corp"},
            {"percent": 10, "provider": "openai"},
            {"percent": 90, "tenant": "acme-staging", "provider": "openai"},
        ],
    ).targets
    paid = {
        (name, tenant): usd(price(target[f"openai/{name}"], tenant=tenant).input)
        for name in ("plain", "layered")
        for tenant in ("acme-corp", "acme-staging", "internal-tools")
    }
    assert paid == {
        ("plain", "acme-corp"): Decimal("1.5"),
        ("layered", "acme-corp"): Decimal("0.5"),
        ("plain", "acme-staging"): Decimal("1.8"),
        ("layered", "acme-staging"): Decimal("0.9"),
        ("plain", "internal-tools"): Decimal("1.8"),
        ("layered", "internal-tools"): Decimal("0.9"),
    }


def test_a_discount_holds_for_long_contexts_tiers_and_windows_too(tmp_path: Path) -> None:
    target = configured(tmp_path, [{"percent": 50, "tenant": "acme-corp"}]).targets["openai/layered"]
    paid = [
        price(target, 200_001, tenant="acme-corp").input,
        price(target, 501, "priority", tenant="acme-corp").input,
        price(target, clock="17:00", tenant="acme-corp").input,
    ]
    assert [usd(nanos) for nanos in paid] == [1, Decimal("2.5"), Decimal("0.25")]


@given(st.builds(Price, **dict.fromkeys(Price.__struct_fields__, st.integers(0, 10**12))), st.integers(0, 10_000))
def test_a_discounted_price_is_within_half_a_nano_dollar_per_million_tokens(whole: Price, hundredths: int) -> None:
    for name, nanos in msgspec.structs.asdict(whole.less(hundredths)).items():
        assert abs(nanos * 10_000 - getattr(whole, name) * (10_000 - hundredths)) <= 5_000


@pytest.mark.parametrize(
    ("discount", "fault"),
    [
        ({"percent": 5, "tenant": "nobody"}, "discounts[0].tenant: no tenant 'nobody'"),
        ({"percent": 5, "target": "openai/none"}, "discounts[0].target: no target 'openai/none'"),
        ({"percent": 5, "provider": "none"}, "discounts[0].provider: no provider 'none'"),
        ({"percent": 101, "provider": "openai"}, "discounts[0].percent: must be from 0 to 100"),
        ({"percent": 5}, "discounts[0]: names neither a tenant nor a target nor a provider"),
    ],
)
def test_a_discount_that_cannot_hold_is_a_fault(tmp_path: Path, discount: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as raised:
        configured(tmp_path, [discount])
    assert fault in str(raised.value)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"windows": [{"from": "24:00", "to": "01:00"}]}, "windows[0].from: '24:00' is not a time of the day"),
        ({"long_context": [{"above_input_tokens": 0}]}, "long_context: above_input_tokens must be above 0"),
        ({"input": None}, "input: is required"),
    ],
)
def test_a_price_that_cannot_hold_is_a_fault(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    prices = {"openai": {"plain": {**TABLE["openai"]["plain"], **change}}}
    with pytest.raises(ConfigError) as raised:
        configured(tmp_path, prices=prices)
    assert f"prices.openai.plain.{fault}" in str(raised.value)


# --- savings ---


def test_a_cache_hit_saves_what_its_answer_would_have_cost(layered: Target) -> None:
    used = Usage(input=2000, output=100)
    at = MIDNIGHT + 43_200
    assert saved_nanos(used, layered, "t", at) == charge(used, layered, "t", None, at).total_nanos > 0


def test_a_cache_hit_on_a_model_without_a_price_claims_no_saving(layered: Target) -> None:
    unpriced = msgspec.structs.replace(layered, priced=False)
    assert saved_nanos(Usage(input=2000, output=100), unpriced, "t", MIDNIGHT) == 0


# --- tables ---


class Clock(Ambient):
    day = DAY

    def now(self) -> float:
        return datetime.fromisoformat(f"{self.day.isoformat()}T00:00:00+00:00").timestamp()


def test_a_table_of_a_later_day_takes_effect_when_the_day_begins(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SHIPPED, tmp_path / "config"))
    later = DAY + timedelta(days=40)
    shutil.copy(folder / "prices" / "2026-11-01.yaml", folder / "prices" / f"{later.isoformat()}.yaml")
    clock = Clock()
    source = ConfigSource(folder, "prod", (), ENVIRON, clock)
    seen = [(source.changed(), source.current.price_version)]
    clock.day = later
    seen += [(source.changed(), source.reload())]
    assert seen == [(False, "2026-11-01"), (True, True)]
    assert source.current.price_version == later.isoformat()


def test_the_oldest_check_of_a_price_in_use_is_known(tmp_path: Path) -> None:
    prices = {"openai": {name: dict(entry) for name, entry in TABLE["openai"].items()}}
    prices["openai"]["layered"]["checked_on"] = date(2026, 10, 1)
    prices["openai"]["unused"] = {"input": 1, "source": "s", "checked_on": date(2020, 1, 1)}
    assert configured(tmp_path, prices=prices).prices_checked_on == date(2026, 10, 1)


TEXTS = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1)
AMOUNTS = st.none() | st.decimals(0, 1000, places=6)


@given(st.fixed_dictionaries(dict.fromkeys(("cache_read", "output", "embedding"), AMOUNTS)), TEXTS)
def test_a_written_table_reads_back_the_same(tmp_path_factory: pytest.TempPathFactory, classes: Any, name: str) -> None:
    entry = msgspec.convert({**TABLE["openai"]["layered"], **classes}, WrittenPrice)
    table = PriceTable("# what it is\n", {"openai": {name: entry, "b-1.0:0": entry}})
    path = tmp_path_factory.mktemp("table") / "2026-11-01.yaml"
    path.write_text(write_price_table(table))
    assert read_price_table(path) == table


def test_the_shipped_tables_are_written_as_the_command_writes_them() -> None:
    for path in (SHIPPED / "prices").glob("*.yaml"):
        assert write_price_table(read_price_table(path)) == path.read_text()


# --- sync: the library's own data, as of its release ---

SONNET = Wanted("anthropic", "https://api.anthropic.com", "claude-sonnet-4-5-20250929")
CHAT = Wanted("deepseek", "https://api.deepseek.com", "deepseek-chat")


def test_sync_takes_long_contexts_cache_writes_and_batch_prices() -> None:
    found = sync(PriceTable("", {}), [SONNET], DAY).table.prices["anthropic"][SONNET.model]
    (step,) = found.long_context
    assert (found.cache_write, found.cache_write_1h, found.output) == (Decimal("3.75"), 6, 15)
    assert (step.above_input_tokens, step.input, step.cache_write_1h) == (200_000, 6, 12)
    assert found.service_tiers["batch"].input == Decimal("1.5")


def test_sync_takes_times_of_day() -> None:
    found = sync(PriceTable("", {}), [CHAT], DAY).table.prices["deepseek"][CHAT.model]
    assert [(window.from_, window.to) for window in found.windows] == [("00:30", "16:30")]
    assert found.windows[0].input > found.input


@pytest.mark.parametrize(
    ("provider", "base_url", "model"),
    [
        ("bedrock", "https://bedrock-runtime.eu-central-1.amazonaws.com", "amazon.nova-lite-v1:0"),
        ("xai", "https://api.x.ai/v1", "grok-4-0709"),
        ("eu-mistral", "https://api.mistral.ai/v1", "mistral-small-2506"),
    ],
)
def test_sync_finds_a_vendor_by_our_name_or_its_address(provider: str, base_url: str, model: str) -> None:
    assert sync(PriceTable("", {}), [Wanted(provider, base_url, model)], DAY).table.prices[provider][model].input


def test_sync_keeps_what_the_library_does_not_know_and_says_what_is_missing() -> None:
    mine = msgspec.convert({"input": 1, **SOURCED}, WrittenPrice)
    synced = sync(PriceTable("", {"own": {"m": mine}}), [Wanted("own", "https://own.example", "n")], DAY)
    assert synced.table.prices == {"own": {"m": mine}}
    assert (synced.kept, synced.missing) == (("own m, checked on 2026-11-01",), ("own n",))


def test_sync_says_what_changes() -> None:
    before = sync(PriceTable("", {}), [SONNET], DAY).table.prices["anthropic"][SONNET.model]
    old = msgspec.structs.replace(before, output=Decimal(16), long_context=[])
    synced = sync(PriceTable("", {"anthropic": {SONNET.model: old}}), [SONNET], DAY)
    name = f"anthropic {SONNET.model}"
    assert synced.changes == (f"{name}: output 16 -> 15", f"{name}: long_context changed")


def test_sync_agrees_with_the_library_s_own_arithmetic(tmp_path: Path) -> None:
    from genai_prices import Usage as TheirUsage
    from genai_prices import calc_price

    file = tmp_path / "overlay.yaml"
    file.write_text(
        write_price_table(sync(PriceTable("", {}), [SONNET], DAY).table)
        + f"providers: {{anthropic: {{kind: openai, base_url: {SONNET.base_url}, api_key: env:OPENAI_API_KEY}}}}\n"
        + f"targets: {{anthropic/sonnet: {{provider: anthropic, model: {SONNET.model}}}}}\n"
    )
    target = load(SHIPPED, "prod", [file], environ=ENVIRON, day=DAY).targets["anthropic/sonnet"]
    for scale in (1, 1000):
        used = Usage(
            input=123 * scale, cache_read=45 * scale, cache_write=67 * scale, cache_write_1h=8 * scale, output=9
        )
        theirs = calc_price(
            TheirUsage(
                input_tokens=used.total_input,
                cache_read_tokens=used.cache_read,
                cache_write_tokens=used.cache_write + used.cache_write_1h,
                cache_write_1h_tokens=used.cache_write_1h,
                output_tokens=used.output,
            ),
            SONNET.model,
            provider_id="anthropic",
        )
        ours = charge(used, target, "t", None, MIDNIGHT)
        assert usd(ours.total_nanos) == theirs.total_price


# --- the command ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "config"))


def test_sync_writes_a_new_table_that_loads_and_never_over_an_old_one(folder: Path, capsys: Any) -> None:
    later = (DAY + timedelta(days=400)).isoformat()
    command = ["prices", "sync", "--config", str(folder), "--day", later]
    assert main(command) == 0
    assert read_price_table(folder / "prices" / f"{later}.yaml").prices["openai"]
    capsys.readouterr()
    assert main(command) == 1
    assert "exists, and rows may carry its name" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(folder: Path) -> None:
    before = sorted((folder / "prices").iterdir())
    assert main(["prices", "sync", "--config", str(folder), "--day", "2030-01-01", "--dry-run"]) == 0
    assert sorted((folder / "prices").iterdir()) == before


def test_prices_are_listed_with_their_source(folder: Path, capsys: Any) -> None:
    assert main(["prices", "--config", str(folder)]) == 0
    listed = capsys.readouterr().out
    assert "openai gpt-4o-mini-2024-07-18  (genai-prices" in listed
    assert "above 200,000 input tokens: input 6" in listed


def test_prices_are_listed_as_json_numbers(folder: Path, capsys: Any) -> None:
    assert main(["prices", "--config", str(folder), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["prices"]["openai"]["gpt-4o-mini-2024-07-18"]["cache_read"] == 0.075


def test_a_target_without_a_price_fails_the_check(folder: Path, capsys: Any) -> None:
    models = folder / "gateway_models.yaml"
    models.write_text(
        models.read_text().replace("targets:\n", "targets:\n  openai/new: {provider: openai, model: new}\n", 1)
    )
    assert main(["check", "--config", str(folder), "--no-secrets"]) == 1
    assert "openai/new (openai new)" in capsys.readouterr().err


def test_a_faulty_table_of_a_later_day_fails_the_check(folder: Path, capsys: Any) -> None:
    (folder / "prices" / "2999-01-01.yaml").write_text(
        "prices: {openai: {m: {input: -1, source: s, checked_on: 2026-11-01}}}\n"
    )
    assert main(["check", "--config", str(folder), "--no-secrets"]) == 1
    assert "2999-01-01.yaml: prices.openai.m.input: -1 is not a price" in capsys.readouterr().err
