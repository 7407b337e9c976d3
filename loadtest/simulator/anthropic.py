"""Anthropic's Messages: answers, events, errors and headers as the vendor writes them.

Written as recorded in 2026 (`stop_details`, a tool's `caller`, spaces inside the last brace of an event). What was
thought is shown, and counted in `output_tokens_details`, where `thinking` asks for it. Blocks with `cache_control` are
written to the cache, as many tokens as their text has.
Source: recorded answers; Anthropic API reference for what a request may hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from msgspec import Struct

from loadtest.simulator.content import Ask, Choice, Content, Function, Tool, Words, content_of, text_tokens
from loadtest.simulator.content import Message as Said
from loadtest.simulator.http import Headers, Request
from loadtest.simulator.identity import hexadecimal, letters
from loadtest.simulator.shape import Problem, Quota, Shape, Stream, Unary

WINDOW_TOKENS = 200_000
_KNOWN = re.compile(r"claude-[a-z0-9-]+")
_LEAST_BUDGET_TOKENS = 1024
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_MODELS = ("claude-opus-4-7", "claude-sonnet-4-6", "claude-sonnet-4-5-20250929", "claude-haiku-4-5-20251001")


class Turn(Struct, forbid_unknown_fields=True):
    role: str
    content: str | list[dict[str, Any]]


class MessagesAsk(Struct, forbid_unknown_fields=True):
    """What a request may hold: the vendor refuses everything else."""

    model: str
    max_tokens: int
    messages: list[Turn]
    system: str | list[dict[str, Any]] = ""
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    cache_control: dict[str, Any] | None = None

    @property
    def thinks(self) -> bool:
        return self.thinking is not None and self.thinking["type"] != "disabled"


class _Named(Struct):
    model: str = ""


_ask = msgspec.json.Decoder(MessagesAsk)
_named = msgspec.json.Decoder(_Named)


def _model_of(request: Request) -> str:
    try:
        return _named.decode(request.body).model
    except msgspec.DecodeError:
        return ""


def _authorize(request: Request, key: str | None) -> Problem | None:
    given = request.headers.get("x-api-key", "").strip()
    if not given:
        return Problem(401, "x-api-key header is required")
    if given.startswith("bad-") or (key is not None and given != key):
        return Problem(401, "invalid x-api-key")
    return None


def _answer(request: Request, quota: Quota) -> Unary | Stream:
    route = (request.method, request.path)
    if "anthropic-version" not in request.headers:
        return error(Problem(400, "anthropic-version: header is required"))
    if route == ("GET", "/v1/models"):
        models = [{"type": "model", "id": name, "display_name": name} for name in _MODELS]
        return _json({"data": models, "has_more": False, "first_id": _MODELS[0], "last_id": _MODELS[-1]}, quota)
    if route not in (("POST", "/v1/messages"), ("POST", "/v1/messages/count_tokens")):
        return error(Problem(404, "Not found"))
    try:
        if request.path.endswith("/count_tokens"):
            return _count(msgspec.json.decode(request.body, type=dict[str, Any]), quota)
        ask = _ask.decode(request.body)
        return _messages(ask, quota)
    except msgspec.DecodeError as fault:
        return error(Problem(400, str(fault)))


def _messages(ask: MessagesAsk, quota: Quota) -> Unary | Stream:
    problem = _fault_in(ask)
    if problem is not None:
        return error(problem)
    content = content_of(_as_chat(ask))
    if content.prompt_tokens > WINDOW_TOKENS:
        message = f"prompt is too long: {content.prompt_tokens} tokens > {WINDOW_TOKENS} maximum"
        return error(Problem(400, message))
    usage = _usage(ask, content)
    tokens = content.prompt_tokens + usage["output_tokens"]
    if ask.stream:
        return Stream(
            headers=headers(quota, True),
            events=_events(ask, content, usage),
            error_event=_error_event,
            latency_ms=content.latency_ms,
            chunk_ms=content.chunk_ms,
            tokens=tokens,
        )
    message = _message(ask) | {
        "content": _blocks(ask, content),
        **_end(content.choices[0]),
        "usage": usage,
    }
    return Unary(200, headers(quota, False), msgspec.json.encode(message), content.latency_ms, tokens)


def _count(members: dict[str, Any], quota: Quota) -> Unary:
    """The tokens of a request that has no length."""
    if "max_tokens" in members:
        return error(Problem(400, "max_tokens: Extra inputs are not permitted"))
    ask = msgspec.convert(members | {"max_tokens": 1}, MessagesAsk)
    problem = _fault_in(ask)
    return error(problem) if problem else _json({"input_tokens": content_of(_as_chat(ask)).prompt_tokens}, quota)


def _fault_in(ask: MessagesAsk) -> Problem | None:
    """What the vendor refuses, of what a translator may get wrong."""
    if not _KNOWN.fullmatch(ask.model):
        return Problem(404, f"model: {ask.model}")
    if ask.max_tokens < 1:
        return Problem(400, "max_tokens: Input should be greater than or equal to 1")
    if not ask.messages:
        return Problem(400, "messages: at least one message is required")
    if ask.temperature is not None and not 0 <= ask.temperature <= 1:
        return Problem(400, "temperature: range: 0..1")
    calls: set[str] = set()
    for place, turn in enumerate(ask.messages):
        if turn.role not in ("user", "assistant"):
            return Problem(400, f"messages: Unexpected role {turn.role!r}")
        for block in turn.content if isinstance(turn.content, list) else ():
            if block.get("type") == "text" and not block.get("text"):
                return Problem(400, "messages: text content blocks must be non-empty")
            if block.get("type") == "tool_use":
                calls.add(block["id"])
            if block.get("type") == "tool_result" and block["tool_use_id"] not in calls:
                return Problem(400, f"messages.{place}: unexpected `tool_use_id` in `tool_result` blocks")
    budget = (ask.thinking or {}).get("budget_tokens")
    if budget is not None and not _LEAST_BUDGET_TOKENS <= budget < ask.max_tokens:
        return Problem(400, "thinking.enabled.budget_tokens: at least 1024, and below `max_tokens`")
    if budget is not None and (ask.tool_choice or {}).get("type") in ("any", "tool"):
        return Problem(400, "Thinking may not be enabled when tool_choice forces tool use.")
    return None


def _as_chat(ask: MessagesAsk) -> Ask:
    """The same request as the content's maker knows it."""
    system = [Said("system", ask.system)] if ask.system else []
    choice = ask.tool_choice or {"type": "auto"}
    wanted = (ask.output_config or {}).get("format")
    named = {"auto": "auto", "any": "required", "none": "none"}
    return Ask(
        model=ask.model,
        messages=[*system, *(Said(_role(turn), _said(turn)) for turn in ask.messages)],
        stream=ask.stream,
        max_tokens=ask.max_tokens,
        tools=[Tool(Function(tool["name"], tool["input_schema"])) for tool in ask.tools] or None,
        tool_choice=named.get(choice["type"]) or {"type": "function", "function": {"name": choice["name"]}},
        parallel_tool_calls=not choice.get("disable_parallel_tool_use", False),
        response_format={"type": "json_schema", "json_schema": {"schema": wanted["schema"]}} if wanted else None,
    )


