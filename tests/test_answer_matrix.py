"""What each dialect tells of an answer over each vendor, as `runbooks/dialects.md` shows it: read by the official SDKs.

Every case is asked in the dialect's own words, whole and streamed, and answered by the simulator's vendor through the
translators, without a stack: the journeys show the same through one. `RECORD=1` rewrites the tables of the page.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import anthropic
import httpx
import httpx2
import msgspec
import openai
import pytest
from msgspec import Struct
from pydantic import BaseModel

from app.config import Target
from app.dialects import ROUTES, translator
from app.errors import VendorCannot
from app.providers.translator import Outgoing
from loadtest.services import SIMULATED_PATHS
from loadtest.simulator.http import Request
from loadtest.simulator.server import SHAPES
from loadtest.simulator.shape import Quota, Stream, Unary
from tests.translation import STAMP, read_stream, target

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "runbooks" / "dialects.md"
TABLE = re.compile(r"(<!-- answers ([a-z]+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
MODELS = {
    "openai": "gpt-4o-mini-2024-07-18",
    "anthropic": "claude-sonnet-4-5-20250929",
    "azure": "gpt-4o-mini-2024-07-18",
    "bedrock": "eu.anthropic.claude-sonnet-4-5-20250929-v1:0",
    "gemini": "gemini-2.5-flash",
    "vertex": "gemini-2.5-flash",
    "openrouter": "anthropic/claude-sonnet-4.5",
    "deepseek": "deepseek-reasoner",
    "groq": "openai/gpt-oss-120b",
    "mistral": "magistral-medium-latest",
    "ollama": "gpt-oss:20b",
    "xai": "grok-4",
}
"""One of each vendor that the simulator speaks as, in the order of the tables."""
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PARAMETERS = {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]}
ANEW = frozenset({"id", "call_id", "tool_call_id", "encrypted_content", "signature", "data", "created", "created_at"})
"""Members that differ between two answers to one request: ids, times, and what is sealed."""
Answer = dict[str, Any]


class Order(BaseModel):
    state: str
    parcels: int


# --- the way of a call, without a stack -------------------------------------------------------------------------------


def at(vendor: str) -> Target:
    """A target at the simulator's vendor."""
    made = target(vendor if vendor in SIMULATED_PATHS or vendor in ("azure", "bedrock") else "openai")
    base = "https://vendor.example" + SIMULATED_PATHS.get(vendor, "" if vendor in ("azure", "bedrock") else "/v1")
    provider = msgspec.structs.replace(made.provider, kind=vendor, base_url=base)
    return msgspec.structs.replace(made, provider=provider, model=MODELS[vendor])


def asked(vendor: str, sent: Outgoing) -> Unary | Stream:
    url = httpx.URL(sent.url)
    headers = {name.lower(): value for name, value in sent.headers} | {"anthropic-version": "2023-06-01"}
    query = dict(url.params)
    answer = SHAPES[vendor].answer(Request("POST", url.path, query, headers, sent.body, 0, ""), Quota(1, 0, 1, 0))
    assert isinstance(answer, Stream) or answer.status == 200, answer
    return answer


def door(vendor: str, path: str, body: bytes) -> tuple[str, bytes]:
    """What a client gets, and of which type. Raises VendorCannot."""
    dialect = ROUTES[path]
    request = dialect.read(body)
    spoken, there = translator(dialect, vendor), at(vendor)
    stamp = msgspec.structs.replace(STAMP, request=request, target=there.name, model=there.model)
    sent = spoken.outgoing(request, there)
    assert (PIXEL.encode() in sent.body) == (PIXEL.encode() in body)
    answer = asked(vendor, sent)
    if isinstance(answer, Unary):
        return "application/json", spoken.answer(answer.body, request, stamp).body
    outcome = read_stream(spoken, answer.events, stamp)
    assert outcome.error is None
    assert outcome.finished
    return "text/event-stream", outcome.frames


@cache
def client(vendor: str, dialect: str) -> Any:
    """The dialect's SDK, its requests answered by `door`."""

    def answer(http: Any, request: Any) -> Any:
        kind, body = door(vendor, request.url.path, request.content)
        return http.Response(200, headers={"content-type": kind}, content=body)

    if dialect == "messages":
        transport = httpx2.MockTransport(lambda request: answer(httpx2, request))
        settings = {"base_url": "http://gateway", "http_client": httpx2.Client(transport=transport)}
        return anthropic.Anthropic(api_key="k", max_retries=0, **settings)
    transport = httpx.MockTransport(lambda request: answer(httpx, request))
    settings = {"base_url": "http://gateway/v1", "http_client": httpx.Client(transport=transport)}
    return openai.OpenAI(api_key="k", max_retries=0, **settings)


