"""The front door's Anthropic dialect over translators of chat completions: requests, answers, streams, errors."""

from __future__ import annotations

import contextlib
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import msgspec
import pytest
from anthropic.lib.streaming import MessageStream
from anthropic.types import Message
from hypothesis import given
from hypothesis import strategies as st

from app import errors
from app.core import Rates, Usage
from app.dialects import ROUTES, WRAPPERS, anthropic_messages, translator
from app.dialects.anthropic_messages.errors import TYPES, error_body, error_frames, rate_headers, type_of
from app.errors import (
    GatewayError,
    InvalidRequest,
    RateLimitExceeded,
    UpstreamUnavailable,
    VendorBroke,
    VendorCannot,
    VendorError,
    VendorRefused,
)
from app.providers import PROVIDERS
from app.providers.translator import EXTRAS, Kind, Translator
from app.sse import FrameSplitter, data_of, event_of
from app.wire import ChatBody
from tests.translation import STAMP, read_stream, target

OVER = WRAPPERS["messages"]
OPENAI = OVER(PROVIDERS["openai"])
TAKES_ALL = OVER(msgspec.structs.replace(PROVIDERS["openai"], extras=EXTRAS))
USER = {"role": "user", "content": "Where is order 7?"}
TOOL = {"name": "order_status", "input_schema": {"type": "object"}}
HINT = {"type": "ephemeral"}


def body(**members: Any) -> bytes:
    return json.dumps({"model": "alias", "max_tokens": 1_000, "messages": [USER], **members}).encode()


def chat(over: Translator = OPENAI, kind: str = "openai", **members: Any) -> dict[str, Any]:
    """The chat completions request that a Messages request becomes; what every one has is left out."""
    request = anthropic_messages.read(body(**members))
    sent = json.loads(over.chat(request, target(kind)).body)
    assert (sent.pop("model"), sent.pop("max_completion_tokens")) == ("model-2026-01-01", 1_000)
    msgspec.json.decode(msgspec.json.encode(sent), type=ChatBody)
    return {name: value for name, value in sent.items() if name != "messages" or value != [USER]}


def messages(*turns: dict[str, Any], over: Translator = OPENAI, **members: Any) -> list[dict[str, Any]]:
    return chat(over, messages=list(turns), **members).get("messages", [USER])


def refused(over: Translator = OPENAI, kind: str = "openai", **members: Any) -> str | None:
    """The parameter that the refusal names, which its message names too."""
    with pytest.raises(VendorCannot) as refusal:
        chat(over, kind, **members)
    assert f"`{refusal.value.param}`" in refusal.value.message
    return refusal.value.param


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def text(words: str, **members: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **members}


