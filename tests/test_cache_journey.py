"""Answers from before over the whole stack: every dialect, two replicas, the ingest webhook, the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.cache.epochs import REACH_SECONDS
from tests.journey import Journey, chat, decoded, text, until
from tests.test_errands import questions

CACHED = "remembered"
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}


def gateway(journey: Journey, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line, on the stack's Redis and PostgreSQL."""
    urls = {"REDIS_URL": journey.stack.redis_url, "DATABASE_URL": journey.stack.postgres_url}
    command = [sys.executable, "-m", "app.cli", "cache", *arguments]
    return subprocess.run(command, env=ENVIRONMENT | urls, capture_output=True, text=True, timeout=200)


def invalidate(journey: Journey, replica: int = 0, token: str | None = None, **what: Any) -> Any:
    headers = {"authorization": f"Bearer {token or journey.stack.admin_token}"}
    url = journey.stack.replicas[replica].admin_url + "/admin/cache/invalidate"
    return httpx.post(url, headers=headers, json=what, timeout=60)


def asked(journey: Journey) -> int:
    return len(journey.asked("openai"))


def said(words: str) -> dict[str, Any]:
    return chat(words, CACHED)


def test_the_official_sdk_gets_its_stream_from_before(journey: Journey) -> None:
    client = journey.openai()
    question = [{"role": "user", "content": "tokens=9 sdk"}]

    def ask(**more: Any) -> Any:
        return client.chat.completions.create(model=CACHED, messages=question, **more)

    whole = ask().choices[0].message.content
    until(lambda: journey.post(said("tokens=9 sdk")).headers["x-cache"] == "HIT (exact)")
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert chunks[-1].usage.total_tokens > 0
    assert asked(journey) == 1


def test_messages_and_their_streams_come_from_one_entry(journey: Journey) -> None:
    client = journey.anthropic()
    asking = {"model": CACHED, "max_tokens": 50, "messages": [{"role": "user", "content": "tokens=9 messages"}]}
    whole = client.messages.create(**asking)
    until(lambda: client.messages.with_raw_response.create(**asking).headers["x-cache"] == "HIT (exact)")
    with client.messages.stream(**asking) as stream:
        again = stream.get_final_message()
    assert (again.content[0].text, again.usage.output_tokens) == (whole.content[0].text, whole.usage.output_tokens)
    assert asked(journey) == 1


def test_responses_and_their_streams_come_from_one_entry(journey: Journey) -> None:
    client = journey.openai()
    asking = {"model": CACHED, "input": "tokens=9 responses"}
    whole = client.responses.create(**asking)
    until(lambda: client.responses.with_raw_response.create(**asking).headers["x-cache"] == "HIT (exact)")
    with client.responses.stream(**asking) as stream:
        again = stream.get_final_response()
    assert again.output_text == whole.output_text
    assert asked(journey) == 1


def test_a_leader_that_hangs_up_leaves_its_answer_to_the_others(journey: Journey) -> None:
    """Through the door of one replica: the first client closes its connection while another reads the same stream."""
    journey.fault("openai", kind="hold", times=1)
    url = journey.stack.replicas[0].url + "/v1/chat/completions"
    body = said("tokens=40 hang-up") | {"stream": True}
    ids = [f"{name}-{uuid.uuid4()}" for name in ("left", "stayed")]
    left_headers, stayed_headers = (journey.headers(x_request_id=id) for id in ids)
    with httpx.Client(timeout=60) as client, client.stream("POST", url, json=body, headers=left_headers) as first:
        lines = first.iter_lines()
        next(lines)
        with client.stream("POST", url, json=body, headers=stayed_headers) as second:
            first.close()
            journey.release()
            words = text(decoded(second.iter_lines()))
    rows = journey.rows(ids)
    left, stayed = (rows[id] for id in ids)
    assert second.headers["x-cache"] == "HIT (coalesced)"
    assert (left["status"], stayed["status"], stayed["cache_kind"]) == ("client_closed", "success", "coalesced")
    assert (left["usage"]["output_tokens"], stayed["usage"]["output_tokens"], bool(words)) == (40, 0, True)
    assert asked(journey) == 1