# --- the dialects' words ----------------------------------------------------------------------------------------------


class Words(Struct, frozen=True):
    """How a dialect asks for an answer, whole and streamed, and what of it shows each feature.

    `cases` has, by feature, the prompt and the other members of a request; `seen` whether an answer has the feature;
    `told` all that two answers to one request have in common.
    """

    ask: Callable[[str, dict[str, Any]], dict[str, Any]]
    whole: Callable[[Any, dict[str, Any]], Any]
    streamed: Callable[[Any, dict[str, Any]], Any]
    cases: dict[str, tuple[str, dict[str, Any]]]
    seen: dict[str, Callable[[Answer], object]]
    told: Callable[[Answer], Answer]


def _chat_streamed(made: openai.OpenAI, request: dict[str, Any]) -> Any:
    with made.chat.completions.stream(**request, stream_options={"include_usage": True}) as stream:
        try:
            return stream.get_final_completion()
        except openai.ContentFilterFinishReasonError as filtered:  # as at OpenAI; it has what there is
            return filtered.completion


def _responses_streamed(made: openai.OpenAI, request: dict[str, Any]) -> Any:
    """The SDK takes the last event for the answer: what the events before it add up to is looked at here."""
    with made.responses.stream(**request) as stream:
        events = list(stream)
    last = events[-1].response.to_dict()
    deltas = "".join(event.delta for event in events if event.type.endswith(".delta"))
    parts = [part for item in last["output"] for part in [*item.get("summary", ()), *item.get("content", ()), item]]
    texts = (part.get(name) or "" for part in parts for name in ("text", "refusal", "arguments"))
    assert deltas == "".join(texts)
    assert [event.sequence_number for event in events if hasattr(event, "sequence_number")][:2] == [0, 1]
    return events[-1].response


def _messages_streamed(made: anthropic.Anthropic, request: dict[str, Any]) -> Any:
    with made.messages.stream(**request) as stream:
        return stream.get_final_message()


def _said(answer: Answer) -> Answer:
    return answer["choices"][0]["message"]


def _items(answer: Answer, kind: str) -> list[Answer]:
    return [item for item in answer["output"] if item["type"] == kind]


def _parts(answer: Answer, kind: str) -> list[Answer]:
    return [part for item in _items(answer, "message") for part in item["content"] if part["type"] == kind]


def _blocks(answer: Answer, kind: str) -> list[Answer]:
    return [block for block in answer["content"] if block["type"] == kind]


def _chat_told(answer: Answer) -> Answer:
    """Without what a vendor of the same shape adds to it, without places that calls have in a stream alone, and without
    words that OpenRouter repeats in every chunk, which the SDK joins.
    """
    choices = []
    for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
        names = ("content", "refusal", "reasoning", "reasoning_content", "tool_calls")
        message = {name: choice["message"].get(name) or None for name in names}
        calls = [{name: call[name] for name in ("type", "function")} for call in message["tool_calls"] or ()]
        rest = {name: choice.get(name) for name in ("finish_reason", "logprobs")}
        choices.append(message | rest | {"tool_calls": calls})
    return {"choices": choices, "usage": answer["usage"], "model": answer["model"]}


