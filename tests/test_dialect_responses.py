"""OpenAI's Responses over translators of chat completions: requests, answers, streams."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import httpx
import msgspec
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from app.core import Usage
from app.dialects import ROUTES, WRAPPERS, openai_responses, translator
from app.errors import InvalidRequest, VendorBroke, VendorCannot, VendorError
from app.providers import PROVIDERS
from app.providers.translator import EXTRAS, Kind, Translator
from app.sse import FrameSplitter, data_of, event_of
from app.wire import ChatBody
from tests.test_dialect_messages import answers, chunks, completion, pieces
from tests.translation import STAMP, read_stream, target

OVER = WRAPPERS["responses"]
CHAT = OVER(PROVIDERS["openai_compatible"])
TAKES_ALL = OVER(msgspec.structs.replace(PROVIDERS["openai_compatible"], extras=EXTRAS))
KIND = "openai_compatible"
ASKED = {"role": "user", "content": "Where is order 7?"}
TOOL = {"type": "function", "name": "order_status", "parameters": {"type": "object"}, "strict": False}
CALL = {"type": "function_call", "call_id": "call_1", "name": "order_status", "arguments": '{"id":7}', "id": "fc_1"}
RESULT = {"type": "function_call_output", "call_id": "call_1", "output": "sent"}
EVENT = TypeAdapter(ResponseStreamEvent)


def body(**members: Any) -> bytes:
    return json.dumps({"model": "alias", "input": "Hi"} | members).encode()


def chat(over: Translator = CHAT, kind: str = KIND, **members: Any) -> dict[str, Any]:
    """The chat completions request that a request of Responses becomes, without the model."""
    sent = json.loads(over.chat(openai_responses.read(body(**members)), target(kind)).body)
    assert sent.pop("model") == "model-2026-01-01"
    msgspec.json.decode(msgspec.json.encode(sent), type=ChatBody)
    return sent


def messages(*items: dict[str, Any], over: Translator = CHAT, **members: Any) -> list[dict[str, Any]]:
    return chat(over, input=list(items), **members)["messages"]


def refused(over: Translator = CHAT, kind: str = KIND, **members: Any) -> str | None:
    """The parameter that the refusal names, which its message names too."""
    with pytest.raises(VendorCannot) as refusal:
        over.chat(openai_responses.read(body(**members)), target(kind))
    assert f"`{refusal.value.param}`" in refusal.value.message
    return refusal.value.param


# --- requests ---------------------------------------------------------------------------------------------------------


def test_a_text_is_what_the_user_says_under_the_instructions() -> None:
    assert chat(instructions="Be brief.")["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]


def test_the_model_s_items_in_a_row_are_one_message() -> None:
    said = {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
    }
    told = messages(ASKED, said, CALL, CALL | {"call_id": "call_2"}, RESULT, RESULT | {"call_id": "call_2"}, ASKED)
    calls = [
        {"id": id, "type": "function", "function": {"name": "order_status", "arguments": '{"id":7}'}}
        for id in ("call_1", "call_2")
    ]
    assert told == [
        ASKED,
        {"role": "assistant", "content": "I look.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "sent"},
        {"role": "tool", "tool_call_id": "call_2", "content": "sent"},
        ASKED,
    ]


def test_attachments_are_parts() -> None:
    content = [
        {"type": "input_text", "text": "What is it?"},
        {"type": "input_image", "image_url": "https://images.example/a.png", "detail": "auto"},
        {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "low"},
        {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,AAAA"},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    ]
    (told,) = messages({"role": "user", "content": content})
    assert told["content"] == [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": "https://images.example/a.png"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}},
        {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AAAA"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    ]


def test_a_result_may_have_an_image() -> None:
    output = [{"type": "input_text", "text": "This:"}, {"type": "input_image", "image_url": "data:image/png;base64,AA"}]
    told = messages(ASKED, CALL, RESULT | {"output": output})
    assert [part["type"] for part in told[2]["content"]] == ["text", "image_url"]


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"max_output_tokens": 7}, {"max_completion_tokens": 7}),
        ({"temperature": 0.5, "top_p": 0.9, "user": "u-1"}, {"temperature": 0.5, "top_p": 0.9, "user": "u-1"}),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, {"reasoning_effort": "low"}),
        ({"reasoning": {"summary": "auto"}}, {}),
        ({"text": {"format": {"type": "text"}, "verbosity": "low"}}, {"verbosity": "low"}),
        ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
        ({"include": ["reasoning.encrypted_content"]}, {}),
        ({"include": ["message.output_text.logprobs"]}, {"logprobs": True}),
        ({"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
        ({"tool_choice": "auto", "parallel_tool_calls": True, "tools": []}, {}),
        ({"truncation": "disabled", "store": False, "background": False, "metadata": None}, {}),
        ({"stream": True, "stream_options": {"include_obfuscation": False}}, {"stream": True}),
    ],
)
def test_members_have_their_names_in_chat_completions(members: dict[str, Any], said: dict[str, Any]) -> None:
    told = chat(**members)
    told.pop("stream_options", None)
    assert {name: value for name, value in told.items() if name != "messages"} == said


def test_a_schema_is_a_response_format() -> None:
    schema = {"type": "object", "properties": {}}
    written = {"type": "json_schema", "name": "order", "schema": schema, "strict": True, "description": None}
    assert chat(text={"format": written})["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "order", "schema": schema, "strict": True},
    }


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("required", "required"),
        ("none", "none"),
        ({"type": "function", "name": "order_status"}, {"type": "function", "function": {"name": "order_status"}}),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "order_status"}]},
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "auto",
                    "tools": [{"type": "function", "function": {"name": "order_status"}}],
                },
            },
        ),
    ],
)
def test_the_choice_of_tools(choice: Any, said: Any) -> None:
    assert chat(tools=[TOOL], tool_choice=choice)["tool_choice"] == said


def test_tools_are_functions() -> None:
    told = chat(tools=[TOOL, TOOL | {"strict": True, "description": "Where it is."}], parallel_tool_calls=False)
    function = {"name": "order_status", "parameters": {"type": "object"}}
    assert told["tools"] == [
        {"type": "function", "function": function},
        {"type": "function", "function": function | {"description": "Where it is.", "strict": True}},
    ]
    assert told["parallel_tool_calls"] is False


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"tools": [TOOL, {"type": "web_search"}]}, "tools[1]"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"input": [ASKED, {"type": "web_search_call", "id": "ws_1"}]}, "input[1]"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "file_1"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
        ({"text": {"format": {"type": "grammar"}}}, "text"),
        ({"reasoning": {"effort": 7}}, "reasoning"),
        ({"x": 1}, "x"),
    ],
)
def test_what_chat_completions_have_no_room_for_is_refused_by_its_name(members: dict[str, Any], param: str) -> None:
    assert refused(**members) == param


@pytest.mark.parametrize(
    ("kind", "members", "param"),
    [
        ("anthropic", {"text": {"format": {"type": "json_object"}}}, "text"),
        ("anthropic", {"top_logprobs": 2}, "top_logprobs"),
        ("anthropic", {"include": ["message.output_text.logprobs"]}, "include"),
        ("bedrock", {"reasoning": {"effort": "strange"}}, "reasoning"),
        ("gemini", {"prompt_cache_key": "handbook"}, "prompt_cache_key"),
        (
            "bedrock",
            {"instructions": "Be brief.", "input": [{"role": "user", "content": [
                {"type": "input_text", "text": "What?"},
                {"type": "input_image", "image_url": "https://images.example/a.png"},
            ]}]},
            "input[0].content[1]",
        ),
    ],
)  # fmt: skip
def test_what_a_vendor_cannot_carry_is_refused_by_its_name_in_responses(
    kind: str, members: dict[str, Any], param: str
) -> None:
    assert refused(translator(ROUTES["/v1/responses"], kind), kind, **members) == param


def test_a_member_that_the_target_drops_is_left_out() -> None:
    at = msgspec.structs.replace(target(KIND), drop_params=frozenset({"truncation", "store", "metadata"}))
    written = openai_responses.read(body(truncation="auto", store=True, metadata={"a": "b"}))
    assert set(json.loads(CHAT.chat(written, at).body)) == {"model", "messages"}


ODD = st.sampled_from(
    [None, True, 7, 0.5, "", "auto", [], [None], ["x"], [{}], {}, {"type": "auto"}, {"type": 7}, {"content": []},
     [{"role": "user", "content": [{"type": "input_text"}]}], [{"role": "assistant", "content": [[]]}],
     [{"type": "reasoning", "encrypted_content": "gateway1:e30"}, {"role": "assistant", "content": "a"}],
     [{"type": "reasoning", "summary": 7}], {"format": {}}, {"format": {"type": "json_schema", "schema": 7}}],
)  # fmt: skip
MEMBERS = ["input", "instructions", "tools", "tool_choice", "reasoning", "text", "include", "metadata", "store", "x"]


@given(st.dictionaries(st.sampled_from(MEMBERS), ODD))
def test_any_request_is_carried_or_refused(members: dict[str, Any]) -> None:
    with contextlib.suppress(InvalidRequest, VendorCannot):
        sent = TAKES_ALL.chat(openai_responses.read(body(**members)), target(KIND))
        assert "messages" in json.loads(sent.body)


# --- answers ----------------------------------------------------------------------------------------------------------


def events(frames: bytes) -> list[dict[str, Any]]:
    """The events of a stream, each named as it says and in the shape that the SDK has for it."""
    found = []
    for one in FrameSplitter().feed(frames):
        if data := data_of(one):
            EVENT.validate_json(data)
            found.append(json.loads(data))
            assert event_of(one) == found[-1]["type"]
    return found


def folded(frames: bytes) -> list[dict[str, Any]]:
    """The items that the events of a stream add up to, whatever the last one says: an item a state, part by part."""
    items: list[dict[str, Any]] = []
    for event in events(frames):
        match event["type"].removeprefix("response."):
            case "output_item.added":
                assert event["output_index"] == len(items)
                items.append(json.loads(json.dumps(event["item"])))
            case "content_part.added":
                assert event["content_index"] == len(items[-1]["content"])
                items[-1]["content"].append(event["part"])
            case "reasoning_summary_part.added":
                items[-1]["summary"].append(event["part"])
            case "reasoning_summary_text.delta":
                items[-1]["summary"][event["summary_index"]]["text"] += event["delta"]
            case "output_text.delta":
                items[-1]["content"][event["content_index"]]["text"] += event["delta"]
                items[-1]["content"][event["content_index"]]["logprobs"] += event["logprobs"]
            case "output_text.annotation.added":
                items[-1]["content"][event["content_index"]]["annotations"].append(event["annotation"])
            case "refusal.delta":
                items[-1]["content"][event["content_index"]]["refusal"] += event["delta"]
            case "function_call_arguments.delta":
                items[-1]["arguments"] += event["delta"]
            case "output_text.done":
                assert items[-1]["content"][event["content_index"]]["text"] == event["text"]
            case "content_part.done":
                assert items[-1]["content"][event["content_index"]] == event["part"]
            case "function_call_arguments.done":
                assert items[-1]["arguments"] == event["arguments"]
            case "output_item.done":
                told = {"status": event["item"]["status"], "encrypted_content": event["item"].get("encrypted_content")}
                assert items[-1] | told == event["item"] | told
                items[-1] = event["item"]
        if "item_id" in event:
            assert (event["item_id"], event["output_index"]) == (items[-1]["id"], len(items) - 1)
    return items


def whole(answer: bytes) -> dict[str, Any]:
    """A whole answer, which the SDK takes strictly."""
    Response.model_validate_json(answer)
    return json.loads(answer)


@given(answers())
def test_a_folded_stream_equals_the_whole_answer(answer: dict[str, Any]) -> None:
    stream = read_stream(TAKES_ALL, [chunks(answer)])
    assert stream.error is None
    unary = whole(TAKES_ALL.response(completion(answer), STAMP).body)
    assert folded(stream.frames) == unary["output"]
    assert events(stream.frames)[-1]["response"] == unary


@given(answers(), st.lists(st.integers(0, 10_000), max_size=12))
def test_any_split_of_a_stream_gives_the_same_events_in_order(answer: dict[str, Any], places: list[int]) -> None:
    data = chunks(answer)
    outcome = read_stream(CHAT, pieces(data, places))
    assert outcome.frames == read_stream(CHAT, [data]).frames
    told = events(outcome.frames)
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    assert [event["type"] for event in told[:2]] == ["response.created", "response.in_progress"]
    assert told[-1]["type"] in ("response.completed", "response.incomplete")
    assert outcome.kinds.count("DONE") == 1


@given(answers())
def test_what_the_ledger_learns_is_what_the_vendor_told(answer: dict[str, Any]) -> None:
    facts = read_stream(PROVIDERS[KIND], [chunks(answer)])
    over = read_stream(CHAT, [chunks(answer)])
    assert (over.usage, over.model, over.finish_reason) == (facts.usage, facts.model, facts.finish_reason)


@given(answers(), st.integers(0, 10_000))
def test_any_prefix_of_a_stream_is_read_without_error_and_has_no_end(answer: dict[str, Any], place: int) -> None:
    data = chunks(answer)
    reader = CHAT.stream(STAMP)
    assert Kind.DONE not in [kind for kind, _ in reader.feed(data[: place % len(data)])]
    assert reader.finished == (reader.finish_reason is not None)


@given(answers(), st.integers(0, 10_000), st.binary(min_size=1, max_size=4))
def test_mutated_bytes_raise_only_our_errors(answer: dict[str, Any], place: int, noise: bytes) -> None:
    for data, made in (
        (chunks(answer), lambda data: read_stream(CHAT, [data])),
        (completion(answer), lambda data: CHAT.response(data, STAMP)),
    ):
        at = place % len(data)
        with contextlib.suppress(VendorError):
            made(data[:at] + noise + data[at + len(noise) :])


@given(answers())
def test_reasoning_goes_back_as_it_came(answer: dict[str, Any]) -> None:
    """What a vendor sealed is what it gets back, by way of the client's items."""
    output = whole(TAKES_ALL.response(completion(answer), STAMP).body)["output"]
    if not any(item.get("content") or "arguments" in item for item in output):
        return
    (told,) = messages(*output, over=TAKES_ALL)
    went = [{**detail, "index": 0} for detail in told.get("reasoning_details", [])]
    came = [{**detail, "index": 0} for detail in answer["reasoning_details"]]
    assert [detail for detail in came if detail not in went] == []