# --- requests: what is read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"messages": "Hi"}, "messages"),
        ({"model": "../x"}, "model"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_what_no_vendor_could_take_is_refused_at_the_door(members: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        anthropic_messages.read(body(**members))
    assert refusal.value.param == param


def test_the_length_is_required() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        anthropic_messages.read(b'{"model":"a","messages":[]}')
    assert refusal.value.param == "max_tokens"


def test_the_length_is_what_a_call_reserves() -> None:
    assert anthropic_messages.read(body(max_tokens=77)).max_output_tokens == 77


# --- requests: the conversation ---------------------------------------------------------------------------------------


def test_the_system_prompt_is_the_first_message() -> None:
    assert messages(USER, system="Be brief.") == [{"role": "system", "content": "Be brief."}, USER]


def test_a_system_prompt_in_blocks_stays_in_parts() -> None:
    told = messages(USER, system=[text("Be brief."), text("Be kind.")])
    assert told[0] == {"role": "system", "content": [text("Be brief."), text("Be kind.")]}


def test_a_system_message_amid_the_conversation_stays_there() -> None:
    turns = [USER, {"role": "system", "content": "Be brief."}, USER]
    assert messages(*turns) == turns


def test_a_text_alone_is_written_as_a_string() -> None:
    assert messages(user(text("Hi"))) == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("source", "url"),
    [
        ({"type": "base64", "media_type": "image/png", "data": "AAAA"}, "data:image/png;base64,AAAA"),
        ({"type": "url", "url": "https://images.example/a.png"}, "https://images.example/a.png"),
    ],
)
def test_an_image_is_a_part(source: dict[str, str], url: str) -> None:
    (turn,) = messages(user({"type": "image", "source": source}, text("What?")))
    assert turn["content"] == [{"type": "image_url", "image_url": {"url": url}}, text("What?")]


def test_a_pdf_is_a_file() -> None:
    source = {"type": "base64", "media_type": "application/pdf", "data": "AAAA"}
    (turn,) = messages(user({"type": "document", "source": source, "title": "Invoice.pdf"}, text("What?")))
    file = {"filename": "Invoice.pdf", "file_data": "data:application/pdf;base64,AAAA"}
    assert turn["content"][0] == {"type": "file", "file": file}


def test_a_document_of_text_is_its_text_with_title_and_context_in_front() -> None:
    source = {"type": "text", "media_type": "text/plain", "data": "Order 7 is sent."}
    (turn,) = messages(user({"type": "document", "source": source, "title": "Orders", "context": "Of today."}))
    assert turn["content"] == "Orders\n\nOf today.\n\nOrder 7 is sent."


def test_calls_and_results_of_tools_go_back() -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "order_status", "input": {"id": "7"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("sent")], "is_error": False}
    told = messages(USER, assistant(text("Let me see."), call), user(result, text("Well?")))
    function = {"name": "order_status", "arguments": '{"id": "7"}'}
    assert told[1:] == [
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [{"id": "toolu_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "sent"},
        {"role": "user", "content": "Well?"},
    ]


def test_results_stand_before_what_else_the_user_says() -> None:
    result = {"type": "tool_result", "tool_use_id": "toolu_1"}
    assert [turn["role"] for turn in messages(user(text("Well?"), result))] == ["tool", "user"]


def test_a_result_without_content_is_empty() -> None:
    assert messages(user({"type": "tool_result", "tool_use_id": "t"}))[0]["content"] == ""


def test_what_the_sdk_adds_to_an_answer_s_blocks_is_no_matter() -> None:
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {}, "caller": {"type": "direct"}, "toolset_name": None}
    (told,) = messages(assistant(text("Hi", citations=None), call))
    assert (told["content"], told["tool_calls"][0]["function"]["arguments"]) == ("Hi", "{}")


# --- requests: hints and reasoning, for those that take them ----------------------------------------------------------


def test_cache_hints_go_to_vendors_that_take_them() -> None:
    turns = [user(text("Hi", cache_control=HINT))]
    members = {
        "system": [text("Be brief.", cache_control=HINT | {"ttl": "1h"})],
        "tools": [TOOL | {"cache_control": HINT}],
    }
    assert "cache_control" not in json.dumps(chat(OPENAI, messages=turns, **members))
    sent = chat(TAKES_ALL, messages=turns, **members)
    assert sent["messages"][0]["content"][0]["cache_control"] == HINT | {"ttl": "1h"}
    assert sent["messages"][1]["content"][0]["cache_control"] == HINT
    assert sent["tools"][0]["cache_control"] == HINT


def test_a_hint_of_the_whole_request_stands_on_its_last_part() -> None:
    assert messages(USER, over=TAKES_ALL, cache_control=HINT)[0]["content"] == [
        {"type": "text", "text": USER["content"], "cache_control": HINT}
    ]
    assert messages(USER, cache_control=HINT) == [USER]


def test_a_hint_on_a_result_stands_on_its_last_part() -> None:
    result = {"type": "tool_result", "tool_use_id": "t", "content": [text("a"), text("b")], "cache_control": HINT}
    (told,) = messages(user(result), over=TAKES_ALL)
    assert told["content"] == [text("a"), text("b", cache_control=HINT)]


SIGNED = {"type": "thinking", "thinking": "Look it up.", "signature": "c2ln"}
REDACTED = {"type": "redacted_thinking", "data": "c2VhbA=="}


def test_thinking_goes_back_to_vendors_that_want_it() -> None:
    (told,) = messages(assistant(SIGNED, REDACTED, text("Sent.")), over=TAKES_ALL)
    form = {"format": "anthropic-claude-v1"}
    assert told["reasoning_details"] == [
        {"type": "reasoning.text", "text": "Look it up.", "signature": "c2ln", "index": 0} | form,
        {"type": "reasoning.encrypted", "data": "c2VhbA==", "index": 1} | form,
    ]
    assert told["reasoning_content"] == "Look it up."


def test_thinking_does_not_go_to_vendors_that_take_none() -> None:
    assert messages(assistant(SIGNED, REDACTED, text("Sent."))) == [{"role": "assistant", "content": "Sent."}]


def test_thinking_that_nobody_packed_is_left_out() -> None:
    forged = [{"type": "redacted_thinking", "data": f"gateway1:{data}"} for data in ("no base64", "AAAA", "W10=")]
    (told,) = messages(assistant(*forged, text("Sent.")), over=TAKES_ALL)
    assert told == {"role": "assistant", "content": "Sent."}


# --- requests: what else they say -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}),
        ({"stop_sequences": ["END"]}, {"stop": ["END"]}),
        ({"metadata": {"user_id": "u-1"}}, {"user": "u-1"}),
        ({"service_tier": "standard_only"}, {"service_tier": "default"}),
        ({"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}),
        ({"output_config": {"effort": "xhigh"}}, {"reasoning_effort": "xhigh"}),
        ({"thinking": {"type": "adaptive"}}, {"reasoning_effort": "high"}),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, {"reasoning_effort": "low"}),
        ({"thinking": {"type": "disabled"}}, {}),
        ({"stop_sequences": [], "tools": [], "metadata": {}, "container": None, "mcp_servers": []}, {}),
        ({"service_tier": "auto", "top_k": None, "system": ""}, {}),
    ],
)
def test_members_have_their_names_in_chat_completions(members: dict[str, Any], said: dict[str, Any]) -> None:
    assert chat(**members) == said


