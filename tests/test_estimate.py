"""What is reserved for a call before anybody has counted: by size, by what was learned, by its own limits."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.ambient import Ambient
from app.config import Alias, Rate, Target, Tariff, Window
from app.core import Exchange, Usage, dearest
from app.dialects import openai_chat
from app.estimate import BLOB_TOKENS, FEWEST_BYTES, MOST_BYTES, Estimates
from app.prompt_size import size
from tests import gateway_parts
from tests.gateway_parts import ALIAS, config, request
from tests.translation import target

AMBIENT = Ambient()


def alias(*targets: Any) -> Alias:
    return msgspec.structs.replace(config().aliases[ALIAS], targets=targets or (target("openai"),))


def exchange(body: bytes, **fields: Any) -> Exchange:
    call = gateway_parts.call(body, AMBIENT, **fields)
    made = Exchange(call=call, patience=None, request=openai_chat.read(body))
    made.tenant = call.config.tenants["acme-corp"]
    made.sized = size(body)
    return made


def ended(body: bytes, tokens: int) -> Exchange:
    """A call that the vendor counted `tokens` of input for."""
    made = exchange(body)
    made.usage, made.done = Usage(input=tokens, output=5), True
    return made


def taught(estimates: Estimates, body: bytes, tokens: int, times: int = 200) -> int:
    """Input tokens reserved for `body` after so many calls like it."""
    for _ in range(times):
        estimates.learn(ended(body, tokens))
    return input_tokens(estimates, body)


def input_tokens(estimates: Estimates, body: bytes) -> int:
    made = exchange(body)
    estimates.need(made, alias())
    return made.input_tokens_estimate


def priced(name: str, given: int, made: int, kind: str) -> Target:
    """A target by its prices; those of tier and hours have a tariff too, which asks for a call's tier or its time."""
    one = target("openai")
    price = msgspec.structs.replace(one.price, input=given * 100_000, output=made * 100_000)
    night = Window(0, 3600, Rate(msgspec.structs.replace(price, output=900_000)))
    tariffs = {
        "tier": Tariff(Rate(price), service_tiers={"flex": Rate(one.price)}),
        "hours": Tariff(Rate(price), (night,)),
    }
    return msgspec.structs.replace(one, name=name, price=price, tariff=tariffs.get(kind))


PRICES = st.tuples(st.integers(0, 4), st.integers(0, 4), st.sampled_from(["plain", "plain", "tier", "hours"]))


@given(st.lists(PRICES, min_size=1, max_size=5), st.integers(1, 40), st.integers(0, 40), st.sampled_from([0.0, 7200.0]))
def test_a_call_is_reserved_for_as_if_every_target_had_been_looked_at(
    prices: list[tuple[int, int, str]], given: int, made: int, at: float
) -> None:
    way = alias(*(priced(f"t/{place}", *each) for place, each in enumerate(prices)))
    usage = Usage(input=given, output=made)
    assert dearest(usage, way.dear, None, at).cost == dearest(usage, way.reach, None, at).cost


def test_a_target_that_costs_less_of_everything_is_not_looked_at() -> None:
    cheap, dear, wordy = (priced(f"t/{n}", *each, "tier") for n, each in enumerate([(1, 1), (3, 2), (2, 3)]))
    assert alias(cheap, dear, wordy).dear == (dear, wordy)
    assert alias(cheap, cheap).dear == (cheap,)


LONG = request(messages=[{"role": "user", "content": "word " * 2000}])


def test_before_anything_is_learned_four_bytes_are_a_token() -> None:
    assert input_tokens(Estimates(), LONG) == len(LONG) // 4 + 1


@pytest.mark.parametrize("bytes_per_token", [2.0, 3.0, 5.0])
def test_the_reservation_follows_what_the_vendor_counts(bytes_per_token: float) -> None:
    tokens = int(len(LONG) / bytes_per_token)
    assert abs(taught(Estimates(), LONG, tokens) - tokens) < tokens / 20