def test_reasoning_of_openai_goes_to_no_other_vendor_and_that_of_others_not_to_openai() -> None:
    sealed = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAAAB"}
    said = {"role": "assistant", "content": "Hi"}
    assert messages(sealed, said, over=TAKES_ALL) == [said]
    packed = sealed | {"encrypted_content": "gateway1:eyJ0eXBlIjoicmVhc29uaW5nLmVuY3J5cHRlZCJ9"}
    native = translator(ROUTES["/v1/responses"], "openai")
    sent = native.chat(openai_responses.read(body(input=[sealed, packed, said])), target("openai"))
    assert json.loads(sent.body)["input"] == [sealed, said]


def test_a_response_says_what_its_request_said() -> None:
    asked = openai_responses.read(
        body(tools=[TOOL], instructions="Be brief.", temperature=0.5, metadata={"a": "b"}, user=None)
    )
    stamp = msgspec.structs.replace(STAMP, request=asked)
    told = whole(CHAT.response(completion({"content": "Hi", "finish_reason": "stop"}), stamp).body)
    assert (told["tools"], told["instructions"], told["temperature"]) == ([TOOL], "Be brief.", 0.5)
    assert (told["metadata"], told["user"], told["store"], told["model"]) == ({"a": "b"}, None, False, "m-1")