@pytest.mark.parametrize(
    ("budget", "effort"), [(200, "low"), (350, "low"), (500, "medium"), (700, "high"), (950, "high")]
)
def test_a_budget_of_thinking_is_an_effort_by_its_share_of_the_length(budget: int, effort: str) -> None:
    assert chat(thinking={"type": "enabled", "budget_tokens": budget})["reasoning_effort"] == effort


def test_efforts_that_become_budgets_become_the_same_efforts() -> None:
    for effort in ("low", "medium", "high"):
        request = anthropic_messages.read(body(max_tokens=100_000, output_config={"effort": effort}))
        asked = json.loads(OVER(PROVIDERS["anthropic"]).chat(request, target("anthropic", "claude-sonnet-4-5")).body)
        again = anthropic_messages.read(body(max_tokens=100_000, thinking=asked["thinking"]))
        assert json.loads(OPENAI.chat(again, target("openai")).body)["reasoning_effort"] == effort


@pytest.mark.parametrize("member", ["output_config", "output_format"])
def test_a_schema_is_a_strict_response_format(member: str) -> None:
    form = {"type": "json_schema", "schema": {"type": "object"}}
    said = chat(**{member: {"format": form} if member == "output_config" else form})
    schema = {"name": "answer", "schema": {"type": "object"}, "strict": True}
    assert said == {"response_format": {"type": "json_schema", "json_schema": schema}}


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "any"}, {"tool_choice": "required"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        ({"type": "tool", "name": "f"}, {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
        ({"type": "auto", "disable_parallel_tool_use": True}, {"tool_choice": "auto", "parallel_tool_calls": False}),
    ],
)
def test_the_choice_of_tools(choice: dict[str, Any], said: dict[str, Any]) -> None:
    assert chat(tool_choice=choice) == said


def test_tools_are_functions() -> None:
    tool = TOOL | {"description": "Where it is.", "strict": True, "type": "custom", "eager_input_streaming": True}
    function = {"name": "order_status", "parameters": {"type": "object"}, "description": "Where it is.", "strict": True}
    assert chat(tools=[tool, TOOL])["tools"] == [
        {"type": "function", "function": function},
        {"type": "function", "function": {"name": "order_status", "parameters": {"type": "object"}}},
    ]


# --- requests: what is refused ----------------------------------------------------------------------------------------

FILE = {"type": "document", "source": {"type": "file", "file_id": "file_1"}}
CITED = {
    "type": "document",
    "source": {"type": "url", "url": "https://a.example/b.pdf"},
    "citations": {"enabled": True},
}
IMAGE = {"type": "image", "source": {"type": "url", "url": "https://images.example/a.png"}}


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"top_k": 5}, "top_k"),
        ({"container": "container_1"}, "container"),
        ({"mcp_servers": [{"type": "url", "url": "https://mcp.example"}]}, "mcp_servers"),
        ({"context_management": {"edits": []}}, "context_management"),
        ({"service_tier": "fast"}, "service_tier"),
        ({"thinking": {"type": "enabled"}}, "thinking"),
        ({"thinking": {"type": "between_tools"}}, "thinking"),
        ({"output_config": {"task_budget": {}}}, "output_config"),
        ({"metadata": {"trace": "t"}}, "metadata"),
        ({"tools": [TOOL, {"type": "web_search_20250305", "name": "web_search"}]}, "tools[1]"),
        ({"tools": [TOOL | {"input_examples": [{}]}]}, "tools[0]"),
        ({"messages": [USER, {"role": "tool", "content": ""}]}, "messages[1]"),
        ({"messages": [user(text("Hi"), FILE)]}, "messages[0].content[1]"),
        ({"messages": [user(CITED)]}, "messages[0].content[0].citations"),
        ({"messages": [user({"type": "search_result"})]}, "messages[0].content[0]"),
        ({"messages": [user({"type": "image", "source": {"type": "url"}})]}, "messages[0].content[0].source"),
        ({"messages": [assistant({"type": "tool_use", "id": "t", "name": "f", "input": [1]})]},
         "messages[0].content[0].input"),
        ({"messages": [user({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "tool_reference"}]})]},
         "messages[0].content[0].content[0]"),
        ({"messages": [user({"type": "tool_result", "tool_use_id": "t", "content": [SIGNED]})]},
         "messages[0].content[0].content[0]"),
        ({"system": [IMAGE, {"type": "new"}]}, "system[1]"),
    ],
)  # fmt: skip
def test_what_chat_completions_have_no_room_for_is_refused_by_its_name(members: dict[str, Any], param: str) -> None:
    assert refused(**members) == param


