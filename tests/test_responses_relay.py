"""Responses relayed to OpenAI and Azure: what goes out, what comes back, what is refused, what the ledger learns."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import ResponseErrorEvent

from app import dialects
from app.ambient import Ambient
from app.auth import keeper
from app.config import UNLIMITED, Config, Target, VendorKey, WrittenBreaker
from app.core import Dialect, Usage
from app.dialects import BELOW, ROUTES, openai_responses
from app.errors import (
    GatewayError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    VendorBroke,
    VendorCannot,
    VendorError,
    VendorFailed,
    VendorMisconfigured,
    VendorRefused,
)
from app.providers import NATIVE, stored
from app.providers.translator import Kind, Translator
from app.sse import FrameSplitter, data_of, event_of, frame
from app.wire import ChatRequest, KeptRequest
from tests import recordings
from tests.gateway_parts import ALIAS, Clock, Rooms, ScriptedAnswer, config
from tests.recordings import Exchange
from tests.test_anthropic_provider import pieces
from tests.test_gateway import serve
from tests.translation import STAMP, StreamOutcome, read_stream, target

RELAYED = NATIVE["responses", "openai"]
PLACES = st.lists(st.integers(0, 3_000), max_size=12)
USAGE = {
    "input_tokens": 90,
    "input_tokens_details": {"cached_tokens": 64},
    "output_tokens": 30,
    "output_tokens_details": {"reasoning_tokens": 20},
    "total_tokens": 120,
}
PLACE = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
MESSAGE = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed"}
SAID = MESSAGE | {"content": [{"type": "output_text", "text": "One.\ntwo", "annotations": []}]}
CALL = {"id": "fc_1", "type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"}


def whole(**members: Any) -> dict[str, Any]:
    base = {"id": "resp_1", "object": "response", "created_at": 1, "status": "completed", "error": None}
    return base | {"model": "gpt-5-2025-08-07", "output": [SAID], "usage": USAGE, "service_tier": "default"} | members


def streamed(last: str = "response.completed", **members: Any) -> bytes:
    events: list[tuple[str, dict[str, Any]]] = [
        ("response.created", {"response": whole(status="in_progress", output=[], usage=None)}),
        ("response.output_item.added", {"output_index": 0, "item": MESSAGE | {"content": []}}),
        ("response.content_part.added", PLACE | {"part": {"type": "output_text", "text": "", "annotations": []}}),
        ("response.output_text.delta", PLACE | {"delta": "One.\n"}),
        ("response.output_text.delta", PLACE | {"delta": "two"}),
        ("response.output_item.done", {"output_index": 0, "item": SAID}),
        (last, {"response": whole(**members)}),
    ]
    return b"".join(
        frame(json.dumps({"type": name, "sequence_number": place} | told).encode(), name)
        for place, (name, told) in enumerate(events)
    )


def read(data: bytes, places: list[int] | None = None) -> StreamOutcome:
    return read_stream(RELAYED, pieces(data, places or []))


def body(**members: Any) -> bytes:
    return json.dumps({"model": "smart", "input": "Hi"} | members).encode()


# --- requests ---------------------------------------------------------------------------------------------------------


def test_the_model_is_spliced_and_nothing_is_stored() -> None:
    sent = RELAYED.chat(
        openai_responses.read(b'{"model":"a", "input":[ {"role":"user","content":"\\u00e9"} ]}'), target("openai")
    )
    model = json.loads(sent.body)["model"].encode()
    assert sent.body == b'{"model":"%b","input":[ {"role":"user","content":"\\u00e9"} ],"store":false}' % model
    assert sent.url.endswith("/v1/responses")


def test_azure_has_responses_beside_its_deployments() -> None:
    sent = NATIVE["responses", "azure"].chat(openai_responses.read(body()), target("azure"))
    assert "/deployments/" not in sent.url
    assert "/responses" in sent.url


def test_the_length_and_the_stream_are_read_for_limits() -> None:
    request = openai_responses.read(body(max_output_tokens=7, stream=True))
    assert (request.max_output_tokens, request.stream) == (7, True)


@pytest.mark.parametrize(
    "members",
    [
        {"previous_response_id": 1},
        {"conversation": {"id": "conv_1"}},
        {"prompt": {"id": "pmpt_1"}},
        {"store": "yes"},
        {"background": True},
        {"input": [{"type": "item_reference", "id": "msg_1"}]},
        {"input": [{"id": "msg_1"}]},
        {"input": 1},
        {"max_output_tokens": 0},
    ],
)
def test_what_a_vendor_keeps_for_all_tenants_is_refused_by_name(members: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        openai_responses.read(body(**members))
    assert refused.value.param in members


def test_turns_sent_whole_are_taken() -> None:
    turns = [{"role": "user", "content": "Hi"}, SAID, CALL, {"type": "function_call_output", "call_id": "call_1"}]
    assert msgspec.json.decode(openai_responses.read(body(input=turns)).fields["input"]) == turns


# --- answers that the vendor keeps ------------------------------------------------------------------------------------

OWNER, OTHER = stored.owner("salt", "acme"), stored.owner("salt", "other")


def keeping(owner: bytes = OWNER, **members: Any) -> ChatRequest:
    return msgspec.structs.replace(openai_responses.read(body(**members)), owner=owner)


def told(request: ChatRequest, written: bytes, target: str = "openai/model-2026-01-01") -> dict[str, Any]:
    stamp = msgspec.structs.replace(STAMP, request=request, target=target)
    return json.loads(RELAYED.response(written, stamp).body)


def sent_id(name: str, owner: bytes = OWNER, at: Target | None = None, **members: Any) -> str:
    """The id that the vendor is told where a client names an answer."""
    request = keeping(owner, previous_response_id=name, **members)
    return json.loads(RELAYED.chat(request, at or target("openai")).body)["previous_response_id"]


def test_an_answer_that_is_kept_has_a_name_that_its_tenant_can_go_on_from() -> None:
    answer = told(keeping(store=True), json.dumps(whole()).encode())
    assert answer | {"id": "resp_1"} == whole()
    assert answer["id"].startswith("resp_1-")
    assert sent_id(answer["id"]) == "resp_1"
    assert json.loads(RELAYED.chat(keeping(store=True), target("openai")).body)["store"] is True


def test_an_answer_of_another_tenant_or_target_cannot_be_named() -> None:
    name = told(keeping(store=True), json.dumps(whole()).encode())["id"]
    for owner, at, named in (
        (OTHER, target("openai"), name),
        (OWNER, target("openai", "model-2"), name),
        (OWNER, target("openai"), "resp_1"),
        (OWNER, target("openai"), "resp_2-" + name.rpartition("-")[2]),
        (OWNER, target("openai"), name[:-1]),
        (OWNER, target("openai"), name + "é"),
        (OWNER, target("openai"), ""),
    ):
        with pytest.raises(VendorCannot) as refused:
            sent_id(named, owner, at)
        assert refused.value.param == "previous_response_id"


def test_a_pool_of_keys_keeps_no_answers() -> None:
    only = target("openai")
    key = VendorKey("openai:one", only.provider.credential, 1, UNLIMITED)
    pool = msgspec.structs.replace(only, provider=msgspec.structs.replace(only.provider, keys=(key,)))
    with pytest.raises(VendorCannot, match="several keys"):
        RELAYED.chat(keeping(store=True), pool)


def test_an_answer_after_a_kept_one_has_no_name_of_its_own_unless_it_is_kept_too() -> None:
    name = stored.named("resp_0", OWNER, "openai/model-2026-01-01")
    said = json.dumps(whole(previous_response_id="resp_0")).encode()
    assert told(keeping(previous_response_id=name), said) == whole(previous_response_id=name)


def test_a_target_that_drops_store_keeps_nothing_all_the_same() -> None:
    at = msgspec.structs.replace(target("openai"), drop_params=frozenset({"store"}))
    assert json.loads(RELAYED.chat(openai_responses.read(body()), at).body)["store"] is False


@given(PLACES)
def test_a_stream_that_is_kept_says_the_name_wherever_it_is_cut(places: list[int]) -> None:
    stamp = msgspec.structs.replace(STAMP, request=keeping(store=True), target="t")
    reader = RELAYED.stream(stamp)
    frames = b"".join(one for chunk in pieces(streamed(), places) for _, one in reader.feed(chunk))
    assert frames.replace(stored.named("resp_1", OWNER, "t").encode(), b"resp_1") == compact(streamed())
    assert reader.usage is not None


# --- answers that are kept, asked for again ---------------------------------------------------------------------------


def asking(method: str, path: str, query: str = "", owner: bytes = OWNER) -> KeptRequest:
    return msgspec.structs.replace(openai_responses.read_kept(method, path, query), owner=owner)


def kept_at(kind: str) -> tuple[str, Translator, Target]:
    """A name for an answer kept there."""
    at = target(kind)
    return stored.named("resp_1", OWNER, at.name), NATIVE["kept", kind], at


@pytest.mark.parametrize(
    ("method", "part", "query", "sent"),
    [
        ("GET", "", "", "/resp_1"),
        ("GET", "", "stream=false&include[]=reasoning", "/resp_1?include[]=reasoning"),
        ("GET", "/input_items", "limit=2&order=asc", "/resp_1/input_items?limit=2&order=asc"),
        ("DELETE", "", "", "/resp_1"),
    ],
)
@pytest.mark.parametrize("kind", ["openai", "azure"])
def test_a_kept_answer_is_asked_for_by_the_vendor_s_id(
    kind: str, method: str, part: str, query: str, sent: str
) -> None:
    name, spoken, at = kept_at(kind)
    outgoing = spoken.sign(spoken.outgoing(asking(method, name + part, query), at), at.provider.credential, 0.0)
    url, wanted = httpx.URL(outgoing.url), httpx.URL(sent)
    assert (outgoing.method, outgoing.body) == (method, b"")
    assert url.path.endswith("/responses" + wanted.path)
    version = [("api-version", "2024-10-21")] if kind == "azure" else []
    assert url.params.multi_items() == [*version, *wanted.params.multi_items()]
    assert "vendor-key" in str(outgoing.headers)


def test_a_kept_answer_is_told_under_its_tenant_s_names() -> None:
    name, spoken, at = kept_at("openai")
    stamp = msgspec.structs.replace(STAMP, target=at.name)
    said = json.dumps(whole(previous_response_id="resp_0")).encode()
    answer = spoken.answer(said, asking("GET", name), stamp)
    before = stored.named("resp_0", OWNER, at.name)
    assert json.loads(answer.body) == whole(id=name, previous_response_id=before)
    assert answer.usage == Usage()
    gone = spoken.answer(b'{"id":"resp_1","deleted":true}', asking("DELETE", name), stamp)
    assert json.loads(gone.body) == {"id": name, "deleted": True}


def test_what_a_vendor_has_no_more_is_no_fault_of_its_target() -> None:
    _, spoken, _ = kept_at("openai")
    assert isinstance(spoken.error(404, {}, b"{}"), VendorRefused)
    assert isinstance(spoken.error(401, {}, b"{}"), VendorMisconfigured)


@pytest.mark.parametrize("status", [401, 403, 429])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_what_meets_who_asks_for_a_kept_answer_is_nothing_to_those_who_have_one_made(
    tmp_path: Path, method: str, status: int
) -> None:
    refused = ScriptedAnswer(b"{}", status=status, headers={"retry-after": "60"})
    rooms = Rooms(tmp_path, refused, ScriptedAnswer(json.dumps(whole()).encode()), ambient=Clock())
    reply, _ = serve(rooms, b"", dialect=below(method), config=tables())
    made, _ = serve(rooms, body(model=ALIAS), dialect=ROUTES["/v1/responses"])
    rooms.spool.close()
    assert (reply.status >= 400, made.status) == (True, 200)
    assert rooms.dialogue.cooldowns.resting() == frozenset()


def test_an_answer_that_is_told_shows_no_target_to_work_again(tmp_path: Path) -> None:
    rooms = Rooms(tmp_path, ScriptedAnswer(json.dumps(whole()).encode()), ambient=Clock())
    cooldowns, at = rooms.dialogue.cooldowns, target("openai")
    breaker = WrittenBreaker(failures=1, percent=0, rest_seconds=0)
    cooldowns.failed(at, VendorFailed("500"), breaker)
    assert cooldowns.resting() == frozenset()
    cooldowns.asks(at)
    reply, _ = serve(rooms, b"", dialect=below("GET"), config=tables())
    rooms.spool.close()
    assert reply.status == 200
    assert cooldowns.resting() == {f"target:{at.name}"}  # who finds out has not come back yet


@pytest.mark.parametrize(
    ("first", "deleted"), [(ScriptedAnswer(VendorBroke("cut")), True), (ScriptedAnswer(status=429), False)]
)
def test_what_is_gone_when_its_deletion_is_asked_for_again_was_deleted(
    tmp_path: Path, first: ScriptedAnswer, deleted: bool
) -> None:
    rooms = Rooms(tmp_path, first, ScriptedAnswer(b"{}", status=404), ambient=Clock())
    reply, told = serve(rooms, b"", dialect=below("DELETE"), config=tables())
    row = rooms.row()
    rooms.spool.close()
    assert [each["status"] for each in row["attempts"]] == [first.status, 404]
    assert (reply.status, json.loads(told).get("deleted", False)) == (200 if deleted else 404, deleted)


def below(method: str) -> Dialect:
    """The dialect of a request for an answer of the tenant `acme-corp`."""
    owner = stored.owner(config().settings.user_id_salt.reveal(), "acme-corp")
    name = stored.named("resp_1", owner, target("openai").name)
    return dialects.named(BELOW["/v1/responses/"], method, name, "")


def tables() -> Config:
    only = target("openai")
    return msgspec.structs.replace(config(), targets={only.name: only})


def test_a_kept_answer_leads_to_its_target_by_an_alias_of_the_tenant_s() -> None:
    only = target("openai")
    tables = msgspec.structs.replace(config(), targets={only.name: only})
    name, tenant = kept_at("openai")[0], tables.tenants["acme-corp"]
    alias = keeper(tables, tenant, asking("GET", name))
    assert (alias.name, alias.chain) == (ALIAS, (only.name,))
    narrow = msgspec.structs.replace(tenant, allowed_models=frozenset({"other"}))
    for who, request in (
        (tenant, asking("GET", name, owner=OTHER)),
        (tenant, asking("GET", "resp_1")),
        (narrow, asking("GET", name)),
    ):
        with pytest.raises(NotFound):
            keeper(tables, who, request)


@pytest.mark.parametrize(
    ("method", "path", "query", "error"),
    [
        ("GET", "", "", NotFound),
        ("GET", "a/b/c", "", NotFound),
        ("GET", "../x", "", NotFound),
        ("GET", "resp_1/other", "", NotFound),
        ("POST", "resp_1", "", MethodNotAllowed),
        ("DELETE", "resp_1/input_items", "", MethodNotAllowed),
        ("POST", "resp_1/cancel", "", InvalidRequest),
        ("GET", "resp_1", "stream=true", InvalidRequest),
        ("GET", "resp_1", "starting_after=3", InvalidRequest),
        ("GET", "resp_1", "&".join(["include=x"] * 101), InvalidRequest),
    ],
)
def test_what_is_not_offered_below_responses_is_refused(
    method: str, path: str, query: str, error: type[GatewayError]
) -> None:
    with pytest.raises(error):
        openai_responses.read_kept(method, path, query)


def compact(frames: bytes) -> bytes:
    """The same as the gateway writes what it has to rewrite: the members of an event with a response, and its own."""
    written = []
    for one in FrameSplitter().feed(frames):
        event = msgspec.json.decode(data_of(one), type=dict[str, msgspec.Raw])
        if "response" in event:
            inside = msgspec.json.decode(event["response"], type=dict[str, msgspec.Raw])
            event["response"] = msgspec.Raw(msgspec.json.encode(inside))
            one = frame(msgspec.json.encode(event), event_of(one))
        written.append(one)
    return b"".join(written)


def test_the_tenant_is_sealed_in_by_the_gateway(tmp_path: Path) -> None:
    rooms = Rooms(tmp_path, ScriptedAnswer(json.dumps(whole()).encode()), ambient=Ambient())
    _, got = serve(rooms, body(model=ALIAS, store=True), dialect=ROUTES["/v1/responses"])
    rooms.spool.close()
    owner = stored.owner(config().settings.user_id_salt.reveal(), "acme-corp")
    assert json.loads(got)["id"] == stored.named("resp_1", owner, target("openai").name)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_an_answer_is_relayed_and_its_usage_read_in_classes() -> None:
    written = json.dumps(whole()).encode()
    answer = RELAYED.response(written, STAMP)
    assert answer.body == written
    assert answer.usage == Usage(input=26, cache_read=64, output=10, reasoning=20)
    assert (answer.model, answer.finish_reason) == ("gpt-5-2025-08-07", "stop")


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"output": [SAID, CALL]}, "tool_calls"),
        ({"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}, "length"),
        ({"status": "incomplete", "incomplete_details": {"reason": "content_filter"}}, "content_filter"),
    ],
)
def test_the_ledger_learns_why_an_answer_ended(members: dict[str, Any], reason: str) -> None:
    assert RELAYED.response(json.dumps(whole(**members)).encode(), STAMP).finish_reason == reason
    assert read(streamed("response." + members.get("status", "completed"), **members)).finish_reason == reason


@pytest.mark.parametrize(
    "written", [b"", b"[]", b'{"status":"in_progress"}', b'{"status":"failed","error":{"code":"x"}}']
)
def test_an_answer_that_is_none_is_an_error(written: bytes) -> None:
    with pytest.raises(VendorError):
        RELAYED.response(written, STAMP)


@given(PLACES)
def test_a_stream_is_relayed_byte_for_byte_wherever_it_is_cut(places: list[int]) -> None:
    data = streamed()
    told = read(data, places)
    assert told.frames == data
    assert told.usage == Usage(input=26, cache_read=64, output=10, reasoning=20)
    assert (told.model, told.finish_reason) == ("gpt-5-2025-08-07", "stop")


def test_deltas_in_one_chunk_are_passed_without_being_read() -> None:
    reader = RELAYED.stream(STAMP)
    head, *rest = streamed().split(b"event: response.output_text.delta\n")
    list(reader.feed(head + b"event: response.output_text.delta\n" + rest[0]))
    unread = b"event: response.output_text.delta\ndata: {not JSON}\n\n" * 2
    assert list(reader.feed(unread)) == [(Kind.CONTENT, unread)]


def test_a_last_event_behind_deltas_in_one_chunk_is_read() -> None:
    reader = RELAYED.stream(STAMP)
    data = streamed()
    at = data.index(b"event: response.output_text.delta")
    list(reader.feed(data[:at] + data[at : data.index(b"\n\n", at) + 2]))
    assert not reader.finished
    kinds = [kind for kind, _ in reader.feed(data[data.index(b"\n\n", at) + 2 :])]
    assert kinds[-1] is Kind.DONE
    assert reader.finished


def test_the_text_of_deltas_is_measured() -> None:
    assert RELAYED.stream(STAMP).text_bytes(streamed()) == len(r"One.\n") + len("two")


@pytest.mark.parametrize(
    "event",
    [
        {"type": "error", "code": "server_error", "message": "No.", "param": None},
        {"type": "error", "error": {"code": "server_error", "message": "No."}},
        {
            "type": "response.failed",
            "response": whole(status="failed", error={"code": "server_error", "message": "No."}),
        },
    ],
)
def test_a_failure_in_the_stream_is_an_error(event: dict[str, Any]) -> None:
    reader = RELAYED.stream(STAMP)
    with pytest.raises(VendorError) as failed:
        list(reader.feed(frame(json.dumps(event).encode(), event["type"])))
    assert failed.value.vendor_code == "server_error"


def test_a_stream_that_is_cut_is_not_finished() -> None:
    reader = RELAYED.stream(STAMP)
    list(reader.feed(streamed().rpartition(b"event: ")[0]))
    assert not reader.finished


# --- the SDK ----------------------------------------------------------------------------------------------------------


def client(answer: bytes, kind: str) -> openai.OpenAI:
    told = httpx.Response(200, headers={"content-type": kind}, content=answer)
    return openai.OpenAI(
        api_key="k",
        base_url="http://gateway/v1",
        http_client=httpx.Client(transport=httpx.MockTransport(lambda _: told)),
    )


def test_the_sdk_accumulates_the_stream_to_the_answer() -> None:
    with client(read(streamed()).frames, "text/event-stream").responses.stream(model="a", input="Hi") as stream:
        final = stream.get_final_response()
    unary = client(RELAYED.response(json.dumps(whole()).encode(), STAMP).body, "application/json")
    assert final.output_text == unary.responses.create(model="a", input="Hi").output_text == "One.\ntwo"


def test_the_sdk_raises_on_our_error_in_the_stream() -> None:
    head = streamed().partition(b"event: response.output_item.done")[0]
    told = head + openai_responses.error_frames(InvalidRequest("Too much.", param="input"))
    with pytest.raises(openai.APIError, match="Too much"):
        list(client(told, "text/event-stream").responses.create(model="a", input="Hi", stream=True))


def test_our_error_event_has_the_members_of_the_reference() -> None:
    written = openai_responses.error_frames(InvalidRequest("Too much.", param="input"))
    event = msgspec.json.decode(written.partition(b"data: ")[2])
    assert (event["type"], event["message"], event["param"]) == ("error", "Too much.", "input")


@pytest.mark.parametrize("last", [b"", b": \n\n", b"event: x\ndata: {}\n\n", b"data: {\n\n"])
def test_our_error_event_is_numbered_after_the_last_one_that_was_sent(last: bytes) -> None:
    sent = streamed().partition(b"event: response.output_item.done")[0] + last
    error = InvalidRequest("Too much.", param="input")
    event = ResponseErrorEvent.model_validate_json(
        data_of(openai_responses.error_frames(error, "req_1", sent)), strict=True
    )
    first = ResponseErrorEvent.model_validate_json(data_of(openai_responses.error_frames(error, "req_1")), strict=True)
    assert (event.sequence_number, first.sequence_number) == (5, 0)


# --- through the gateway ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_passes_the_gateway_as_it_came_and_leaves_its_row(tmp_path: Path, stream: bool) -> None:
    said = streamed() if stream else json.dumps(whole()).encode()
    rooms = Rooms(tmp_path, ScriptedAnswer(said), ambient=Ambient())
    asked = body(model=ALIAS, stream=stream)
    reply, got = serve(rooms, asked, dialect=ROUTES["/v1/responses"])
    row = rooms.row()
    rooms.spool.close()
    assert (reply.status, got) == (200, said)
    assert (row["status"], row["usage"]["input_tokens"], row["usage"]["output_tokens"]) == ("success", 90, 30)


# --- recorded traffic -------------------------------------------------------------------------------------------------

FOLDER = os.environ.get("RECORDINGS")
needs_recordings = pytest.mark.skipif(not FOLDER, reason="RECORDINGS names no folder of recorded vendor traffic")
RESPONSES = [
    exchange
    for exchange in (recordings.load(FOLDER) if FOLDER else [])
    if exchange.request.uri.partition("?")[0].endswith("/responses")
]
GOOD = [exchange for exchange in RESPONSES if exchange.response.status == 200]


def each(exchanges: list[Exchange]) -> Any:
    return pytest.mark.parametrize("exchange", exchanges, ids=lambda exchange: exchange.name)


@needs_recordings
@each([exchange for exchange in GOOD if exchange.response.streamed])
def test_a_recorded_stream_is_relayed_byte_for_byte(exchange: Exchange) -> None:
    data = exchange.response.body
    entire, cut = read(data), read(data, list(range(0, len(data), 7)))
    assert entire.frames == cut.frames == data
    assert entire.usage is not None
    assert (entire.usage, entire.finish_reason) == (cut.usage, cut.finish_reason)


@needs_recordings
@each([exchange for exchange in GOOD if not exchange.response.streamed])
def test_a_recorded_answer_is_relayed_byte_for_byte(exchange: Exchange) -> None:
    answer = RELAYED.response(exchange.response.body, STAMP)
    told = exchange.response.json()["usage"]
    assert answer.body == exchange.response.body
    assert (answer.usage.total_input, answer.usage.total_output) == (told["input_tokens"], told["output_tokens"])
