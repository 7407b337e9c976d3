"""The faults that the vendor simulator can be told to have."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from loadtest.simulator import faults
from loadtest.simulator.inprocess import running
from tests.simulation import DEADLINE_SECONDS, counts, eventually, http, post, put_fault, raw, read_until, say


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running() as url:
        yield url


@pytest.fixture
def url(server: str) -> str:
    """The simulator without faults and without memory of earlier tests."""
    http("DELETE", f"{server}/_sim/faults").raise_for_status()
    http("DELETE", f"{server}/_sim/requests").raise_for_status()
    return server


def stream(url: str, vendor: str = "openai", **request: Any) -> list[str]:
    """The data lines of a stream."""
    answer = post(url, vendor, **say("tokens=10", stream=True, **request))
    return [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]


# Faults


def test_throttle_is_a_429_with_retry_after_that_the_sdk_understands(url: str) -> None:
    put_fault(url, kind="throttle", retry_after=2, retry_after_ms=1500)
    sdk = openai.OpenAI(base_url=f"{url}/openai/v1", api_key="k", max_retries=0)
    with sdk, pytest.raises(openai.RateLimitError) as refusal:
        sdk.chat.completions.create(**say("x"))
    headers = refusal.value.response.headers
    assert (refusal.value.code, headers["retry-after"], headers["retry-after-ms"]) == (
        "rate_limit_exceeded",
        "2",
        "1500",
    )


def test_throttle_can_say_that_the_money_is_gone(url: str) -> None:
    put_fault(url, kind="throttle", code="insufficient_quota", retry_after=None)
    answer = post(url, **say("x"))
    assert (answer.json()["error"]["type"], "retry-after" in answer.headers) == ("insufficient_quota", False)


def test_status_fails_in_the_shape_of_the_vendor(url: str) -> None:
    put_fault(url, kind="status", status=503, code="overloaded")
    answer = post(url, **say("x"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")


def test_status_can_fail_with_any_body(url: str) -> None:
    put_fault(url, kind="status", status=502, body="<html>bad gateway</html>")
    answer = post(url, **say("x"))
    assert (answer.status_code, answer.headers["content-type"], answer.text) == (
        502,
        "text/html",
        "<html>bad gateway</html>",
    )


def test_reset_resets_the_connection(url: str) -> None:
    put_fault(url, kind="reset")
    with raw(url, say("x")) as connection, pytest.raises(ConnectionResetError):
        connection.recv(1)


def test_hang_answers_nothing_until_the_client_leaves(url: str) -> None:
    put_fault(url, kind="hang")
    with raw(url, say("x")) as connection:
        eventually(lambda: counts(url)["open"] == 1)
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
    eventually(lambda: counts(url)["aborted"] == 1)


def test_stall_goes_silent_in_the_middle_of_a_stream(url: str) -> None:
    put_fault(url, kind="stall", after_chunks=2)
    with raw(url, say("x", stream=True)) as connection:
        seen = read_until(connection, b'"delta":{"content"')
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            read_until(connection, b"data: ")
    assert seen.count(b"data: ") == 2


@pytest.mark.parametrize("call", ["PUT", "DELETE"])
def test_hold_goes_silent_until_its_fault_is_taken_away(url: str, call: str) -> None:
    put_fault(url, kind="hold", after_chunks=2)
    with raw(url, say("x", stream=True)) as connection:
        seen = read_until(connection, b'"delta":{"content"')
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            read_until(connection, b"data: ")
        connection.settimeout(DEADLINE_SECONDS)
        http(call, f"{url}/_sim/faults/openai", **({"json": []} if call == "PUT" else {})).raise_for_status()
        seen += read_until(connection, b"[DONE]")
    assert seen.count(b"data: ") > 4


def test_cut_closes_in_the_middle_of_a_stream(url: str) -> None:
    put_fault(url, kind="cut", after_chunks=2)
    with pytest.raises(httpx.RemoteProtocolError):
        stream(url)


def test_cut_sends_the_chunks_that_were_asked_for(url: str) -> None:
    put_fault(url, kind="cut", after_chunks=4)
    with raw(url, say("x", stream=True)) as connection:
        seen = b"".join(iter(lambda: connection.recv(65536), b""))
    assert (seen.count(b"data: "), seen.endswith(b"0\r\n\r\n")) == (4, False)


@pytest.mark.parametrize("kind", ["cut", "stall"])
def test_a_unary_answer_breaks_halfway_its_body(url: str, kind: str) -> None:
    put_fault(url, kind=kind)
    with raw(url, say("x")) as connection:
        head, _, body = read_until(connection, b'"choices"').partition(b"\r\n\r\n")
    length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
    assert 0 < len(body) < length


def test_malformed_sends_one_line_that_is_not_json(url: str) -> None:
    put_fault(url, kind="malformed", after_chunks=3)
    lines = stream(url)
    with pytest.raises(json.JSONDecodeError):
        json.loads(lines[3])
    assert [json.loads(line)["object"] for line in lines[:3] + lines[4:-1]] == ["chat.completion.chunk"] * (
        len(lines) - 2
    )


def test_a_malformed_unary_answer_is_not_json(url: str) -> None:
    put_fault(url, kind="malformed")
    with pytest.raises(json.JSONDecodeError):
        post(url, **say("x")).json()


@pytest.mark.parametrize("after", [0, 3])
def test_error_event_ends_a_stream_that_began_with_200(url: str, after: int) -> None:
    put_fault(url, kind="error_event", after_chunks=after, code="server_error")
    lines = stream(url)
    assert (len(lines), json.loads(lines[-1])["error"]["code"]) == (after + 1, "server_error")


def test_the_error_event_of_openrouter_is_a_chunk_before_done(url: str) -> None:
    put_fault(url, "openrouter", kind="error_event", after_chunks=1)
    lines = stream(url, "openrouter", model="openai/gpt-4o-mini")
    assert (json.loads(lines[1])["error"]["code"], lines[2]) == (502, "[DONE]")


def test_error_event_on_a_unary_answer_is_an_error_under_200(url: str) -> None:
    put_fault(url, kind="error_event")
    answer = post(url, **say("x"))
    assert (answer.status_code, list(answer.json())) == (200, ["error"])


def test_empty_is_a_stream_of_only_done(url: str) -> None:
    put_fault(url, kind="empty")
    assert stream(url) == ["[DONE]"]


def test_empty_can_be_a_stream_of_nothing(url: str) -> None:
    put_fault(url, kind="empty", done=False)
    answer = post(url, **say("x", stream=True))
    assert (answer.status_code, answer.content) == (200, b"")


def test_latency_composes_with_a_failure(url: str) -> None:
    put_fault(url, kind="status", status=500, latency_ms=60)
    assert post(url, **say("x")).elapsed.total_seconds() >= 0.06


def test_latency_comes_before_the_first_byte(url: str) -> None:
    put_fault(url, kind="latency", latency_ms=3_600_000)
    with raw(url, say("x", stream=True)) as connection:
        eventually(lambda: counts(url)["open"] == 1)
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(1)


def test_slow_paces_a_stream(url: str) -> None:
    put_fault(url, kind="slow", chunk_ms=3_600_000)
    with raw(url, say("x", stream=True)) as connection:
        seen = read_until(connection, b"data: ")
    assert seen.count(b"data: ") == 1


def test_the_prompt_can_pace_a_stream(url: str) -> None:
    with raw(url, say("tokens=9 chunk_ms=1", stream=True)) as connection:
        assert read_until(connection, b"[DONE]").count(b"data: ") == 12


def test_a_fault_ends_after_its_times(url: str) -> None:
    put_fault(url, kind="status", status=500, times=2)
    assert [post(url, **say("x")).status_code for _ in range(4)] == [500, 500, 200, 200]


def test_a_fault_can_be_for_one_model(url: str) -> None:
    put_fault(url, kind="status", status=500, model="gpt-4o")
    statuses = [post(url, **say("x", model=model)).status_code for model in ("gpt-4o", "gpt-4o-mini")]
    assert statuses == [500, 200]


def test_a_fault_is_for_one_vendor(url: str) -> None:
    put_fault(url, kind="status", status=500)
    assert post(url, "openrouter", **say("x", model="openai/gpt-4o-mini")).status_code == 200


def test_of_several_faults_the_first_that_fits_is_met(url: str) -> None:
    both = [{"kind": "status", "status": 500, "times": 1}, {"kind": "status", "status": 502}]
    http("PUT", f"{url}/_sim/faults/openai", json=both).raise_for_status()
    assert [post(url, **say("x")).status_code for _ in range(3)] == [500, 502, 502]


def test_a_deleted_fault_is_gone(url: str) -> None:
    put_fault(url, kind="status", status=500)
    http("DELETE", f"{url}/_sim/faults/openai").raise_for_status()
    assert post(url, **say("x")).status_code == 200


def test_faults_are_listed_with_the_times_left(url: str) -> None:
    put_fault(url, kind="status", status=500, times=3)
    post(url, **say("x"))
    listed = http("GET", f"{url}/_sim/faults").json()["openai"][0]
    assert (listed["kind"], listed["status"], listed["times"]) == ("status", 500, 2)


def test_probability_decides_by_chance() -> None:
    throws = iter([0.4, 0.6])
    active = faults.Faults(chance=lambda: next(throws))
    active.put(faults.decode(b'{"kind": "reset", "probability": 0.5}'))
    assert [active.take("any") is not None for _ in range(2)] == [True, False]


@pytest.mark.parametrize(
    "document",
    [
        "{",
        "{}",
        '{"kind": "nap"}',
        '{"kind": "cut", "after": 1}',
        '{"kind": "status"}',
        '{"kind": "latency"}',
        '{"kind": "status", "status": 200}',
        '{"kind": "hang", "times": 0}',
        '{"kind": "hang", "probability": 2}',
    ],
)
def test_a_bad_fault_is_refused_with_a_sentence(url: str, document: str) -> None:
    answer = http("PUT", f"{url}/_sim/faults/openai", content=document)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("The fault ")
    assert answer.json()["error"].endswith(".")


def test_a_bad_fault_leaves_the_old_one_in_force(url: str) -> None:
    put_fault(url, kind="status", status=500)
    http("PUT", f"{url}/_sim/faults/openai", content="{}")
    assert post(url, **say("x")).status_code == 500


def test_wrong_answer_does_not_say_what_the_prompt_asks_for(url: str) -> None:
    def said() -> str:
        return post(url, **say("Reply with exactly: amber")).json()["choices"][0]["message"]["content"]

    assert said() == "amber"
    put_fault(url, kind="wrong")
    assert said() != "amber"


def test_grant_is_enforced_and_what_it_refuses_is_counted(url: str) -> None:
    http("PUT", f"{url}/_sim/grants", json={"rpm": 12, "tpm": 100_000}).raise_for_status()
    statuses = [post(url, **say("x")).status_code for _ in range(3)]
    http("DELETE", f"{url}/_sim/grants").raise_for_status()
    assert (statuses, counts(url)["refused"]) == ([200, 200, 429], 1)
    assert post(url, **say("x")).status_code == 200


def test_granted_tokens_are_enforced(url: str) -> None:
    http("PUT", f"{url}/_sim/grants", json={"rpm": 6_000, "tpm": 600}).raise_for_status()
    statuses = [post(url, **say("tokens=200")).status_code for _ in range(2)]
    http("DELETE", f"{url}/_sim/grants").raise_for_status()
    assert statuses == [200, 429]