@pytest.mark.parametrize(
    ("kind", "members", "param"),
    [
        ("gemini", {"metadata": {"user_id": "u"}}, "metadata"),
        (
            "gemini",
            {"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
            "tool_choice",
        ),
        ("gemini", {"output_config": {"effort": "max"}}, "output_config"),
        ("bedrock", {"messages": [USER, user(text("Hi"), IMAGE)]}, "messages[1].content[1]"),
        ("bedrock", {"system": "Be brief.", "messages": [user(IMAGE)]}, "messages[0].content[0]"),
    ],
)
def test_what_a_vendor_cannot_carry_is_refused_by_its_name_in_messages(
    kind: str, members: dict[str, Any], param: str
) -> None:
    assert refused(translator(ROUTES["/v1/messages"], kind), kind, **members) == param


def test_a_member_that_the_target_drops_is_left_out() -> None:
    at = msgspec.structs.replace(target("openai"), drop_params=frozenset({"top_k", "thinking", "user"}))
    members = {"top_k": 5, "thinking": {"type": "adaptive"}, "metadata": {"user_id": "u"}}
    sent = json.loads(OPENAI.chat(anthropic_messages.read(body(**members)), at).body)
    assert set(sent) == {"model", "messages", "max_completion_tokens"}


ODD = st.sampled_from(
    [None, True, 7, 0.5, "", "auto", [], [None], ["x"], [{}], {}, {"type": "auto"}, {"type": 7}, {"content": []},
     [{"role": "user", "content": [{"type": "text"}]}], [{"role": "assistant", "content": [[]]}], [{"type": "text"}],
     {"format": {}}, {"format": {"type": "json_schema", "schema": 7}}, {"type": "enabled", "budget_tokens": -5}],
)  # fmt: skip
MEMBERS = ["system", "tools", "tool_choice", "thinking", "metadata", "output_config", "messages", "cache_control", "x"]


@given(st.dictionaries(st.sampled_from(MEMBERS), ODD))
def test_any_request_is_carried_or_refused(members: dict[str, Any]) -> None:
    with contextlib.suppress(InvalidRequest, VendorCannot):
        assert "messages" in json.loads(OPENAI.chat(anthropic_messages.read(body(**members)), target("openai")).body)


# --- answers ----------------------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
DETAILS = st.one_of(
    st.builds(lambda text, sign: {"type": "reasoning.text", "text": text, "signature": sign,
                                  "format": "anthropic-claude-v1"}, WORDS, WORDS),
    st.builds(lambda data: {"type": "reasoning.encrypted", "data": data, "format": "anthropic-claude-v1"}, WORDS),
    st.builds(lambda data: {"type": "reasoning.encrypted", "data": data, "format": "google-gemini-v1"}, WORDS),
    st.builds(lambda data: {"type": "reasoning.encrypted", "data": data, "format": "google-gemini-v1",
                            "id": "call_1"}, WORDS),
    st.builds(lambda text: {"type": "reasoning.summary", "summary": text, "format": "openai-responses-v1"}, WORDS),
    st.builds(lambda text: {"type": "reasoning.text", "text": text}, WORDS),
)  # fmt: skip
CALLS = st.builds(
    lambda name, arguments: {"name": name, "arguments": json.dumps(arguments)},
    WORDS, st.dictionaries(WORDS, WORDS, max_size=2),
)  # fmt: skip


@st.composite
def answers(draw: st.DrawFn) -> dict[str, Any]:
    """A message of a chat completion, and why it ended."""
    details = [detail | {"index": place} for place, detail in enumerate(draw(st.lists(DETAILS, max_size=3)))]
    thought = "".join(detail.get("text", detail.get("summary", "")) for detail in details)
    calls = draw(st.lists(CALLS, max_size=2))
    return {
        "content": draw(st.none() | WORDS),
        "refusal": draw(st.none() | st.none() | WORDS),
        "reasoning_content": thought or draw(st.none() | WORDS),
        "reasoning_details": details,
        "tool_calls": [
            {"id": f"call_{place}", "type": "function", "function": call} for place, call in enumerate(calls)
        ],
        "finish_reason": "tool_calls" if calls else draw(st.sampled_from(["stop", "length", "content_filter", "new"])),
    }


USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 7,
    "total_tokens": 16,
    "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 2},
    "completion_tokens_details": {"reasoning_tokens": 3},
}


