"""A vendor's pool of keys, through the whole stack: which one signs, which one rests, and how one is replaced."""

from __future__ import annotations

from collections import Counter

from tests.journey import Journey, chat, until


def signed(journey: Journey, vendor: str) -> list[str]:
    """The keys that a vendor was asked with, oldest first."""
    return [request["headers"]["authorization"].removeprefix("Bearer ") for request in journey.asked(vendor)]


def test_calls_are_spread_over_the_keys(journey: Journey) -> None:
    for _ in range(40):
        assert journey.post(chat(model="pooled")).status_code == 200
    assert set(signed(journey, "pooled")) == {"one-key", "two-key"}


def test_a_refused_key_is_left_for_the_next_within_the_call(journey: Journey) -> None:
    answers = [journey.post(chat(model="half-bad")) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3
    row = journey.row(answers[0].headers["x-request-id"])
    assert [(attempt["key"], attempt["status"]) for attempt in row["attempts"]] == [
        ("half-bad:bad-one", 401), ("half-bad:good", 200),
    ]  # fmt: skip


def test_a_refused_key_rests_on_every_replica(journey: Journey) -> None:
    assert journey.post(chat(model="half-bad")).status_code == 200
    for replica in range(len(journey.stack.replicas)):
        until(lambda replica=replica: "key:half-bad:bad-one" in journey.admin("/status", replica).json()["resting"])
    before = Counter(signed(journey, "half-bad"))["bad-one-key"]
    for _ in range(6):
        journey.post(chat(model="half-bad"))
    assert Counter(signed(journey, "half-bad"))["bad-one-key"] == before


def test_a_throttled_key_is_left_at_once_for_another(journey: Journey) -> None:
    journey.fault("pooled", kind="throttle", retry_after=20, times=1)
    answer = journey.post(chat(model="pooled"))
    assert answer.status_code == 200
    attempts = journey.row(answer.headers["x-request-id"])["attempts"]
    assert [attempt["outcome"] for attempt in attempts] == ["throttled", "success"]
    assert attempts[0]["key"] != attempts[1]["key"]


def test_what_a_vendor_grants_a_key_is_not_exceeded(journey: Journey) -> None:
    for _ in range(8):
        assert journey.post(chat(model="granted")).status_code == 200
    asked = Counter(signed(journey, "granted"))
    assert asked["small-key"] == 2
    assert asked["large-key"] == 6


def test_where_no_key_has_room_the_next_target_is_asked(journey: Journey) -> None:
    providers = [journey.post(chat(model="full")).headers["x-gateway-provider"] for _ in range(3)]
    assert providers[-1] == "openai"


def test_a_key_whose_file_changes_is_used_without_a_restart(journey: Journey) -> None:
    file = journey.stack.state_dir / "two-key"
    old = file.read_text()
    try:
        file.write_text("two-key-rotated")
        until(
            lambda: (
                journey.post(chat(model="pooled")).status_code == 200 and "two-key-rotated" in signed(journey, "pooled")
            )
        )
    finally:
        file.write_text(old)
