"""The gateway's own calls over the whole stack: vectors of questions, and a judge of answers, by aliases."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import httpx
import msgspec
import pytest
from redis import Redis

from app.cache.embedder import Embedders
from app.config import Alias
from app.core import Exchange
from app.errands import MOST_AT_ONCE, Errands, case
from tests import gateway_parts
from tests.journey import Journey, chat, until
from tests.redis_parts import AMBIENT, run

ALIAS, HASTY = "meant", "meant-hasty"


@pytest.fixture
def book(journey: Journey) -> Iterator[dict[str, str]]:
    """What vendors answer to a last message; read when the test calls `told`."""
    yield {}
    httpx.delete(f"{journey.stack.simulator_url}/_sim/answers", timeout=60).raise_for_status()


def told(journey: Journey, book: dict[str, str]) -> None:
    httpx.put(f"{journey.stack.simulator_url}/_sim/answers", json=book, timeout=60).raise_for_status()


def own(journey: Journey, purpose: str, since: datetime) -> list[dict[str, Any]]:
    """The rows of the gateway's own calls."""
    rows = journey.query(
        "SELECT event FROM ledger WHERE purpose = %s AND occurred_at >= %s ORDER BY occurred_at", purpose, since
    )
    return [row["event"] for row in rows]


def questions(journey: Journey, alias: str) -> int:
    """How many questions of the alias are remembered."""
    with Redis.from_url(journey.stack.redis_url) as client:
        keys = client.scan_iter(match=f"sc:{{{journey.tenant}}}:{alias}:v2:*")
        return sum(client.execute_command("VCARD", key) for key in keys)


def figure(journey: Journey, alias: str, name: str) -> int:
    with Redis.from_url(journey.stack.redis_url, decode_responses=True) as client:
        keys = client.scan_iter(match=f"sc:{{{journey.tenant}}}:_figures:*")
        return sum(int(client.hget(key, f"{alias}:{name}") or 0) for key in keys)


def heard(journey: Journey, words: str, alias: str = ALIAS) -> httpx.Response:
    """The answer of a replica that looked: one that has not heard of invalidations for a second looks for nothing."""
    return until(
        lambda: answer if (answer := journey.post(chat(words, alias))).headers["x-cache"] != "BYPASS" else None
    )


def test_an_alias_makes_vectors_and_their_tokens_are_in_the_ledger(journey: Journey, book: dict[str, str]) -> None:
    since = datetime.now(UTC)
    one, two = "Which harbor has a lantern at night?", "Hello, which harbor has a lantern at night"
    told(journey, book | dict.fromkeys((one, two), "The eastern one."))
    checks, before = figure(journey, ALIAS, "checks"), questions(journey, ALIAS)
    assert heard(journey, one).headers["x-cache"] == "MISS"
    until(lambda: questions(journey, ALIAS) > before)
    hit = heard(journey, two)
    assert hit.headers["x-cache"] == "HIT (semantic)"
    assert hit.json()["choices"][0]["message"]["content"] == "The eastern one."
    rows = until(lambda: len(found := own(journey, "embedding", since)) >= 2 and found)
    row = rows[0]
    assert (row["tenant_id"], row["model_alias"], row["operation"]) == ("_gateway", "embed-small", "embeddings")
    assert (row["status"], row["usage"]["embedding_tokens"] > 0) == ("success", True)
    assert row["cost_usd"]["total"] > 0
    until(lambda: figure(journey, ALIAS, "checks") > checks)  # it is asked again behind the caller's back: not later


@pytest.mark.parametrize("fault", [{"kind": "hang"}, {"kind": "status", "status": 500}, {"kind": "reset"}])
def test_an_embedder_that_is_late_or_broken_is_a_miss(journey: Journey, fault: dict[str, Any]) -> None:
    since = datetime.now(UTC)
    journey.fault("openai", model="text-embedding-3-small", **fault)
    answer = heard(journey, f"Where does the {fault['kind']} ferry land?", HASTY)
    assert (answer.status_code, answer.headers["x-cache"]) == (200, "MISS")
    (row,) = until(lambda: own(journey, "embedding", since))
    assert row["status"] in ("timeout", "error")
    assert journey.row(answer.headers["x-request-id"])["status"] == "success"


@pytest.mark.parametrize("says", ["different", "Same."])
def test_a_judge_says_whether_what_was_served_was_right(journey: Journey, book: dict[str, str], says: str) -> None:
    since = datetime.now(UTC)
    one, two = f"Who paints the {says} boats in winter?", f"Please, who paints the {says} boats in winter"
    first, second = "The crew paints them.", "Nobody does that."
    told(journey, book | {one: first, two: second, case(two, second, first): says})
    checks, wrong = (figure(journey, ALIAS, name) for name in ("checks", "wrong"))
    before = questions(journey, ALIAS)
    heard(journey, one)
    until(lambda: questions(journey, ALIAS) > before)
    assert heard(journey, two).headers["x-cache"] == "HIT (semantic)"
    until(lambda: figure(journey, ALIAS, "checks") > checks)
    assert figure(journey, ALIAS, "wrong") - wrong == (says == "different")
    row = until(lambda: own(journey, "judge", since))[-1]
    assert (row["tenant_id"], row["model_alias"], row["status"]) == ("_gateway", "judging", "success")
    assert row["cost_usd"]["total"] > 0
    asked = [json.loads(each["body"]["messages"][-1]["content"]) for each in journey.asked("openrouter")]
    assert {"question": two, "one": second, "other": first} in asked