def completion(answer: dict[str, Any]) -> bytes:
    message = {name: value for name, value in answer.items() if name != "finish_reason" and value not in (None, [])}
    choice = {"index": 0, "message": {"role": "assistant"} | message, "finish_reason": answer["finish_reason"]}
    return json.dumps({"id": "chatcmpl-7", "model": "m-1", "choices": [choice], "usage": USAGE}).encode()


def chunks(answer: dict[str, Any]) -> bytes:
    """The answer as a vendor streams it: every text in two pieces, a keep-alive between."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    for detail in answer["reasoning_details"]:
        words = next((name for name in ("text", "summary") if name in detail), None)
        if words is None:
            deltas.append({"reasoning_details": [detail]})
            continue
        for piece in halves(detail[words]):
            told = {"type": detail["type"], words: piece, "index": detail["index"]}
            deltas.append({"reasoning_content": piece, "reasoning_details": [told]})
        deltas.append({"reasoning_details": [detail | {words: ""}]})
    if not any("text" in one or "summary" in one for one in answer["reasoning_details"]):
        deltas += [{"reasoning_content": piece} for piece in halves(answer["reasoning_content"])]
    deltas += [{"content": piece} for piece in halves(answer["content"])]
    for place, call in enumerate(answer["tool_calls"]):
        deltas.append({"tool_calls": [call | {"index": place, "function": call["function"] | {"arguments": ""}}]})
        for piece in halves(call["function"]["arguments"]):
            deltas.append({"tool_calls": [{"index": place, "function": {"arguments": piece}}]})
    deltas += [{"refusal": piece} for piece in halves(answer["refusal"])]
    told = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    told.append({"index": 0, "delta": {}, "finish_reason": answer["finish_reason"]})
    head = {"id": "chatcmpl-7", "model": "m-1"}
    frames = [f"data: {json.dumps(head | {'choices': [choice]})}\n\n" for choice in told]
    frames.append(f"data: {json.dumps(head | {'choices': [], 'usage': USAGE})}\n\n")
    return ": keep-alive\n\n".join(frames).encode() + b"data: [DONE]\n\n"


def halves(text: str | None) -> list[str]:
    return [part for part in (text[: len(text) // 2], text[len(text) // 2 :]) if part] if text else []


def pieces(data: bytes, places: list[int]) -> list[bytes]:
    cuts = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in pairwise(cuts)]


SDK = anthropic.Anthropic(api_key="k")


def folded(frames: bytes) -> dict[str, Any]:
    """A stream as Anthropic's SDK accumulates it."""
    response = httpx2.Response(200, content=frames, request=httpx2.Request("POST", "http://gateway.example"))
    raw = anthropic.Stream(cast_to=anthropic.types.RawMessageStreamEvent, response=response, client=SDK)
    return without_null(MessageStream(raw, output_format=anthropic.NOT_GIVEN).get_final_message().to_dict())