def test_what_one_alias_teaches_is_not_another_s() -> None:
    estimates = Estimates()
    taught(estimates, LONG, len(LONG) // 2)
    other = msgspec.structs.replace(alias(), name="another")
    made = exchange(LONG)
    estimates.need(made, other)
    assert made.input_tokens_estimate == len(LONG) // 4 + 1


def test_where_calls_differ_most_of_them_need_less_than_is_reserved() -> None:
    estimates = Estimates()
    for round in range(400):
        estimates.learn(ended(LONG, int(len(LONG) / (3.0, 3.5, 4.0, 4.5, 5.0)[round % 5])))
    reserved = input_tokens(estimates, LONG)
    assert sum(int(len(LONG) / ratio) <= reserved for ratio in (3.0, 3.5, 4.0, 4.5, 5.0)) >= 4


@given(tokens=st.lists(st.integers(1, 10**9), max_size=60))
def test_what_is_learned_stays_within_its_bounds(tokens: list[int]) -> None:
    estimates = Estimates()
    for count in tokens:
        estimates.learn(ended(LONG, count))
    assert len(LONG) / MOST_BYTES <= input_tokens(estimates, LONG) <= len(LONG) / FEWEST_BYTES + 1


def test_one_odd_call_hardly_changes_the_reservation() -> None:
    estimates = Estimates()
    usual = taught(estimates, LONG, len(LONG) // 4)
    estimates.learn(ended(LONG, 1))
    assert usual / 2 < input_tokens(estimates, LONG) <= usual * 2


@pytest.mark.parametrize("fault", ["no usage", "not done", "an image"])
def test_a_call_that_cannot_teach_does_not(fault: str) -> None:
    estimates = Estimates()
    body = LONG if fault != "an image" else request(messages=["data:image/png;base64," + "A" * 4000])
    made = ended(body, 17)
    if fault == "no usage":
        made.usage = None
    elif fault == "not done":
        made.done = False
    estimates.learn(made)
    assert input_tokens(estimates, LONG) == len(LONG) // 4 + 1


def test_an_image_counts_as_one_whatever_its_size() -> None:
    sizes = [
        input_tokens(Estimates(), request(messages=["data:image/png;base64," + "A" * size])) for size in (100, 100_000)
    ]
    assert sizes[0] == sizes[1] > BLOB_TOKENS


@pytest.mark.parametrize(
    ("fields", "hint", "output"),
    [({}, 0, 100), ({"max_tokens": 7}, 0, 7), ({"max_completion_tokens": 7, "n": 3}, 0, 21), ({"max_tokens": 7}, 5, 7)],
)
def test_the_answer_is_reserved_by_its_own_limit(fields: dict[str, int], hint: int, output: int) -> None:
    made = exchange(request(**fields), tokens_hint=hint)
    tokens, _ = Estimates().need(made, alias())
    assert (made.output_tokens_estimate, tokens) == (output, made.input_tokens_estimate + output)


def test_a_hint_can_raise_the_tokens() -> None:
    assert Estimates().need(exchange(request(), tokens_hint=50_000), alias())[0] == 50_000


def test_dollars_are_those_of_the_dearest_target_that_may_answer() -> None:
    cheap = target("openai")
    price = msgspec.structs.replace(cheap.price, input=10**12, output=10**12)
    dear = msgspec.structs.replace(cheap, price=price)
    made = exchange(request(max_tokens=7))
    tokens, nanos = Estimates().need(made, alias(cheap, dear))
    assert nanos == tokens * 10**6
    assert nanos > Estimates().need(made, alias(cheap))[1]


# --- a prompt that the vendor has in its cache ---


def nanos(estimates: Estimates, body: bytes, price: dict[str, int]) -> int:
    """Dollars reserved at these prices of classes; the others cost nothing."""
    made = target("openai")
    priced = msgspec.structs.replace(
        made, price=msgspec.structs.replace(made.price, **dict.fromkeys(made.price.__struct_fields__, 0) | price)
    )
    return estimates.need(exchange(body), alias(priced))[1]


def shown_cached(share: float, times: int = 200) -> Estimates:
    """After so many calls of whose prompts the vendor had this share in its cache."""
    estimates = Estimates()
    for _ in range(times):
        made = exchange(LONG)
        tokens = len(LONG) // 4
        made.usage, made.done = Usage(input=tokens - int(tokens * share), cache_read=int(tokens * share)), True
        estimates.learn(made)
    return estimates


READ, PLAIN, WRITE, WRITE_1H = ({name: 10**9} for name in ("cache_read", "input", "cache_write", "cache_write_1h"))


def test_before_anything_is_learned_no_prompt_is_taken_to_be_cached() -> None:
    assert (nanos(Estimates(), LONG, READ), nanos(Estimates(), LONG, PLAIN) > 0) == (0, True)


def test_the_share_that_the_vendor_reads_from_its_cache_is_reserved_at_that_price() -> None:
    estimates = shown_cached(0.9)
    read, plain = nanos(estimates, LONG, READ), nanos(estimates, LONG, PLAIN)
    assert read / (read + plain) == pytest.approx(0.9, abs=0.03)
    assert estimates.need(exchange(LONG), alias())[0] == pytest.approx(
        len(LONG) / 4 + 100, rel=0.01
    )  # tokens are tokens


def test_where_some_prompts_are_cached_and_some_are_not_little_is_taken_to_be() -> None:
    estimates = Estimates()
    for number in range(400):
        made = exchange(LONG)
        made.usage, made.done = Usage(input=100, cache_read=900) if number % 2 else Usage(input=1000), True
        estimates.learn(made)
    read, plain = nanos(estimates, LONG, READ), nanos(estimates, LONG, PLAIN)
    assert read / (read + plain) < 0.1


@pytest.mark.parametrize(("ttl", "price"), [({}, WRITE), ({"ttl": "1h"}, WRITE_1H)])
def test_a_prompt_that_is_to_be_cached_is_reserved_at_what_writing_costs(ttl: dict[str, str], price: Any) -> None:
    marked = {"type": "text", "text": "word " * 2000, "cache_control": {"type": "ephemeral"} | ttl}
    body = request(messages=[{"role": "user", "content": [marked]}])
    assert (nanos(Estimates(), body, price) > 0, nanos(Estimates(), body, PLAIN)) == (True, 0)


@given(shares=st.lists(st.floats(0, 1), max_size=40))
def test_a_prompt_s_parts_are_the_prompt(shares: list[float]) -> None:
    estimates = Estimates()
    for share in shares:
        made = exchange(LONG)
        made.usage, made.done = Usage(input=1000 - int(1000 * share), cache_read=int(1000 * share)), True
        estimates.learn(made)
    parts = [nanos(estimates, LONG, price) for price in (READ, PLAIN)]
    made = exchange(LONG)
    estimates.need(made, alias())
    assert abs(sum(parts) - made.input_tokens_estimate * 1000) <= 2
    assert min(parts) >= 0
