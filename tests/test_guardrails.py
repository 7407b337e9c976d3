"""Guardrails: asked before and after, on streams a piece at a time; what is blocked, what passes, what it costs."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.ambient import Patience
from app.config import Config, Guardrail, Secret
from app.core import Exchange, Reply
from app.dialects import ROUTES
from app.errors import VendorBroke
from app.guardrails import FAILURES, answer_text, frame_texts, prompt_text, strings
from app.wire import Field, PassedRequest
from tests.gateway_parts import (
    ALIAS,
    DONE,
    UNENDED,
    USAGE_FRAME,
    Clock,
    Rooms,
    ScriptedAnswer,
    call,
    chunk,
    completion,
    config,
    departed,
    frame,
    request,
)
from tests.guard import FORBIDDEN, Guard
from tests.journey import Journey, chat, events, until

SENTENCE = "This is the first sentence of an answer that goes on. "


@pytest.fixture
def guard() -> Iterator[Guard]:
    guard = Guard()
    yield guard
    guard.close()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[list[Rooms]]:
    made: list[Rooms] = []
    yield made
    for each in made:
        each.spool.close()


def guardrail(guard: Guard, **fields: Any) -> Guardrail:
    written = {
        "name": "suite", "url": guard.url, "token": None, "checks": frozenset({"input", "output"}),
        "timeout_seconds": 5.0, "fails_open": False, "segment_characters": 400,
    }  # fmt: skip
    return Guardrail(**(written | fields))


def guarded(*guardrails: Guardrail, tenant: bool = False) -> Config:
    """The configuration of `gateway_parts`, with guardrails for its alias, or for its tenant."""
    at = config()
    if tenant:
        theirs = msgspec.structs.replace(at.tenants["acme-corp"], guardrails=guardrails)
        return msgspec.structs.replace(at, tenants={**at.tenants, "acme-corp": theirs})
    alias = msgspec.structs.replace(at.aliases[ALIAS], guardrails=guardrails)
    return msgspec.structs.replace(at, aliases={ALIAS: alias})


class Sent:
    """A call that was served: its reply, the parts of its body, and the rooms."""

    def __init__(self, rooms: Rooms, reply: Reply, parts: list[bytes]) -> None:
        self.rooms = rooms
        self.reply = reply
        self.parts = parts
        self.row = rooms.row()

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    @property
    def code(self) -> str | None:
        return json.loads(self.body).get("error", {}).get("code")


def send(tmp_path: Path, at: Config, *script: Any, body: bytes | None = None, **fields: Any) -> Sent:
    rooms = Rooms(tmp_path, *script, ambient=Clock())
    parts: list[bytes] = []

    async def scenario() -> Reply:
        made = call(request() if body is None else body, rooms.ambient, config=at, **fields)
        reply = await departed(rooms.gateway, Exchange(call=made, patience=Patience()), parts.append)
        await rooms.guardrails.close()
        return reply

    try:
        return Sent(rooms, asyncio.run(scenario()), parts)
    finally:
        rooms.spool.close()


def asks(text: str, **fields: object) -> bytes:
    return request(messages=[{"role": "user", "content": text}], **fields)


# --- before -----------------------------------------------------------------------------------------------------------


def test_prompt_that_passes_is_answered(tmp_path: Path, guard: Guard) -> None:
    sent = send(tmp_path, guarded(guardrail(guard)), ScriptedAnswer(completion()), body=asks("A harmless question"))
    assert (sent.reply.status, sent.row["status"], sent.row["guardrail_blocked"]) == (200, "success", False)
    assert guard.texts("input") == ["A harmless question"]


def test_prompt_that_is_blocked_asks_no_vendor_costs_nothing_and_leaves_its_row(tmp_path: Path, guard: Guard) -> None:
    sent = send(tmp_path, guarded(guardrail(guard)), body=asks(f"What is {FORBIDDEN}?"))
    assert (sent.reply.status, sent.code) == (400, "guardrail_blocked")
    row = sent.row
    assert (row["status"], row["guardrail_blocked"], row["error_code"]) == ("blocked", True, "guardrail_blocked")
    assert (row["attempts"], row["usage"]["total_tokens"], row["cost_usd"]["total"]) == ([], 0, 0)
    assert sent.rooms.limits.settled == [(0, 0)]


def test_client_is_told_which_guardrail_and_why(tmp_path: Path, guard: Guard) -> None:
    sent = send(tmp_path, guarded(guardrail(guard)), body=asks(FORBIDDEN))
    assert json.loads(sent.body)["error"]["message"] == (
        f"The guardrail 'suite' blocked this request: it says {FORBIDDEN}"
    )


def test_question_names_the_call_and_its_tenant_and_carries_the_token(tmp_path: Path, guard: Guard) -> None:
    at = guarded(guardrail(guard, token=Secret("canary-guard")))
    send(tmp_path, at, ScriptedAnswer(completion()), feature_id="support", body=asks("Hello"))
    question = guard.asked[0]
    assert {name: question[name] for name in ("stage", "tenant_id", "feature_id", "model_alias", "final")} == {
        "stage": "input", "tenant_id": "acme-corp", "feature_id": "support", "model_alias": ALIAS, "final": True,
    }  # fmt: skip
    assert guard.headers[0]["authorization"] == "Bearer canary-guard"
    assert "x-tenant-id" not in guard.headers[0]


def test_guardrail_of_the_tenant_is_asked_too(tmp_path: Path, guard: Guard) -> None:
    assert send(tmp_path, guarded(guardrail(guard), tenant=True), body=asks(FORBIDDEN)).code == "guardrail_blocked"


def test_guardrail_of_alias_and_tenant_is_asked_once(tmp_path: Path, guard: Guard) -> None:
    at = guarded(guardrail(guard, checks=frozenset({"input"})))
    theirs = msgspec.structs.replace(at.tenants["acme-corp"], guardrails=at.aliases[ALIAS].guardrails)
    at = msgspec.structs.replace(at, tenants={"acme-corp": theirs})
    send(tmp_path, at, ScriptedAnswer(completion()))
    assert len(guard.asked) == 1


def test_nobody_is_asked_where_none_is_configured(tmp_path: Path, guard: Guard) -> None:
    send(tmp_path, config(), ScriptedAnswer(completion()), body=asks(FORBIDDEN))
    assert guard.asked == []


# --- after ------------------------------------------------------------------------------------------------------------


def said(text: str) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return completion(choices=[choice])


def test_answer_that_is_blocked_is_not_shown_and_is_charged_as_the_vendor_counted(tmp_path: Path, guard: Guard) -> None:
    sent = send(tmp_path, guarded(guardrail(guard)), ScriptedAnswer(said(f"This is {FORBIDDEN}.")))
    assert (sent.reply.status, sent.code) == (400, "guardrail_blocked")
    assert b"This is" not in sent.body
    row = sent.row
    assert (row["status"], row["guardrail_blocked"], row["usage_source"]) == ("blocked", True, "vendor")
    assert row["usage"]["total_tokens"] == 12
    assert sent.rooms.limits.settled[0][0] == 12


def test_answer_that_is_no_json_does_not_pass_by_a_guardrail(tmp_path: Path, guard: Guard) -> None:
    body = completion().replace(b'"message"', b'"massage"').replace(b'"choices":[{', b'"choices":[7,{')
    sent = send(tmp_path, guarded(guardrail(guard, checks=frozenset({"output"}))), *[ScriptedAnswer(body)] * 2)
    assert sent.reply.status == 503


# --- streams ----------------------------------------------------------------------------------------------------------


def stream(*texts: str) -> ScriptedAnswer:
    return ScriptedAnswer(*map(chunk, texts), chunk(finish_reason="stop"), USAGE_FRAME, DONE)


STREAMED = request(stream=True)
OUTPUT = frozenset({"output"})


def test_stream_that_passes_arrives_whole(tmp_path: Path, guard: Guard) -> None:
    texts = [SENTENCE[:20], SENTENCE[20:], "And a second", " one."]
    sent = send(tmp_path, guarded(guardrail(guard, checks=OUTPUT)), stream(*texts), body=STREAMED)
    plain = send(tmp_path / "plain", config(), stream(*texts), body=STREAMED)
    assert sent.body == plain.body
    assert (sent.row["status"], sent.row["usage_source"]) == ("success", "vendor")


def test_stream_is_checked_at_the_end_of_sentences(tmp_path: Path, guard: Guard) -> None:
    texts = [SENTENCE[:20], SENTENCE[20:], "And a second", " one."]
    send(tmp_path, guarded(guardrail(guard, checks=OUTPUT)), stream(*texts), body=STREAMED)
    assert guard.texts("output") == [SENTENCE, "And a second one."]
    assert [question["context"] for question in guard.asked] == ["", SENTENCE]
    assert [question["final"] for question in guard.asked] == [False, True]


def test_stream_without_sentences_is_checked_at_the_size(tmp_path: Path, guard: Guard) -> None:
    at = guarded(guardrail(guard, checks=OUTPUT, segment_characters=10))
    send(tmp_path, at, stream(*["abcd"] * 7), body=STREAMED)
    assert guard.texts("output") == ["abcdabcdabcd", "abcdabcdabcd", "abcd"]


def test_blocked_in_mid_stream_is_one_error_event_and_nothing_of_what_was_blocked(tmp_path: Path, guard: Guard) -> None:
    vendor = stream(SENTENCE, "The next one is ", f"{FORBIDDEN}, and more of it follows. ", "Never read.")
    sent = send(tmp_path, guarded(guardrail(guard, checks=OUTPUT)), vendor, body=STREAMED)
    assert sent.reply.status == 200
    assert SENTENCE.strip().encode() in sent.body
    assert b"The next one" not in sent.body
    assert sent.body.count(b'"error"') == 1
    assert sent.body.endswith(DONE)
    assert b'"guardrail_blocked"' in sent.body
    assert vendor.closed == [False]


def test_blocked_in_mid_stream_is_charged_for_what_the_vendor_had_written(tmp_path: Path, guard: Guard) -> None:
    vendor = ScriptedAnswer(chunk(SENTENCE), chunk(f"It is {FORBIDDEN}, and more of it follows here. "), UNENDED)
    sent = send(tmp_path, guarded(guardrail(guard, checks=OUTPUT)), vendor, body=STREAMED)
    row = sent.row
    assert (row["status"], row["guardrail_blocked"], row["usage_source"]) == ("blocked", True, "estimated")
    written = len(SENTENCE) + len(f"It is {FORBIDDEN}, and more of it follows here. ")
    assert row["usage"]["output_tokens"] >= written // 5
    assert row["attempts"][0]["outcome"] == "success"


def test_first_piece_that_is_blocked_is_a_plain_400(tmp_path: Path, guard: Guard) -> None:
    sent = send(tmp_path, guarded(guardrail(guard, checks=OUTPUT)), stream(f"It is {FORBIDDEN}."), body=STREAMED)
    assert (sent.reply.status, sent.code) == (400, "guardrail_blocked")
    assert (sent.row["status"], sent.row["usage_source"]) == ("blocked", "vendor")


def test_what_begins_in_one_piece_and_ends_in_the_next_is_seen(tmp_path: Path, guard: Guard) -> None:
    at = guarded(guardrail(guard, checks=OUTPUT, segment_characters=20))
    sent = send(tmp_path, at, stream("x" * 20 + FORBIDDEN[:4], FORBIDDEN[4:] + "y" * 20), body=STREAMED)
    assert sent.row["status"] == "blocked"


def test_stream_that_breaks_shows_nothing_that_was_not_checked(tmp_path: Path, guard: Guard) -> None:
    vendor = ScriptedAnswer(chunk(SENTENCE), chunk("Unchecked"))
    sent = send(tmp_path, guarded(guardrail(guard, checks=OUTPUT)), vendor, body=STREAMED)
    assert b"Unchecked" not in sent.body
    assert (sent.body.count(b'"error"'), sent.row["status"]) == (1, "error")


def test_arguments_of_tools_are_checked_as_well(tmp_path: Path, guard: Guard) -> None:
    tool = {"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "f", "arguments": f'{{"a":"{FORBIDDEN}"}}'}}]}
    delta = frame({"model": "m", "choices": [{"index": 0, "delta": tool, "finish_reason": None}]})
    vendor = ScriptedAnswer(delta, chunk(finish_reason="tool_calls"), USAGE_FRAME, DONE)
    sent = send(tmp_path, guarded(guardrail(guard, checks=OUTPUT)), vendor, body=STREAMED)
    assert sent.row["status"] == "blocked"


def test_sentences_of_two_choices_are_not_mixed(tmp_path: Path, guard: Guard) -> None:
    def delta(index: int, text: str) -> bytes:
        return frame({"choices": [{"index": index, "delta": {"content": text}, "finish_reason": None}]})

    vendor = ScriptedAnswer(
        *(delta(0, "for"), delta(1, "one"), delta(0, "bidden"), delta(1, "two")),
        *(chunk(finish_reason="stop"), USAGE_FRAME, DONE),
    )
    send(tmp_path, guarded(guardrail(guard, checks=OUTPUT)), vendor, body=STREAMED)
    assert guard.texts("output") == ["forbidden\nonetwo"]


# --- a guardrail that fails -------------------------------------------------------------------------------------------

WRONG = {
    "an error": (500, b"{}"),
    "a redirect": (302, b""),
    "no JSON": (200, b"ok"),
    "another shape": (200, b'{"verdict":"fine"}'),
    "a word that is none": (200, b'{"action":"maybe"}'),
    "too much": (200, b'{"action":"allow","reason":"' + b"x" * 100_000 + b'"}'),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_closed_guardrail_that_answers_wrongly_lets_nothing_pass(
    tmp_path: Path, guard: Guard, wrong: tuple[int, bytes]
) -> None:
    guard.answers.append(wrong)
    sent = send(tmp_path, guarded(guardrail(guard)))
    assert (sent.reply.status, sent.code) == (503, "guardrail_unavailable")
    assert (sent.row["status"], sent.row["guardrail_blocked"], sent.row["attempts"]) == ("error", False, [])
    assert sent.rooms.telemetry.checks == [("suite", "input", "away")]


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_open_guardrail_that_answers_wrongly_lets_the_call_pass(
    tmp_path: Path, guard: Guard, wrong: tuple[int, bytes]
) -> None:
    guard.answers += [wrong, wrong]
    sent = send(tmp_path, guarded(guardrail(guard, fails_open=True)), ScriptedAnswer(completion()))
    assert (sent.reply.status, sent.row["status"]) == (200, "success")
    assert sent.rooms.telemetry.checks == [("suite", "input", "away"), ("suite", "output", "away")]


@pytest.mark.parametrize("opens", [True, False])
def test_silent_guardrail_is_waited_for_no_longer_than_its_time(tmp_path: Path, guard: Guard, opens: bool) -> None:
    guard.silent = True
    at = guarded(guardrail(guard, timeout_seconds=0.1, fails_open=opens, checks=frozenset({"input"})))
    sent = send(tmp_path, at, ScriptedAnswer(completion()))
    assert sent.reply.status == (200 if opens else 503)


def test_dead_guardrail_holds_its_policy(tmp_path: Path, guard: Guard) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/check"
        assert send(tmp_path, guarded(guardrail(guard, url=url))).code == "guardrail_unavailable"


def test_guardrail_that_dies_in_mid_stream_ends_it_with_one_error_event(tmp_path: Path, guard: Guard) -> None:
    guard.answers += [(200, b'{"action":"allow"}'), (500, b"")]
    sent = send(tmp_path, guarded(guardrail(guard, checks=OUTPUT)), stream(SENTENCE, "Another."), body=STREAMED)
    assert b"Another" not in sent.body
    assert (sent.body.count(b'"error"'), sent.row["error_code"]) == (1, "guardrail_unavailable")


def test_guardrail_that_keeps_failing_is_left_alone_for_a_while(
    tmp_path: Path, guard: Guard, caplog: pytest.LogCaptureFixture
) -> None:
    rooms = Rooms(tmp_path, ambient=Clock())
    asking = call(request(), rooms.ambient)
    rail = guardrail(guard, fails_open=True)
    guard.answers += [(500, b"")] * FAILURES

    async def scenario() -> None:
        for _ in range(FAILURES + 3):
            await rooms.guardrails.check(rail, "input", {"text": "", "context": "", "request_id": "r"}, asking)
        assert len(guard.asked) == FAILURES
        await rooms.ambient.sleep(60)
        await rooms.guardrails.check(rail, "input", {"text": "", "context": "", "request_id": "r"}, asking)
        assert len(guard.asked) == FAILURES + 1
        await rooms.guardrails.close()

    asyncio.run(scenario())
    rooms.spool.close()
    names = {(line.request_id, line.trace_id) for line in caplog.records if "gave no answer" in line.message}
    assert names == {(asking.request_id, asking.trace_id)}


# --- text -------------------------------------------------------------------------------------------------------------


def test_text_is_every_string_but_names_and_bytes() -> None:
    message = {
        "role": "assistant", "content": [{"type": "text", "text": "one"}], "id": "x", "new_member": {"deep": ["two"]},
        "audio": {"data": "AAAA", "transcript": "three"}, "image_url": {"url": "data:image/png;base64,AAAA"},
    }  # fmt: skip
    assert list(strings(message)) == ["one", "two", "three"]


@settings(max_examples=30)
@given(st.recursive(st.text(max_size=4), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_text_of_any_shape_is_found(value: Any) -> None:
    assert all(isinstance(text, str) for text in strings(value))


def test_text_as_deep_as_it_may_be_is_found() -> None:
    value: Any = "deep"
    for _ in range(5_000):
        value = [value]
    assert list(strings(value)) == ["deep"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"choices": [{"message": {"role": "assistant", "content": "a", "refusal": None}}]}, ["a"]),
        ({"content": [{"type": "text", "text": "a"}, {"type": "tool_use", "input": {"q": "b"}}]}, ["a", "b"]),
        ({"choices": [{"text": "a", "index": 0}]}, ["a"]),
        ({"text": "a", "duration": 1.5}, ["a"]),
        ({"output": [{"type": "message", "content": [{"type": "output_text", "text": "a"}]}]}, ["a"]),
    ],
    ids=["chat", "messages", "completions", "transcript", "responses"],
)  # fmt: skip
def test_text_of_an_answer_is_found_in_every_dialect(body: dict[str, Any], expected: list[str]) -> None:
    assert list(answer_text(json.dumps(body).encode())) == expected


@pytest.mark.parametrize(
    ("dialect", "event", "expected"),
    [
        ("chat", {"choices": [{"index": 1, "delta": {"role": "assistant", "content": "a"}}]}, [(1, "a")]),
        ("chat", {"choices": [], "usage": {"total_tokens": 1}}, []),
        ("messages", {"type": "content_block_delta", "index": 2, "delta": {"type": "t", "text": "a"}}, [(2, "a")]),
        ("passed", {"choices": [{"index": 0, "text": "a"}]}, [(0, "a")]),
        ("passed", {"type": "transcript.text.delta", "delta": "a"}, [(0, "a")]),
        ("messages", {"type": "message_start", "message": {"id": "m", "content": []}}, []),
        ("responses", {"type": "response.output_text.delta", "output_index": 0, "delta": "a"}, [(0, "a")]),
        ("responses", {"type": "response.completed", "response": {"output": [{"text": "a"}]}}, []),
    ],
)  # fmt: skip
def test_text_of_a_frame_is_found_in_every_dialect(
    dialect: str, event: dict[str, Any], expected: list[tuple[int, str]]
) -> None:
    assert list(frame_texts(dialect, frame(event))) == expected


def test_every_dialect_is_known() -> None:
    names = {dialect.name for dialect in ROUTES.values()}
    assert names == {"chat", "embeddings", "messages", "responses", "passed"}


def test_fields_of_a_form_are_its_prompt_and_files_are_not() -> None:
    fields = Field("prompt", b"a name"), Field("file", b"\x00\x01", b"speech.mp3")
    sent = PassedRequest(
        body=b"--x", alias="a", path="/audio/transcriptions", operation="transcriptions", serves="transcriptions",
        form=fields,
    )  # fmt: skip
    assert list(prompt_text(sent)) == ["a name"]


def test_transcript_as_text_is_an_answer() -> None:
    assert list(answer_text(b"1\n00:00:00 --> 00:00:02\nHello.")) == ["1\n00:00:00 --> 00:00:02\nHello."]


def test_frame_that_cannot_be_read_is_no_text_that_passed() -> None:
    with pytest.raises(VendorBroke):
        list(frame_texts("chat", b"data: {oops}\n\n"))


# --- on the stack -----------------------------------------------------------------------------------------------------


def test_sdk_gets_a_400_for_a_blocked_prompt_and_the_row_says_blocked(journey: Journey) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        journey.openai().chat.completions.create(**chat(f"This is {FORBIDDEN}.", model="guarded"))
    assert refused.value.code == "guardrail_blocked"
    row = journey.row(refused.value.response.headers["x-request-id"])
    assert (row["status"], row["guardrail_blocked"]) == ("blocked", True)


def test_stream_of_a_guarded_alias_arrives_whole_through_traefik(journey: Journey, suite_guard: Guard) -> None:
    before = len(suite_guard.asked)
    with journey.stream(chat("tokens=150 chunk_ms=10", model="guarded")) as answer:
        assert events(answer)[-1] == "[DONE]"
    stages = [question["stage"] for question in suite_guard.asked[before:]]
    assert stages[0] == "input"
    assert stages.count("output") > 1


def test_checks_are_counted(journey: Journey) -> None:
    assert journey.post(chat("tokens=2", model="guarded")).is_success
    counted = 'gateway_guardrail_checks_total{guardrail="suite",outcome="allowed",stage="output"}'
    until(lambda: any(counted in journey.admin("/metrics", number).text for number in (0, 1)))
