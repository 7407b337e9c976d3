"""Hang-ups, killed processes, deploys, and dependencies that are away: no row is lost and nobody is blocked."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
import redis

from tests.journey import Journey, chat, decoded, events, text, until
from tests.limits_parts import not_just_before_midnight


def _alone(journey: Journey) -> httpx.Client:
    """A client whose connections are its own, so that closing it is a hang-up."""
    return httpx.Client(base_url=journey.stack.url, verify=journey.stack.tls(), timeout=60)


# --- the client hangs up --------------------------------------------------------------------------------------------


def test_hung_up_stream_cancels_the_vendor_in_mid_answer_and_leaves_its_row(journey: Journey) -> None:
    journey.fault(kind="hold", after_chunks=6)
    with _alone(journey) as client, journey.stream(chat("tokens=400"), client) as answer:
        lines = answer.iter_lines()
        for _ in range(12):
            next(lines)
    until(lambda: journey.counts()["aborted"] == 1)  # which says no more until somebody tells it to
    event = journey.row(answer.headers["x-request-id"])
    assert (event["status"], event["usage_source"]) == ("client_closed", "estimated")
    assert 0 < event["usage"]["output_tokens"] < 100
    assert event["cost_usd"]["total"] > 0


@pytest.mark.drill
def test_hung_up_stream_cancels_the_vendor_within_a_second(journey: Journey) -> None:
    journey.fault(kind="hold", after_chunks=6)
    with _alone(journey) as client, journey.stream(chat("tokens=400"), client) as answer:
        next(answer.iter_lines())
    hung_up = time.monotonic()
    until(lambda: journey.counts()["aborted"] == 1)
    assert time.monotonic() - hung_up < 1


def test_hung_up_waiting_call_cancels_the_vendor_and_leaves_its_row(journey: Journey) -> None:
    journey.fault("openai", kind="hang")
    headers = journey.headers()
    with journey.unread(chat(), headers):
        until(lambda: journey.counts().get("requests") == 1)
    until(lambda: journey.counts()["aborted"] == 1)
    event = journey.row(headers["x-request-id"])
    assert event["status"] == "client_closed"
    assert [attempt["outcome"] for attempt in event["attempts"]] == ["cancelled"]
    assert journey.asked("openrouter") == []


def test_hung_up_call_gets_the_rest_of_its_reservation_back(journey: Journey) -> None:
    def remaining() -> int:
        return int(journey.post(chat("tokens=2", max_tokens=2)).headers["x-ratelimit-remaining-tokens"])

    before = remaining()
    journey.fault(kind="hold")
    with _alone(journey) as client, journey.stream(chat("tokens=400", max_tokens=90_000), client) as answer:
        next(answer.iter_lines())
    journey.release()
    journey.row(answer.headers["x-request-id"])
    until(lambda: before - remaining() < 10_000)


def test_hang_up_during_the_upload_leaves_a_row(journey: Journey) -> None:
    headers = journey.headers()

    def halfway() -> Iterator[bytes]:
        yield b'{"model":'
        raise ConnectionAbortedError

    with _alone(journey) as client, pytest.raises(ConnectionAbortedError):
        client.post("/v1/chat/completions", content=halfway(), headers=headers)
    assert journey.row(headers["x-request-id"])["status"] == "client_closed"


# --- a process is killed --------------------------------------------------------------------------------------------


def test_killed_replica_loses_no_completed_row_and_leaves_interrupted_ones(whole: Journey) -> None:
    victim = whole.stack.replicas[0]
    completed: list[str] = []
    open_calls: list[str] = []
    stopping = threading.Event()

    def load() -> None:
        with httpx.Client(base_url=victim.url, timeout=60) as client:
            while not stopping.is_set():
                headers = whole.headers()
                try:
                    if client.post("/v1/chat/completions", json=chat("tokens=2"), headers=headers).status_code == 200:
                        completed.append(headers["x-request-id"])
                except httpx.TransportError:
                    return

    def hold() -> None:
        headers = whole.headers()
        open_calls.append(headers["x-request-id"])
        try:
            body = chat("tokens=500 chunk_ms=50", stream=True)
            with httpx.stream(
                "POST", victim.url + "/v1/chat/completions", json=body, headers=headers, timeout=60
            ) as answer:
                for _ in answer.iter_lines():
                    pass
        except httpx.TransportError:
            pass

    threads = [threading.Thread(target=work) for work in [load] * 4 + [hold] * 3]
    for thread in threads:
        thread.start()
    until(lambda: len(completed) > 100 and whole.counts()["open"] >= 3)
    os.kill(victim.pid, signal.SIGKILL)
    stopping.set()
    for thread in threads:
        thread.join()
    assert {event["status"] for event in whole.rows(completed).values()} == {"success"}
    interrupted = whole.rows(open_calls)
    assert {event["status"] for event in interrupted.values()} == {"interrupted"}
    assert all(
        event["usage_source"] == "estimated" and event["cost_usd"]["total"] > 0 for event in interrupted.values()
    )


def test_calls_go_on_through_traefik_when_a_replica_is_killed(whole: Journey) -> None:
    os.kill(whole.stack.replicas[1].pid, signal.SIGKILL)
    until(lambda: all(whole.post(chat("tokens=2")).status_code == 200 for _ in range(10)))


# --- a deploy -------------------------------------------------------------------------------------------------------


def test_sigterm_with_twenty_open_streams_truncates_none(whole: Journey) -> None:
    ids = [whole.headers()["x-request-id"] for _ in range(20)]

    def stream(request_id: str) -> list[Any]:
        with (
            _alone(whole) as client,
            whole.stream(chat("tokens=60"), client, x_request_id=request_id) as answer,
        ):
            return events(answer)

    before = [replica.pid for replica in whole.stack.replicas]
    whole.fault(kind="hold")
    with ThreadPoolExecutor(20) as pool:
        streams = [pool.submit(stream, request_id) for request_id in ids]
        until(lambda: whole.counts().get("streams") == 20)
        for pid in before:
            os.kill(pid, signal.SIGTERM)
        until(lambda: all(whole.admin("/status", number).json()["draining"] for number in range(2)))
        whole.release()
        answers = [done.result(60) for done in streams]
    assert {chunks[-1] for chunks in answers} == {"[DONE]"}
    assert not any("error" in chunk for chunks in answers for chunk in chunks)
    assert len({text(chunks) for chunks in answers}) == 1
    assert {event["status"] for event in whole.rows(ids).values()} == {"success"}
    until(lambda: all(new.pid not in before for new in whole.stack.replicas))


def test_draining_replica_is_left_by_traefik_before_it_stops_accepting(whole: Journey) -> None:
    replica = whole.stack.replicas[0]
    os.kill(replica.pid, signal.SIGTERM)
    until(lambda: httpx.get(replica.url + "/health/ready", timeout=60).status_code == 503)
    accepted = httpx.post(
        replica.url + "/v1/chat/completions", json=chat("tokens=2"), headers=whole.headers(), timeout=60
    )
    assert accepted.status_code == 200
    assert accepted.headers["connection"] == "close"
    for _ in range(40):
        assert whole.post(chat("tokens=2")).status_code == 200


def test_second_signal_ends_open_streams_with_one_error_event(whole: Journey) -> None:
    replica = whole.stack.replicas[0]
    headers = whole.headers()
    body = chat("tokens=900 chunk_ms=50", stream=True)
    with httpx.stream("POST", replica.url + "/v1/chat/completions", json=body, headers=headers, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(replica.pid, signal.SIGTERM)
        until(lambda: whole.admin("/status").json()["draining"])
        os.kill(replica.pid, signal.SIGTERM)
        chunks = decoded(lines)
    assert [chunk["error"]["code"] for chunk in chunks if "error" in chunk] == ["gateway_overloaded"]
    event = whole.row(headers["x-request-id"])
    assert (event["status"], event["usage_source"]) == ("interrupted", "estimated")


# --- a dependency is away -------------------------------------------------------------------------------------------


def test_postgres_away_loses_no_row_and_blocks_nobody(whole: Journey) -> None:
    whole.stack.stop("postgres")
    try:
        answers = [whole.post(chat("tokens=2")) for _ in range(30)]
        assert {answer.status_code for answer in answers} == {200}  # none of them waited for it: it is still away
        until(lambda: whole.admin("/status").json()["postgres"] == "down")
    finally:
        whole.stack.start("postgres")
    assert len(whole.rows([answer.headers["x-request-id"] for answer in answers])) == 30


def test_frozen_postgres_blocks_nobody(whole: Journey) -> None:
    whole.stack.freeze("postgres")
    try:
        answers = [whole.post(chat("tokens=2")) for _ in range(10)]
    finally:
        whole.stack.thaw("postgres")
    assert len(whole.rows([answer.headers["x-request-id"] for answer in answers])) == 10


@pytest.mark.parametrize("way", ["stop", "freeze"])
def test_calls_go_on_while_redis_is_away(whole: Journey, way: str) -> None:
    getattr(whole.stack, way)("redis")
    try:
        until(lambda: _poke(whole) and whole.admin("/status", 0).json()["redis"] == "down")
        answers = [whole.post(chat("tokens=2")) for _ in range(20)]
    finally:
        whole.stack.start("redis") if way == "stop" else whole.stack.thaw("redis")
    assert {answer.status_code for answer in answers} == {200}
    assert len(whole.rows([answer.headers["x-request-id"] for answer in answers])) == 20
    until(lambda: whole.admin("/status").json()["redis"] == "up")


def test_emptied_redis_gets_its_budgets_back_from_the_ledger(whole: Journey) -> None:
    def spent() -> tuple[int, int]:
        """In PostgreSQL and in Redis."""
        today = datetime.now(UTC)
        (row,) = whole.query(
            "SELECT sum(total_tokens)::bigint AS tokens FROM ledger WHERE tenant_id = 'tenant-a' AND occurred_at >= %s",
            today.replace(hour=0, minute=0, second=0, microsecond=0),
        )
        return row["tokens"], int(counters.get(f"rl:{{tenant-a}}:daily_tokens:{today:%Y%m%d}") or 0)

    not_just_before_midnight(150)
    counters = redis.Redis.from_url(whole.stack.redis_url)
    whole.row(whole.post(chat("tokens=20")).headers["x-request-id"])
    counters.flushall()
    answers = [whole.post(chat("tokens=2")) for _ in range(20)]
    until(lambda: all(whole.admin("/status", number).json()["budgets"] == "whole" for number in range(2)))
    answers += [whole.post(chat("tokens=2")) for _ in range(20)]
    assert {answer.status_code for answer in answers} == {200}
    whole.rows([answer.headers["x-request-id"] for answer in answers])
    until(lambda: len(set(spent())) == 1, 120)  # rows that came late are added after 15 s and after 60


def _poke(journey: Journey) -> bool:
    """A frozen Redis is noticed by the calls that meet it: one of each replica, at once."""

    def call(url: str) -> int:
        sent = {"json": chat("tokens=2"), "headers": journey.headers(), "timeout": 60}
        return httpx.post(url + "/v1/chat/completions", **sent).status_code

    with ThreadPoolExecutor() as pool:
        return {*pool.map(call, [replica.url for replica in journey.stack.replicas])} == {200}