def whole(answer: bytes) -> dict[str, Any]:
    """A whole answer as the SDK reads it, strictly."""
    return without_null(Message.model_validate_json(answer).to_dict())


def without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_null(one) for name, one in value.items() if one is not None}
    return [without_null(one) for one in value] if isinstance(value, list) else value


def assert_well_formed(frames: bytes) -> None:
    """The order that the reference gives: a start, blocks one after the other, the end."""
    events = [json.loads(data_of(frame)) for frame in FrameSplitter().feed(frames)]
    assert [event_of(frame) for frame in FrameSplitter().feed(frames)] == [event["type"] for event in events]
    events = [event for event in events if event["type"] != "ping"]
    assert events[0]["type"] == "message_start"
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    index, is_open = -1, False
    for event in events[1:-2]:
        match event["type"]:
            case "content_block_start":
                assert (is_open, event["index"]) == (False, index + 1)
                index, is_open = index + 1, True
            case "content_block_delta":
                assert (is_open, event["index"]) == (True, index)
            case kind:
                assert (kind, is_open, event["index"]) == ("content_block_stop", True, index)
                is_open = False
    assert not is_open


@given(answers())
def test_a_folded_stream_equals_the_whole_answer(answer: dict[str, Any]) -> None:
    stream = read_stream(TAKES_ALL, [chunks(answer)])
    assert stream.error is None
    assert folded(stream.frames) == whole(TAKES_ALL.response(completion(answer), STAMP).body)


@given(answers(), st.lists(st.integers(0, 10_000), max_size=12))
def test_any_split_of_a_stream_gives_the_same_well_formed_events(answer: dict[str, Any], places: list[int]) -> None:
    data = chunks(answer)
    outcome = read_stream(OPENAI, pieces(data, places))
    assert outcome.frames == read_stream(OPENAI, [data]).frames
    assert_well_formed(outcome.frames)


@given(answers())
def test_what_the_ledger_learns_is_what_the_vendor_told(answer: dict[str, Any]) -> None:
    facts = read_stream(PROVIDERS["openai"], [chunks(answer)])
    over = read_stream(OPENAI, [chunks(answer)])
    assert (over.usage, over.model, over.finish_reason) == (facts.usage, facts.model, facts.finish_reason)


@given(answers(), st.integers(0, 10_000))
def test_any_prefix_of_a_stream_is_read_without_error_and_has_no_end(answer: dict[str, Any], place: int) -> None:
    data = chunks(answer)
    reader = OPENAI.stream(STAMP)
    kinds = [kind for kind, _ in reader.feed(data[: place % len(data)])]
    assert Kind.DONE not in kinds
    assert reader.finished == (reader.finish_reason is not None)


@given(answers(), st.integers(0, 10_000), st.binary(min_size=1, max_size=4))
def test_mutated_bytes_raise_only_our_errors(answer: dict[str, Any], place: int, noise: bytes) -> None:
    def read(data: bytes) -> object:
        return read_stream(OPENAI, [data])

    for data, made in ((chunks(answer), read), (completion(answer), lambda data: OPENAI.response(data, STAMP))):
        at = place % len(data)
        try:
            made(data[:at] + noise + data[at + len(noise) :])
        except VendorError:
            continue