_TEXT, _TOOLS, _BESIDE = "tokens=9 cached=4", "tools=2", "tools=2 beside=4"
_THINKS, _REFUSES = "reasoning=3 tokens=4", "refusal=6"
_CHAT_TOOL = {"type": "function", "function": {"name": "order_status", "parameters": PARAMETERS}}
_FLAT_TOOL = {"type": "function", "name": "order_status", "parameters": PARAMETERS, "strict": False}
_URL = f"data:image/png;base64,{PIXEL}"
_CHAT_IMAGE = [{"type": "text", "text": "tokens=3"}, {"type": "image_url", "image_url": {"url": _URL}}]
_FLAT_IMAGE = [{"type": "input_text", "text": "tokens=3"}, {"type": "input_image", "image_url": _URL, "detail": "auto"}]
_BLOCK_IMAGE = [
    {"type": "text", "text": "tokens=3"},
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}},
]
CHAT = Words(
    ask=lambda prompt, members: {
        "max_completion_tokens": 2_000, "messages": [{"role": "user", "content": prompt}], **members,
    },
    whole=lambda made, request: made.chat.completions.create(**request),
    streamed=_chat_streamed,
    cases={
        "Text": (_TEXT, {}),
        "Parallel tool calls": (_TOOLS, {"tools": [_CHAT_TOOL]}),
        "Text beside tool calls": (_BESIDE, {"tools": [_CHAT_TOOL]}),
        "Empty list of tools": (_TEXT, {"tools": []}),
        "Reasoning shown": (_THINKS, {"reasoning_effort": "low"}),
        "Refusal in its own member": (_REFUSES, {}),
        "JSON by schema": (
            "Which?",
            {"response_format": {"type": "json_schema", "json_schema": {
                "name": "order", "strict": True, "schema": Order.model_json_schema() | {"additionalProperties": False},
            }}},
        ),
        "Several answers (`n`)": ("tokens=5", {"n": 3}),
        "Log probabilities": ("tokens=4", {"logprobs": True, "top_logprobs": 2}),
        "Image seen": ("", {"messages": [{"role": "user", "content": _CHAT_IMAGE}]}),
    },
    seen={
        "Text": lambda answer: _said(answer)["content"],
        "Parallel tool calls": lambda answer: len(_said(answer)["tool_calls"]) == 2,
        "Text beside tool calls": lambda answer: _said(answer)["content"] and len(_said(answer)["tool_calls"]) == 2,
        "Empty list of tools": lambda answer: _said(answer)["content"],
        "Reasoning shown": lambda answer: _said(answer).get("reasoning_content") or _said(answer).get("reasoning"),
        "Refusal in its own member": lambda answer: _said(answer).get("refusal"),
        "JSON by schema": lambda answer: Order.model_validate_json(_said(answer)["content"]),
        "Several answers (`n`)": lambda answer: len({one["message"]["content"] for one in answer["choices"]}) == 3,
        "Log probabilities": lambda answer: len(answer["choices"][0]["logprobs"]["content"]) == 4,
        "Image seen": lambda answer: _said(answer)["content"],
    },
    told=_chat_told,
)  # fmt: skip
RESPONSES = Words(
    ask=lambda prompt, members: {"max_output_tokens": 2_000, "input": prompt, **members},
    whole=lambda made, request: made.responses.create(**request),
    streamed=_responses_streamed,
    cases={
        "Text": (_TEXT, {}),
        "Parallel tool calls": (_TOOLS, {"tools": [_FLAT_TOOL]}),
        "Text beside tool calls": (_BESIDE, {"tools": [_FLAT_TOOL]}),
        "Empty list of tools": (_TEXT, {"tools": []}),
        "Reasoning shown": (_THINKS, {"reasoning": {"effort": "low"}}),
        "Refusal in its own part": (_REFUSES, {}),
        "JSON by schema": (
            "Which?",
            {"text": {"format": {
                "type": "json_schema", "name": "order", "strict": True,
                "schema": Order.model_json_schema() | {"additionalProperties": False},
            }}},
        ),
        "Log probabilities": ("tokens=4", {"include": ["message.output_text.logprobs"]}),
        "Image seen": ("", {"input": [{"role": "user", "content": _FLAT_IMAGE}]}),
    },
    seen={
        "Text": lambda answer: _parts(answer, "output_text")[0]["text"],
        "Parallel tool calls": lambda answer: len(_items(answer, "function_call")) == 2,
        "Text beside tool calls": lambda answer: (
            _parts(answer, "output_text")[0]["text"] and len(_items(answer, "function_call")) == 2
        ),
        "Empty list of tools": lambda answer: _parts(answer, "output_text")[0]["text"],
        "Reasoning shown": lambda answer: any(item["summary"] for item in _items(answer, "reasoning")),
        "Refusal in its own part": lambda answer: [part["refusal"] for part in _parts(answer, "refusal")],
        "JSON by schema": lambda answer: Order.model_validate_json(_parts(answer, "output_text")[0]["text"]),
        "Log probabilities": lambda answer: len(_parts(answer, "output_text")[0]["logprobs"]) == 4,
        "Image seen": lambda answer: _parts(answer, "output_text")[0]["text"],
    },
    told=lambda answer: answer,
)  # fmt: skip
MESSAGES = Words(
    ask=lambda prompt, members: {
        "max_tokens": 2_000, "messages": [{"role": "user", "content": prompt}], **members,
    },
    whole=lambda made, request: made.messages.create(**request),
    streamed=_messages_streamed,
    cases={
        "Text": (_TEXT, {}),
        "Parallel tool calls": (_TOOLS, {"tools": [{"name": "order_status", "input_schema": PARAMETERS}]}),
        "Text beside tool calls": (_BESIDE, {"tools": [{"name": "order_status", "input_schema": PARAMETERS}]}),
        "Empty list of tools": (_TEXT, {"tools": []}),
        "Thinking shown": (_THINKS, {"thinking": {"type": "enabled", "budget_tokens": 1_024}}),
        "Refusal, with its explanation": (_REFUSES, {}),
        "JSON by schema": ("Which?", {"output_config": {"format": {
            "type": "json_schema", "schema": Order.model_json_schema() | {"additionalProperties": False},
        }}}),
        "Image seen": ("", {"messages": [{"role": "user", "content": _BLOCK_IMAGE}]}),
    },
    seen={
        "Text": lambda answer: _blocks(answer, "text")[0]["text"],
        "Parallel tool calls": lambda answer: len(_blocks(answer, "tool_use")) == 2,
        "Text beside tool calls": lambda answer: _blocks(answer, "text") and len(_blocks(answer, "tool_use")) == 2,
        "Empty list of tools": lambda answer: _blocks(answer, "text")[0]["text"],
        "Thinking shown": lambda answer: _blocks(answer, "thinking"),
        "Refusal, with its explanation": lambda answer: (answer.get("stop_details") or {}).get("explanation"),
        "JSON by schema": lambda answer: Order.model_validate_json(_blocks(answer, "text")[0]["text"]),
        "Image seen": lambda answer: _blocks(answer, "text")[0]["text"],
    },
    told=lambda answer: answer,
)  # fmt: skip
UNSEEN = {
    "Reasoning shown": "not shown",
    "Thinking shown": "not shown",
    "Refusal in its own member": "as text",
    "Refusal in its own part": "as text",
    "Refusal, with its explanation": "as text",
}
"""What becomes of a feature where a vendor has no word for it. Every other one is shown or refused."""
DIALECTS = {"chat": CHAT, "responses": RESPONSES, "messages": MESSAGES}