def _role(turn: Turn) -> str:
    results = isinstance(turn.content, list) and any(block.get("type") == "tool_result" for block in turn.content)
    return "tool" if results else turn.role


def _said(turn: Turn) -> str | list[dict[str, Any]]:
    """The text, results of tools included."""
    if isinstance(turn.content, str):
        return turn.content
    return [{"text": block["content"]} if isinstance(block.get("content"), str) else block for block in turn.content]


def _usage(ask: MessagesAsk, content: Content) -> dict[str, Any]:
    written, for_an_hour = _written_to_cache(ask, content.prompt_tokens - content.cached_tokens)
    thought = content.reasoning_tokens if ask.thinks else 0
    usage: dict[str, Any] = {
        "input_tokens": content.prompt_tokens - content.cached_tokens - written,
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": content.cached_tokens,
        "cache_creation": {
            "ephemeral_5m_input_tokens": written - for_an_hour,
            "ephemeral_1h_input_tokens": for_an_hour,
        },
        "output_tokens": content.completion_tokens - content.reasoning_tokens + thought,
        "service_tier": "standard",
        "inference_geo": "not_available",
    }
    return usage | ({"output_tokens_details": {"thinking_tokens": thought}} if thought else {})


def _written_to_cache(ask: MessagesAsk, at_most: int) -> tuple[int, int]:
    """Tokens that the hints write to the cache, and those of them that stay for an hour."""
    lists = [ask.system, *(turn.content for turn in ask.messages)]
    hinted = [block for blocks in lists if isinstance(blocks, list) for block in blocks if block.get("cache_control")]
    written = for_an_hour = 0
    for block in hinted:
        tokens = min(text_tokens(str(block.get("text", ""))), at_most - written)
        written += tokens
        for_an_hour += tokens if block["cache_control"].get("ttl") == "1h" else 0
    return written, for_an_hour