@given(answers())
def test_reasoning_goes_back_as_it_came(answer: dict[str, Any]) -> None:
    """What a vendor sealed is what it gets back, by way of the client's blocks."""
    message = whole(TAKES_ALL.response(completion(answer), STAMP).body)
    if not message["content"]:
        return
    (told,) = messages({"role": "assistant", "content": message["content"]}, over=TAKES_ALL)
    went = [{**detail, "index": 0} for detail in told.get("reasoning_details", [])]
    came = [{**detail, "index": 0} for detail in answer["reasoning_details"]]
    sealed = [detail for detail in came if detail.keys() != {"type", "text", "index"}]
    assert all(detail in went for detail in sealed)
    assert len(went) == len(came)


def test_usage_has_anthropic_s_classes() -> None:
    answer = {"content": "Hi", "finish_reason": "stop"}
    assert json.loads(OPENAI.response(completion(answer), STAMP).body)["usage"] == {
        "input_tokens": 3,
        "cache_creation_input_tokens": 2,
        "cache_read_input_tokens": 4,
        "output_tokens": 7,
        "output_tokens_details": {"thinking_tokens": 3},
    }


def test_a_refusal_is_a_reason_to_stop_with_its_explanation() -> None:
    answer = {"refusal": "I cannot help.", "finish_reason": "stop"}
    message = whole(OPENAI.response(completion(answer), STAMP).body)
    assert (message["stop_reason"], message["stop_details"]["explanation"]) == ("refusal", "I cannot help.")


@pytest.mark.parametrize("arguments", ["", "null", " ", "{}"])
def test_a_call_without_arguments_has_an_empty_input(arguments: str) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    answer = {"tool_calls": [call], "finish_reason": "stop"}
    message = whole(OPENAI.response(completion(answer), STAMP).body)
    (block,) = message["content"]
    assert (block["input"], block["id"], message["stop_reason"]) == ({}, "toolu_1_0", "tool_use")


