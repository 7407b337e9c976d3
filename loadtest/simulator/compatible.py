"""Vendors of OpenAI's shape with habits of their own, as recorded: DeepSeek, Groq, Mistral, Ollama, xAI.

They differ in where reasoning and usage stand in an answer, in the form of errors, and in what they refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from loadtest.simulator import openai
from loadtest.simulator.chat import DONE, created, shape, sse
from loadtest.simulator.content import Ask, Choice, Content
from loadtest.simulator.http import Headers
from loadtest.simulator.identity import hexadecimal, letters
from loadtest.simulator.shape import Problem, Quota, Shape, Unary


class Habits(Struct, frozen=True):
    """How one vendor writes an answer."""

    reasoning: Callable[[str], dict[str, Any]]
    """The members of a delta or message that carry reasoning."""
    usage_with_finish: bool
    """Whether a stream's usage stands, unasked, in the chunk that ends it; else in one of its own, if asked for."""
    request_id_header: str = "x-request-id"
    refused: frozenset[str] = frozenset()
    error: Callable[[Problem], bytes] | None = None
    """Where errors are not in OpenAI's envelope."""
    error_event: Callable[[str, str | None], bytes] = openai.error_event
    extra: Callable[[], dict[str, Any]] = dict
    """Members of an answer that no other vendor has."""
    refusal: str = "content"
    """The member that a refusal stands in: where there is none for it, it is a text like any other."""


def _shape(habits: Habits, bad_key: Problem) -> Shape:
    dialect = replace(
        openai.DIALECT,
        known=lambda model: True,
        refused=partial(_refused, habits),
        unary=partial(_unary, habits),
        events=lambda ask, content: (_events(habits, ask, content), habits.error_event),
        error=partial(_error, habits),
        headers=partial(_headers, habits),
        models=list,
        bad_key=bad_key,
        no_key=bad_key,
        pretty=False,
        vendor="compatible",
    )
    return shape(dialect)


def _refused(habits: Habits, ask: Ask) -> Problem | None:
    for name in sorted(habits.refused):
        if getattr(ask, name, None) is not None:
            return Problem(422, f"`{name}` is not supported.", param=name)
    return None


def _usage(content: Content) -> dict[str, Any]:
    usage = {
        "prompt_tokens": content.prompt_tokens,
        "completion_tokens": content.completion_tokens,
        "total_tokens": content.prompt_tokens + content.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": content.cached_tokens},
    }
    if content.reasoning_tokens:
        usage["completion_tokens_details"] = {"reasoning_tokens": content.reasoning_tokens}
    return usage


def _calls(choice: Choice) -> list[dict[str, Any]]:
    """Whole calls: none of these vendors streams arguments in fragments."""
    return [
        {
            "id": letters(9),
            "type": "function",
            "function": {"name": call.name, "arguments": "".join(call.fragments)},
            "index": place,
        }
        for place, call in enumerate(choice.calls)
    ]


def _unary(habits: Habits, ask: Ask, content: Content) -> dict[str, Any]:
    choices = []
    for index, choice in enumerate(content.choices):
        message: dict[str, Any] = {"role": "assistant", "content": "".join(choice.pieces)}
        if choice.refusal:
            message[habits.refusal] = "".join(choice.refusal)
        if content.reasoning:
            message = _joined(message, habits.reasoning("".join(content.reasoning)))
        if choice.calls:
            message["tool_calls"] = _calls(choice)
        scored = {"logprobs": openai.logprobs(ask, choice.pieces)} if ask.logprobs else {}
        choices.append({"index": index, "message": message, "finish_reason": choice.finish_reason, **scored})
    base = {"id": hexadecimal(32), "object": "chat.completion", "created": created(), "model": ask.model}
    return base | {"choices": choices, "usage": _usage(content)} | habits.extra()


def _joined(message: dict[str, Any], reasoning: dict[str, Any]) -> dict[str, Any]:
    """Reasoning that is itself content (Mistral) stands before the text in one list."""
    if isinstance(reasoning.get("content"), list):
        text = {"type": "text", "text": message["content"]}
        return message | {"content": [*reasoning["content"], *([text] if message["content"] else [])]}
    return message | {name: value for name, value in reasoning.items() if name != "content"}