def _message(ask: MessagesAsk) -> dict[str, Any]:
    return {
        "model": ask.model,
        "id": "msg_01" + letters(22),
        "type": "message",
        "role": "assistant",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "stop_details": None,
        "usage": None,
    }


def _end(choice: Choice) -> dict[str, Any]:
    """Why it stopped. A model that is stopped has begun to answer, and the vendor says what was wrong with that."""
    if not choice.refusal:
        return {"stop_reason": _STOP_REASONS[choice.finish_reason], "stop_sequence": None, "stop_details": None}
    details = {"type": "refusal", "category": "cyber", "explanation": "".join(choice.refusal)}
    return {"stop_reason": "refusal", "stop_sequence": None, "stop_details": details}


def _text(choice: Choice) -> Words | list[str]:
    return choice.refusal[:1] or choice.pieces


def _blocks(ask: MessagesAsk, content: Content) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if ask.thinks and len(content.reasoning):
        blocks.append({"type": "thinking", "thinking": "".join(content.reasoning), "signature": _signature()})
    choice = content.choices[0]
    if text := _text(choice):
        blocks.append({"type": "text", "text": "".join(text)})
    for call in choice.calls:
        blocks.append(_call(call.name) | {"input": _whole("".join(call.fragments)), "caller": {"type": "direct"}})
    return blocks


def _call(name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": "toolu_01" + letters(22), "name": name}


def _whole(arguments: str) -> Any:
    """Arguments that the length cut off are left out whole, as an answer's `input` is an object."""
    try:
        return msgspec.json.decode(arguments)
    except msgspec.DecodeError:
        return {}


def _signature() -> str:
    return "Eu" + letters(200) + "GAE="


def _events(ask: MessagesAsk, content: Content, usage: dict[str, Any]) -> Iterator[bytes]:
    first = {name: value for name, value in usage.items() if name != "output_tokens_details"} | {"output_tokens": 1}
    yield event({"type": "message_start", "message": _message(ask) | {"usage": first}})
    choice = content.choices[0]
    index = -1
    for start, deltas in _streamed_blocks(ask, content):
        index += 1
        yield event({"type": "content_block_start", "index": index, "content_block": start})
        if index == 0:
            yield b'event: ping\ndata: {"type": "ping"}\n\n'
        for delta in deltas:
            yield event({"type": "content_block_delta", "index": index, "delta": delta})
        yield event({"type": "content_block_stop", "index": index})
    told = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens",
            "output_tokens_details")  # fmt: skip
    figures = {name: usage[name] for name in told if name in usage}
    yield event({"type": "message_delta", "delta": _end(choice), "usage": figures})
    yield event({"type": "message_stop"})