def test_usage_has_the_classes_of_responses() -> None:
    answer = CHAT.response(completion({"content": "Hi", "finish_reason": "stop"}), STAMP)
    assert json.loads(answer.body)["usage"] == {
        "input_tokens": 9,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 2},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": 16,
    }
    assert answer.usage == Usage(input=3, cache_read=4, cache_write=2, output=4, reasoning=3)


@pytest.mark.parametrize(
    ("reason", "status", "why"),
    [
        ("stop", "completed", None),
        ("length", "incomplete", {"reason": "max_output_tokens"}),
        ("content_filter", "incomplete", {"reason": "content_filter"}),
    ],
)
def test_an_answer_without_its_end_is_incomplete_and_says_why(reason: str, status: str, why: Any) -> None:
    told = whole(CHAT.response(completion({"content": "Hi", "finish_reason": reason}), STAMP).body)
    assert (told["status"], told["incomplete_details"], told["output"][0]["status"]) == (status, why, status)


def test_a_refusal_is_a_part_of_its_own() -> None:
    told = whole(CHAT.response(completion({"refusal": "I cannot.", "finish_reason": "stop"}), STAMP).body)
    assert told["output"][0]["content"] == [{"type": "refusal", "refusal": "I cannot."}]


@pytest.mark.parametrize("arguments", ["", "null", " "])
def test_a_call_without_arguments_has_an_empty_object(arguments: str) -> None:
    call = {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": arguments}}
    answer = {"tool_calls": [call], "finish_reason": "tool_calls"}
    assert whole(CHAT.response(completion(answer), STAMP).body)["output"][0]["arguments"] == "{}"


def test_log_probabilities_stand_with_the_text() -> None:
    token = {"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": []}
    choice = {"index": 0, "finish_reason": "stop", "logprobs": {"content": [token]}}
    unary = {"model": "m", "choices": [choice | {"message": {"content": "Hi"}}], "usage": None}
    part = whole(CHAT.response(json.dumps(unary).encode(), STAMP).body)["output"][0]["content"][0]
    streamed = {"model": "m", "choices": [choice | {"delta": {"content": "Hi"}}]}
    frames = read_stream(CHAT, [b"data: %b\n\ndata: [DONE]\n\n" % json.dumps(streamed).encode()]).frames
    assert part == folded(frames)[0]["content"][0]
    assert part["logprobs"] == [token]


def test_sources_of_a_text_are_its_annotations() -> None:
    cited = {"url": "https://a.example", "title": "A", "start_index": 0, "end_index": 2}
    annotation = {"type": "url_citation", "url_citation": cited}
    choice = {"index": 0, "finish_reason": "stop"}
    message = {"content": "Hi", "annotations": [annotation]}
    unary = {"model": "m", "choices": [choice | {"message": message}]}
    part = whole(CHAT.response(json.dumps(unary).encode(), STAMP).body)["output"][0]["content"][0]
    streamed = {"model": "m", "choices": [choice | {"delta": message}]}
    frames = read_stream(CHAT, [b"data: %b\n\ndata: [DONE]\n\n" % json.dumps(streamed).encode()]).frames
    assert part["annotations"] == [{"type": "url_citation"} | cited]
    assert folded(frames)[0]["content"][0] == part


def test_a_call_that_goes_on_after_the_next_began_is_broken() -> None:
    def delta(**call: Any) -> bytes:
        chunk = {"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]}
        return b"data: %b\n\n" % json.dumps(chunk).encode()

    calls = [delta(index=place, id=f"call_{place}", function={"name": "f", "arguments": "{"}) for place in (0, 1)]
    outcome = read_stream(CHAT, [*calls, delta(index=0, function={"arguments": "}"})])
    assert isinstance(outcome.error, VendorBroke)


def test_text_of_a_stream_is_measured_for_an_estimate() -> None:
    stream = read_stream(CHAT, [chunks({"content": "Hello", "finish_reason": "stop"} | NOTHING)])
    assert stream.text_bytes == len("Hello")


NOTHING: dict[str, Any] = {"reasoning_content": None, "reasoning_details": [], "tool_calls": [], "refusal": None}


def test_the_sdk_accumulates_the_stream_to_the_answer() -> None:
    answer = {"content": "Hello", "finish_reason": "stop"} | NOTHING
    frames = read_stream(CHAT, [chunks(answer)]).frames
    told = httpx.Response(200, headers={"content-type": "text/event-stream"}, content=frames)
    transport = httpx.MockTransport(lambda _: told)
    client = openai.OpenAI(api_key="k", base_url="http://g/v1", http_client=httpx.Client(transport=transport))
    with client.responses.stream(model="a", input="Hi") as stream:
        final = stream.get_final_response()
    assert final.output_text == "Hello"
    assert final.usage.total_tokens == 16