def test_what_was_invalidated_at_one_replica_is_asked_again_at_both(journey: Journey) -> None:
    body = said("tokens=5 webhook")
    journey.post(body, x_cache_tags="doc-17")
    until(lambda: journey.post(body, x_cache_tags="doc-17").headers["x-cache"] == "HIT (exact)")
    reply = invalidate(journey, tenant=journey.tenant, tag="doc-17", id="ingest-1")
    assert (reply.status_code, reply.json()["id"]) == (200, "ingest-1")
    first = until(lambda: (r := journey.post(body, x_cache_tags="doc-17")).headers["x-cache"] == "MISS" and r)
    assert first.status_code == 200

    def all_hit() -> bool:
        """At both replicas; until both have heard, each takes the other's answer for one from before."""
        return {journey.post(body, x_cache_tags="doc-17").headers["x-cache"] for _ in range(6)} == {"HIT (exact)"}

    until(all_hit)
    invalidate(journey, replica=1, tenant=journey.tenant, tag="doc-17", id="ingest-1")
    assert all_hit()


def test_a_second_after_an_invalidation_no_replica_answers_from_before(journey: Journey) -> None:
    """By their own doors: same words and same meaning. Whoever has not heard for a second finds nothing at all."""
    first, second = "Which ferry leaves before dawn?", "Hello, which ferry leaves before dawn"

    def ask(replica: int, words: str) -> str:
        url = journey.stack.replicas[replica].url + "/v1/chat/completions"
        headers = journey.headers(x_kb_revision="ferries")
        return httpx.post(url, json=chat(words, "meant-plainly"), headers=headers, timeout=30).headers["x-cache"]

    def known(replica: int, words: Callable[[], str]) -> None:
        """Has a question remembered: while a replica's model is still loading, none is."""
        before = questions(journey, "meant-plainly")
        until(lambda: ask(replica, words()) and questions(journey, "meant-plainly") > before)

    for replica in (0, 1):
        known(replica, lambda: f"Who is captain {uuid.uuid4().hex}?")
    known(0, lambda: first)
    for replica in (0, 1):
        until(lambda replica=replica: ask(replica, first) == "HIT (exact)")
        heard = until(lambda replica=replica: (told := ask(replica, second)) != "BYPASS" and told)
        assert heard == "HIT (semantic)"
    assert invalidate(journey, tenant=journey.tenant, revision="ferries").status_code == 200
    time.sleep(REACH_SECONDS)
    assert ask(1, second) in ("MISS", "BYPASS")
    assert ask(0, first) != "HIT (exact)"  # by meaning it may be: of what has just been answered


@pytest.mark.parametrize(
    ("what", "status"),
    [({}, 400), ({"tenant": "a b"}, 400), ({"tag": ""}, 400), ({"nothing": "x"}, 400), ({"alias": 5}, 400)],
)
def test_the_webhook_refuses_what_it_cannot_read(journey: Journey, what: dict[str, Any], status: int) -> None:
    assert invalidate(journey, **what).status_code == status


def test_the_webhook_wants_the_admin_token(journey: Journey) -> None:
    assert invalidate(journey, token="another", tenant="tenant-a").status_code == 403


def test_the_command_line_shows_what_is_kept_and_invalidates_it(journey: Journey, tmp_path: Path) -> None:
    body = said("tokens=5 command line")
    answered = journey.post(body)
    until(lambda: journey.post(body).headers["x-cache"] == "HIT (exact)")
    stats = {each["tenant"]: each for each in json.loads(gateway(journey, "stats", "--json").stdout)}
    assert stats[journey.tenant]["entries"] > 0
    assert stats[journey.tenant]["bytes"] > 0
    shown = json.loads(gateway(journey, "show", "--tenant", journey.tenant, "--json").stdout)
    assert shown[0]["alias"] == CACHED
    assert shown[0]["model"] == answered.headers["x-gateway-model-resolved"]
    journey.row(answered.headers["x-request-id"])
    page = tmp_path / "cache.html"
    report = gateway(journey, "report", "--tenant", journey.tenant, "--out", str(page), "--json")
    assert report.returncode == 0, report.stderr
    (day,) = [each for each in json.loads(report.stdout)["days"] if each["alias"] == CACHED]
    assert day["calls"] > 0
    assert "By alias" in page.read_text()
    gone = gateway(journey, "invalidate", "--tenant", journey.tenant, "--alias", CACHED)
    assert (gone.returncode, "cache.invalidate" in gone.stderr) == (0, True)
    until(lambda: journey.post(body).headers["x-cache"] == "MISS")


def test_the_command_line_says_what_it_lacks(journey: Journey) -> None:
    assert gateway(journey, "invalidate").returncode == 1
    assert gateway(journey, "show").returncode == 1