def _events(habits: Habits, ask: Ask, content: Content) -> Iterator[bytes]:
    base = {"id": hexadecimal(32), "object": "chat.completion.chunk", "created": created(), "model": ask.model}

    def event(index: int, delta: dict[str, Any], finish: str | None = None, **last: Any) -> bytes:
        part = {"index": index, "delta": delta, "finish_reason": finish}
        if ask.logprobs and delta.keys() == {"content"} and not finish:
            part["logprobs"] = openai.logprobs(ask, [delta["content"]])
        return sse(base | {"choices": [part]} | last)

    for index, choice in enumerate(content.choices):
        yield event(index, {"role": "assistant", "content": ""})
        for piece in content.reasoning:
            yield event(index, habits.reasoning(piece))
        for piece in choice.pieces:
            yield event(index, {"content": piece})
        for piece in choice.refusal:
            yield event(index, {habits.refusal: piece})
        if choice.calls:
            yield event(index, {"tool_calls": _calls(choice)})
        ends = habits.usage_with_finish and index == len(content.choices) - 1
        last = {"usage": _usage(content)} | habits.extra() if ends else {}
        yield event(index, {"content": ""}, choice.finish_reason, **last)
    if not habits.usage_with_finish and ask.include_usage:
        yield sse(base | {"choices": [], "usage": _usage(content)})
    yield DONE


def _error(habits: Habits, problem: Problem) -> Unary:
    body = openai.error(problem).body if habits.error is None else habits.error(problem)
    return Unary(status=problem.status, headers=[*_headers(habits, "", None, False), *problem.headers], body=body)


def _headers(habits: Habits, model: str, quota: Quota | None, streamed: bool) -> Headers:
    return [
        ("content-type", "text/event-stream" if streamed else "application/json"),
        (habits.request_id_header, hexadecimal(32)),
        ("x-content-type-options", "nosniff"),
    ]


def _mistral_error(problem: Problem) -> bytes:
    if problem.status == 401:
        return msgspec.json.encode({"detail": problem.message})
    if problem.status == 422:
        refused = {"type": "extra_forbidden", "loc": ["body", problem.param], "msg": "Extra inputs are not permitted"}
        return msgspec.json.encode({"detail": [refused]})
    members = {"message": problem.message, "type": problem.type, "param": problem.param, "code": problem.code}
    return msgspec.json.encode({"object": "error"} | members)


def _xai_error(problem: Problem) -> bytes:
    return msgspec.json.encode({"code": problem.code or "invalid-argument", "error": problem.message})


def _groq_event(message: str, code: str | None) -> bytes:
    inner = {"message": message, "type": "server_error", "code": code, "status_code": 500}
    return b"event: error\n" + sse({"error": inner})


MISTRAL = _shape(
    Habits(
        reasoning=lambda piece: {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": piece}]}]},
        usage_with_finish=True,
        request_id_header="mistral-correlation-id",
        refused=frozenset(
            {"stream_options", "max_completion_tokens", "seed", "logprobs", "top_logprobs", "service_tier"}
        ),
        error=_mistral_error,
    ),
    Problem(401, "Invalid API Key"),
)
GROQ = _shape(
    Habits(
        reasoning=lambda piece: {"reasoning": piece, "channel": "analysis"},
        usage_with_finish=True,
        error_event=_groq_event,
        extra=lambda: {"x_groq": {"id": "req_" + hexadecimal(26)}},
    ),
    Problem(401, "Invalid API Key", code="invalid_api_key"),
)
DEEPSEEK = _shape(
    Habits(reasoning=lambda piece: {"content": None, "reasoning_content": piece}, usage_with_finish=True),
    Problem(401, "Authentication Fails, your api key is invalid.", type="authentication_error"),
)
OLLAMA = _shape(
    Habits(reasoning=lambda piece: {"content": "", "reasoning": piece}, usage_with_finish=False),
    Problem(401, "unauthorized"),
)
XAI = _shape(
    Habits(
        reasoning=lambda piece: {"reasoning_content": piece},
        usage_with_finish=False,
        error=_xai_error,
        refusal="refusal",
    ),
    Problem(400, "Incorrect API key provided. You can obtain an API key from the console."),
)
SHAPES = {"deepseek": DEEPSEEK, "groq": GROQ, "mistral": MISTRAL, "ollama": OLLAMA, "xai": XAI}