@pytest.mark.parametrize("arguments", ['{"id": ', "[1]", "7"])
def test_arguments_that_are_no_object_are_the_vendor_s_failure(arguments: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(VendorBroke):
        OPENAI.response(completion({"tool_calls": [call], "finish_reason": "length"}), STAMP)


def test_a_call_that_goes_on_after_the_next_began_is_broken() -> None:
    deltas = [
        {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{"}}]},
        {"tool_calls": [{"index": 1, "id": "b", "function": {"name": "f", "arguments": "{}"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]},
    ]
    frames = [f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n".encode() for delta in deltas]
    assert isinstance(read_stream(OPENAI, frames).error, VendorBroke)


def test_calls_that_share_an_index_are_told_apart_by_their_ids() -> None:
    calls = [{"index": 0, "id": name, "function": {"name": "f", "arguments": "{}"}} for name in "ab"]
    frames = [f"data: {json.dumps({'choices': [{'delta': {'tool_calls': [call]}}]})}\n\n".encode() for call in calls]
    end = b'data: {"choices":[{"delta":{},"finish_reason":"tool_calls"}]}\n\ndata: [DONE]\n\n'
    message = folded(read_stream(OPENAI, [*frames, end]).frames)
    assert [block["id"] for block in message["content"]] == ["a", "b"]


def test_text_of_an_answer_is_measured_for_an_estimate() -> None:
    frames = b'data: {"choices":[{"delta":{"content":"n\\u00e9"}}]}\n\n'
    assert read_stream(OPENAI, [frames]).text_bytes == 3


def test_an_answer_without_content_is_a_whole_message_all_the_same() -> None:
    end = b'data: {"model":"m","choices":[{"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    outcome = read_stream(OPENAI, [end])
    assert_well_formed(outcome.frames)
    assert folded(outcome.frames)["content"] == []


# --- errors and limits ------------------------------------------------------------------------------------------------


def classes(kind: type[GatewayError] = GatewayError) -> list[type[GatewayError]]:
    below = [one for sub in kind.__subclasses__() if sub.__module__ == errors.__name__ for one in classes(sub)]
    return below or [kind]


@pytest.mark.parametrize("kind", [kind for kind in classes() if not issubclass(kind, VendorError)])
def test_every_error_is_raised_by_the_sdk_with_its_type_and_code(kind: type[GatewayError]) -> None:
    content = error_body(kind("Mend it.", param="model"), "req_1")

    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(kind.status, content=content, headers={"content-type": "application/json"})

    transport = httpx2.Client(transport=httpx2.MockTransport(answer))
    client = anthropic.Anthropic(api_key="k", base_url="http://gateway.example", http_client=transport, max_retries=0)
    with pytest.raises(anthropic.APIStatusError) as raised:
        client.messages.create(model="m", max_tokens=5, messages=[{"role": "user", "content": "Hi"}])
    inside = raised.value.body["error"]
    assert (inside["code"], inside["param"], inside["message"]) == (kind.code, "model", "Mend it.")
    assert inside["type"] == type_of(kind.status)
    assert raised.value.body["request_id"] == "req_1"


@pytest.mark.parametrize(("status", "kind"), TYPES.items())
def test_a_status_has_anthropic_s_type(status: int, kind: str) -> None:
    refusal = VendorRefused("No.", vendor_status=status, kind="tokens")
    assert json.loads(error_body(refusal, None))["error"]["type"] == kind


def test_types_of_the_page_are_those_of_the_errors_that_a_client_can_meet() -> None:
    page = (Path(__file__).parents[1] / "runbooks" / "dialects.md").read_text()
    rows = re.findall(r"^\| ([\d, ]+) \| `(\w+)` \|$", page, re.MULTILINE)
    written = {(int(status), kind) for statuses, kind in rows for status in statuses.split(", ")}
    met = {kind.status for kind in classes() if not issubclass(kind, VendorError)}
    assert {(status, type_of(status)) for status in met} <= written
    assert all(type_of(status) == kind for status, kind in written)


def test_a_vendor_s_refusal_keeps_its_words_type_and_code() -> None:
    refusal = VendorRefused("Too long.", vendor_status=400, vendor_code="context_length_exceeded", kind="api_error")
    assert json.loads(error_body(refusal, "r"))["error"] == {
        "type": "api_error", "message": "Too long.", "code": "context_length_exceeded",
    }  # fmt: skip


def test_a_limit_is_named() -> None:
    assert json.loads(error_body(RateLimitExceeded("Wait.", limit="tenant_rpm"), "r"))["error"]["limit"] == "tenant_rpm"


def test_an_error_in_mid_stream_is_one_event() -> None:
    frames = error_frames(UpstreamUnavailable("Later."), "req_1")
    assert (event_of(frames), frames.count(b"\n\n")) == ("error", 1)
    assert data_of(frames) == error_body(UpstreamUnavailable("Later."), "req_1")


def test_limits_are_whole_again_at_a_time() -> None:
    rates = Rates(60, 59, 1.25, None, None, 0.0)
    assert rate_headers(rates, 1_767_225_600.0).split(b"\r\n") == [
        b"anthropic-ratelimit-requests-limit: 60",
        b"anthropic-ratelimit-requests-remaining: 59",
        b"anthropic-ratelimit-requests-reset: 2026-01-01T00:00:02Z",
        b"",
    ]


@pytest.mark.parametrize(
    ("value", "passes"),
    [
        ("context-1m-2025-08-07", True),
        ("claude-code-20250219,interleaved-thinking-2025-05-14", True),
        ("max-tokens-3-5-sonnet-2024-07-15, output-128k-2025-02-19", True),
        ("", False),
        ("context-1m", False),
        ("Context-1m-2025-08-07", False),
        ("context-1m-2025-08-07\r\nx-api-key: k", False),
        ("context-1m-2025-08-07," * 33 + "context-1m-2025-08-07", False),
    ],
)
def test_features_pass_by_name_and_date_alone(value: str, passes: bool) -> None:
    assert bool(anthropic_messages.RELAYED[b"anthropic-beta"].fullmatch(value)) is passes


def test_the_estimate_of_a_prompt_counts_what_the_model_reads() -> None:
    request = anthropic_messages.read_count(json.dumps({"model": "a", "messages": [USER], "tools": [TOOL]}).encode())
    answer = OPENAI.count(request, target("openai"))
    assert json.loads(answer.body)["input_tokens"] == len(json.dumps([USER]) + json.dumps([TOOL])) // 4 + 1
    assert answer.usage == Usage()


def test_an_estimate_needs_messages() -> None:
    with pytest.raises(InvalidRequest):
        anthropic_messages.read_count(b'{"model":"a"}')