def test_the_looks_are_counted_by_tenant_alias_and_outcome(journey: Journey) -> None:
    counted = 'gateway_semantic_looks_total{alias="meant-plainly",outcome="alone",tenant="tenant-a"}'

    def looked() -> bool:
        """Each time where nobody else has asked; the first ones may have to do without the model, which is loading."""
        journey.post(chat("What is the tide at the old pier?", "meant-plainly"), x_kb_revision=uuid.uuid4().hex)
        scraped = "".join(journey.admin("/metrics", replica).text for replica in range(2))
        return any(line.startswith(counted) and float(line.split()[-1]) > 0 for line in scraped.splitlines())

    until(looked)


class Vendors:
    """What errands are sent to: `asked` has the chains, by purpose. Nothing is answered before `answer` is set."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[str, ...]]] = []
        self.answer = asyncio.Event()
        self.done = 0

    async def send(self, exchange: Exchange, alias: Alias) -> bytes:
        self.asked.append((exchange.purpose, tuple(target.provider.region or "" for target in alias.targets)))
        await self.answer.wait()
        self.done += 1
        if exchange.purpose == "judge":
            return b'{"choices":[{"message":{"content":"same"}}]}'
        return b'{"data":[{"embedding":[3.0,4.0]}]}'


def sent(vendors: Vendors, *regions: str | None) -> Errands:
    """Errands by one alias, whose targets are in these regions."""
    at = gateway_parts.config()
    (plain,) = at.aliases[gateway_parts.ALIAS].targets
    targets = tuple(
        msgspec.structs.replace(plain, provider=msgspec.structs.replace(plain.provider, region=region))
        for region in regions
    )
    alias = at.aliases[gateway_parts.ALIAS].along(targets)
    found = msgspec.structs.replace(at, aliases={"helper": msgspec.structs.replace(alias, name="helper")})
    return Errands(lambda: found, vendors.send, AMBIENT)


@pytest.mark.parametrize(
    ("residency", "regions"), [(frozenset({"eu"}), [("eu",)]), (frozenset({"ap"}), []), (None, [("us", "eu", "")])]
)
def test_what_a_tenant_says_is_sent_to_its_regions_only(
    residency: frozenset[str] | None, regions: list[tuple[str, ...]]
) -> None:
    async def scenario() -> None:
        vendors = Vendors()
        vendors.answer.set()
        errands = sent(vendors, "us", "eu", None)
        vector = await Embedders(errands.vectors).of("helper", residency).embed("Where do I live?", 5.0)
        assert (vector is not None) == bool(regions)
        assert (await errands.same("helper", "a", "b", "c", residency)) is (True if regions else None)
        assert vendors.asked == [(purpose, chain) for purpose in ("embedding", "judge") for chain in regions]

    run(scenario())


def test_judges_that_hang_keep_no_vector_waiting_and_no_more_of_them_are_asked() -> None:
    async def scenario() -> None:
        vendors = Vendors()
        errands = sent(vendors, None)
        judges = [asyncio.ensure_future(errands.same("helper", "a", "b", "c")) for _ in range(MOST_AT_ONCE["judge"])]
        vector = asyncio.ensure_future(errands.vectors("helper", None).embed("a", 5.0))
        await asyncio.sleep(0)
        assert await errands.same("helper", "a", "b", "c") is None
        await asyncio.sleep(0)
        assert [purpose for purpose, _ in vendors.asked] == ["judge"] * MOST_AT_ONCE["judge"] + ["embedding"]
        vendors.answer.set()
        assert await vector is not None
        assert await asyncio.gather(*judges) == [True] * MOST_AT_ONCE["judge"]

    run(scenario())


def test_a_vector_is_late_by_its_own_time_whatever_it_waits_for_and_its_row_comes_all_the_same() -> None:
    async def scenario() -> None:
        vendors = Vendors()
        errands = sent(vendors, None)
        assert await errands.vectors("helper", None).embed("a", 0.01) is None
        vendors.answer.set()
        await asyncio.gather(*errands._running["embedding"])
        assert vendors.done == 1

    run(scenario())


def test_nothing_is_sent_once_they_are_closed() -> None:
    async def scenario() -> None:
        vendors = Vendors()
        errands = sent(vendors, None)
        judging = asyncio.ensure_future(errands.same("helper", "a", "b", "c"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await errands.close()
        assert await asyncio.gather(judging, return_exceptions=True) != [True]
        assert await errands.same("helper", "a", "b", "c") is None
        assert await errands.vectors("helper", None).embed("a", 5.0) is None
        assert len(vendors.asked) == 1

    run(scenario())
