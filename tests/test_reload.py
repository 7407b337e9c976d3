"""The configuration changes under load: whole, on every replica, within 5 s, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from app.asgi import RELOAD_SECONDS
from tests.journey import OTHER_KEY, Journey, chat, events, until


@pytest.fixture
def edit(journey: Journey) -> Iterator[Callable[[Callable[[dict[str, Any]], None]], None]]:
    """Rewrites the overlay that both replicas read; puts the old one back afterwards, and waits for it."""
    file = journey.stack.state_dir / "overlay.yaml"
    before = file.read_text()
    versions = {_version(journey, number) for number in (0, 1)}
    assert len(versions) == 1

    def change(work: Callable[[dict[str, Any]], None]) -> None:
        document = yaml.safe_load(before)
        work(document)
        file.write_text(yaml.safe_dump(document))

    yield change
    file.write_text(before)
    until(lambda: {_version(journey, number) for number in (0, 1)} == versions)
    until(lambda: not any(journey.admin("/status", number).json()["config_fault"] for number in (0, 1)))


def _version(journey: Journey, number: int) -> str:
    return journey.admin("/status", number).json()["config_version"]


def test_files_are_looked_at_twice_in_the_five_seconds_that_a_change_may_take() -> None:
    assert 2 * RELOAD_SECONDS < 5


def test_change_reaches_every_replica(journey: Journey, edit: Any) -> None:
    old = _version(journey, 0)
    edit(lambda document: document["aliases"].update(fresh={"targets": ["openai/gpt-4o-mini"]}))
    until(lambda: old not in {_version(journey, 0), _version(journey, 1)})
    answer = journey.post(chat("tokens=2", model="fresh"))
    assert answer.status_code == 200
    assert answer.headers["x-gateway-config-version"] == _version(journey, 0) == _version(journey, 1)
    assert f'gateway_config_info{{version="{_version(journey, 0)}"}} 1.0' in journey.admin("/metrics").text


def test_call_is_served_by_one_snapshot(journey: Journey, edit: Any) -> None:
    old = _version(journey, 0)
    journey.fault(kind="hold")
    with journey.stream(chat("tokens=9")) as answer:
        edit(lambda document: document["aliases"].update(fresh={"targets": ["openai/gpt-4o-mini"]}))
        until(lambda: old not in {_version(journey, 0), _version(journey, 1)})
        journey.release()
        events(answer)
    assert journey.row(answer.headers["x-request-id"])["config_version"] == old


def test_invalid_configuration_is_refused_and_the_old_one_serves(journey: Journey, edit: Any) -> None:
    old = _version(journey, 0)

    def break_it(document: dict[str, Any]) -> None:
        document["aliases"]["broken"] = {"targets": ["nowhere/nothing"], "speed": "fast"}

    edit(break_it)
    until(lambda: all(journey.admin("/status", number).json()["config_fault"] for number in (0, 1)))
    fault = journey.admin("/status").json()["config_fault"]
    assert "aliases.broken.speed" in fault
    assert _version(journey, 0) == _version(journey, 1) == old
    assert journey.post(chat("tokens=2")).status_code == 200
    assert "gateway_config_reload_failures_total 0.0" not in journey.admin("/metrics").text


def test_settings_of_the_spool_count_without_a_restart(journey: Journey, edit: Any) -> None:
    """More reserved than the disk has: no call is taken, until that is mended. Rows are shipped all the while."""

    def takes_calls() -> list[bool]:
        return ["gateway_spool_available 1.0" in journey.admin("/metrics", number).text for number in (0, 1)]

    replicas = [replica.pid for replica in journey.stack.replicas]
    before = journey.post(chat("tokens=2"))
    edit(lambda document: document["gateway"].update(spool={"reserve_bytes": 2**62}))
    until(lambda: takes_calls() == [False, False])
    assert {journey.post(chat("tokens=2")).status_code for _ in range(4)} == {503}
    edit(lambda document: None)
    until(lambda: takes_calls() == [True, True])
    after = journey.post(chat("tokens=2"))
    rows = journey.rows([answer.headers["x-request-id"] for answer in (before, after)]).values()
    assert [(row["status"], row["error_code"]) for row in rows] == [("success", None)] * 2
    assert [replica.pid for replica in journey.stack.replicas] == replicas


def test_removed_key_is_refused(journey: Journey, edit: Any) -> None:
    def call() -> int:
        return journey.post(authorization=f"Bearer {OTHER_KEY}", x_tenant_id="tenant-b").status_code

    assert call() == 200
    edit(lambda document: document["service_keys"].pop("otherkey0001"))
    until(lambda: {call() for _ in range(6)} == {401})