def _streamed_blocks(ask: MessagesAsk, content: Content) -> Iterator[tuple[dict[str, Any], Iterator[dict[str, Any]]]]:
    """Each block's start, and the deltas that fill it."""
    choice = content.choices[0]
    if ask.thinks and len(content.reasoning):
        yield {"type": "thinking", "thinking": "", "signature": ""}, _thoughts(content)
    if text := _text(choice):
        yield {"type": "text", "text": ""}, ({"type": "text_delta", "text": piece} for piece in text)
    for call in choice.calls:
        fragments = ["", *(fragment for fragment in call.fragments if call.fragments != ["{}"])]
        deltas = ({"type": "input_json_delta", "partial_json": fragment} for fragment in fragments)
        yield _call(call.name) | {"input": {}, "caller": {"type": "direct"}}, deltas


def _thoughts(content: Content) -> Iterator[dict[str, Any]]:
    for piece in content.reasoning:
        yield {"type": "thinking_delta", "thinking": piece}
    yield {"type": "signature_delta", "signature": _signature()}


def event(value: dict[str, Any]) -> bytes:
    """One event of a stream, with spaces before its last brace, as many as its length happens to give."""
    data = msgspec.json.encode(value)
    return b"event: %b\ndata: %b%b}\n\n" % (value["type"].encode(), data[:-1], b" " * (len(data) % 16))


def _error_event(message: str, code: str | None) -> bytes:
    return event({"type": "error", "error": {"details": None, "type": _type(500, code), "message": message}})


def error(problem: Problem) -> Unary:
    """The envelope. An account without money is a 402 here."""
    status = 402 if problem.code == "insufficient_quota" else problem.status
    inner = {"type": _type(status, problem.code or problem.type), "message": problem.message}
    body = {"type": "error", "error": inner, "request_id": "req_011C" + letters(20)}
    retried = "true" if status in (408, 409, 429) or status >= 500 else "false"
    return Unary(
        status, [*headers(None, False), ("x-should-retry", retried), *problem.headers], msgspec.json.encode(body)
    )


def _type(status: int, asked: str | None) -> str:
    """The type that was asked for where it is one of the vendor's, otherwise that of the status.

    `invalid_request_error` is not asked for: it is what a problem has that says nothing.
    """
    if asked != _TYPES[400] and asked in _TYPES.values():
        return asked
    return _TYPES.get(status, _TYPES[400] if 400 <= status < 500 else "api_error")


def headers(quota: Quota | None, streamed: bool) -> Headers:
    """`anthropic-ratelimit-*` are figures of the running minute, with the time of the reset in RFC 3339."""
    named = [("content-type", "text/event-stream; charset=utf-8" if streamed else "application/json")]
    if streamed:
        named.append(("cache-control", "no-cache"))
    if quota is not None:
        reset = f"{datetime.now(UTC) + timedelta(minutes=1):%Y-%m-%dT%H:%M:00Z}"
        figures = {
            "requests": (quota.requests_limit, quota.requests_used),
            "tokens": (quota.tokens_limit, quota.tokens_used),
            "input-tokens": (quota.tokens_limit, quota.tokens_used),
            "output-tokens": (quota.tokens_limit, quota.tokens_used),
        }
        for name, (limit, used) in figures.items():
            named.append((f"anthropic-ratelimit-{name}-limit", str(limit)))
            named.append((f"anthropic-ratelimit-{name}-remaining", str(max(0, limit - used))))
            named.append((f"anthropic-ratelimit-{name}-reset", reset))
    return [
        *named,
        ("request-id", "req_011C" + letters(20)),
        ("strict-transport-security", "max-age=31536000; includeSubDomains; preload"),
        ("anthropic-organization-id", "simulated-organization"),
        ("server", "cloudflare"),
        ("cf-cache-status", "DYNAMIC"),
        ("x-robots-tag", "none"),
        ("cf-ray", hexadecimal(16) + "-SIM"),
    ]


def _json(value: Any, quota: Quota) -> Unary:
    return Unary(200, headers(quota, False), msgspec.json.encode(value))


ANTHROPIC = Shape(answer=_answer, model=_model_of, authorize=_authorize, error=error)