# --- the tables -------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """What an answer says, without nulls, without what each has anew, and arguments as what they mean."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    if not isinstance(value, dict):
        return value
    told = {name: plain(one) for name, one in value.items() if name not in ANEW and one not in (None, [])}
    if isinstance(told.get("arguments"), str):  # the vendor's own JSON, spaced as it pleases
        told["arguments"] = msgspec.json.decode(told["arguments"])
    return told


@cache
def outcome(dialect: str, feature: str, vendor: str) -> tuple[str, Answer | None, Answer | None]:
    """A word of the table, and the two answers that it is of, whole and streamed."""
    try:
        return answered(client(vendor, dialect), dialect, feature, "a")
    except VendorCannot as refusal:
        return f"refused (`{refusal.param}`)", None, None


def answered(made: Any, dialect: str, feature: str, model: str) -> tuple[str, Answer, Answer]:
    """The same of any client of that dialect; whoever it asks may raise."""
    words = DIALECTS[dialect]
    prompt, members = words.cases[feature]
    request = words.ask(prompt, members) | {"model": model}
    whole, streamed = words.whole(made, request), words.streamed(made, request)
    answers = (whole.to_dict(), streamed.to_dict())
    seen = [bool(words.seen[feature](answer)) for answer in answers]
    assert seen[0] == seen[1]
    return "yes" if seen[0] else UNSEEN[feature], *map(words.told, answers)


def table(dialect: str) -> str:
    lines = [["Answer", *(f"`{vendor}`" for vendor in MODELS)], ["---"] * (len(MODELS) + 1)]
    for feature in DIALECTS[dialect].cases:
        lines.append([feature, *(outcome(dialect, feature, vendor)[0] for vendor in MODELS)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


CASES = [(dialect, feature) for dialect, words in DIALECTS.items() for feature in words.cases]


@pytest.mark.parametrize("vendor", MODELS)
@pytest.mark.parametrize(("dialect", "feature"), CASES)
def test_a_stream_accumulates_to_the_whole_answer(dialect: str, feature: str, vendor: str) -> None:
    _, whole, streamed = outcome(dialect, feature, vendor)
    assert plain(streamed) == plain(whole)


def test_the_simulator_s_vendors_are_those_of_the_tables() -> None:
    assert set(MODELS) == set(SHAPES)


def test_the_page_has_the_tables_as_they_are() -> None:
    page = PAGE.read_text()
    made = TABLE.sub(lambda found: found[1] + table(found[2]), page)
    if os.environ.get("RECORD"):
        PAGE.write_text(page := made)
    assert [found[2] for found in TABLE.finditer(page)] == list(DIALECTS)
    assert page == made
