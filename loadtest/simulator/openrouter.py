"""OpenRouter's shape: OpenAI's with a provider, native finish reasons, costs, comments in streams and usage unasked.

Streams and errors are written as recorded; a unary answer follows the vendor's documentation
(https://openrouter.ai/docs/api-reference/overview), as do usage sent without being asked for and the 400 for an
unknown model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec

from loadtest.simulator import openai
from loadtest.simulator.chat import DONE, Dialect, created, shape, sse
from loadtest.simulator.content import Ask, Choice, Content
from loadtest.simulator.http import Headers
from loadtest.simulator.identity import hexadecimal, letters
from loadtest.simulator.shape import Problem, Quota, Unary

_MODEL = re.compile(r"~?[a-z0-9-]+/[a-z0-9._-]+(:[a-z]+)?")
_NATIVE_REASONS = {
    # Finish reasons of the model's own vendor, where they differ from OpenAI's.
    "anthropic": {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"},
    "google": {"stop": "STOP", "tool_calls": "STOP", "length": "MAX_TOKENS"},
}
_PROMPT_USD, _COMPLETION_USD = 1e-6, 5e-6  # a token; our own figures


def known(model: str) -> bool:
    """Any `author/model` but OpenAI's and those of nobody: `openai/…` must be a model of OpenAI's."""
    if not _MODEL.fullmatch(model):
        return False
    author, _, name = model.partition("/")
    return openai.known(name.partition(":")[0]) if author == "openai" else True


def unknown_model(model: str) -> Problem:
    return Problem(400, f"There is no model {model}.")


def unary(ask: Ask, content: Content) -> dict[str, Any]:
    return {
        "id": _id(),
        "object": "chat.completion",
        "created": created(),
        "model": ask.model,
        "provider": _provider(ask.model),
        "system_fingerprint": None,
        "choices": [_whole_choice(ask, index, choice, content) for index, choice in enumerate(content.choices)],
        "usage": usage(content),
    }


def usage(content: Content) -> dict[str, Any]:
    prompt_usd = round(content.prompt_tokens * _PROMPT_USD, 9)
    completion_usd = round(content.completion_tokens * _COMPLETION_USD, 9)
    cost_usd = round(prompt_usd + completion_usd, 9)
    return {
        "prompt_tokens": content.prompt_tokens,
        "completion_tokens": content.completion_tokens,
        "total_tokens": content.prompt_tokens + content.completion_tokens,
        "cost": cost_usd,
        "is_byok": False,
        "prompt_tokens_details": {
            "cached_tokens": content.cached_tokens,
            "cache_write_tokens": 0,
            "audio_tokens": 0,
            "video_tokens": 0,
        },
        "cost_details": {
            "upstream_inference_cost": cost_usd,
            "upstream_inference_prompt_cost": prompt_usd,
            "upstream_inference_completions_cost": completion_usd,
        },
        "completion_tokens_details": {
            "reasoning_tokens": content.reasoning_tokens,
            "image_tokens": 0,
            "audio_tokens": 0,
        },
    }


def events(ask: Ask, content: Content) -> tuple[Iterator[bytes], Callable[[str, str | None], bytes]]:
    base = {
        "id": _id(),
        "object": "chat.completion.chunk",
        "created": created(),
        "model": ask.model,
        "provider": _provider(ask.model),
    }
    return _events(base, ask, content), partial(_error_event, base, content)


def error(problem: Problem) -> Unary:
    """`code` is the HTTP status; what a model's own vendor said stands in `metadata`."""
    inner: dict[str, Any] = {"message": problem.message, "code": problem.status}
    if problem.status == 429 or problem.status >= 500:
        inner["metadata"] = {"raw": problem.message, "provider_name": "OpenAI"}
    body: dict[str, Any] = {"error": inner}
    if problem.status != 401:
        body["user_id"] = "user_simulated"
    return Unary(
        status=problem.status,
        headers=[*headers("", None, False), *problem.headers],
        body=msgspec.json.encode(body),
    )


def headers(model: str, quota: Quota | None, streamed: bool) -> Headers:
    return [
        ("content-type", "text/event-stream" if streamed else "application/json"),
        ("access-control-allow-origin", "*"),
        *([("cache-control", "no-cache")] if streamed else []),
        ("x-generation-id", _id()),
        ("access-control-expose-headers", "X-Generation-Id,X-Provider-Name,cf-ray"),
        ("set-cookie", "__cf_bm=simulated; path=/; HttpOnly; Secure; SameSite=None"),
        ("referrer-policy", "no-referrer, strict-origin-when-cross-origin"),
        ("x-content-type-options", "nosniff"),
        ("server", "cloudflare"),
        ("cf-ray", hexadecimal(16) + "-SIM"),
    ]


def models() -> list[dict[str, Any]]:
    return [
        {"id": "openai/" + model["id"], "name": model["id"], "created": model["created"]} for model in openai.models()
    ]


def _id() -> str:
    return f"gen-{created()}-{letters(20)}"


def _provider(model: str) -> str:
    return {"openai": "OpenAI", "anthropic": "Anthropic", "google": "Google"}.get(model.partition("/")[0], "Simulated")


def _native(ask: Ask, finish_reason: str) -> str:
    return _NATIVE_REASONS.get(ask.model.partition("/")[0], {}).get(finish_reason, finish_reason)


def _whole_choice(ask: Ask, index: int, choice: Choice, content: Content) -> dict[str, Any]:
    message = openai.whole_message(choice)
    del message["annotations"]
    message["reasoning"] = "".join(content.reasoning) or None
    if content.reasoning:
        message["reasoning_details"] = _reasoning_delta("".join(content.reasoning))["reasoning_details"]
    return {
        "index": index,
        "logprobs": openai.logprobs(ask, choice.pieces),
        "finish_reason": choice.finish_reason,
        "native_finish_reason": _native(ask, choice.finish_reason),
        "message": message,
    }


def _events(base: dict[str, Any], ask: Ask, content: Content) -> Iterator[bytes]:
    def event(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        return sse(base | {"choices": [_part(ask, index, delta, finish_reason)]})

    for index, choice in enumerate(content.choices):
        for piece in content.reasoning:
            yield event(index, _reasoning_delta(piece))
        for piece in choice.pieces:
            yield event(index, {"content": piece, "role": "assistant"})
        for piece in choice.refusal:
            yield event(index, {"content": "", "role": "assistant", "refusal": piece})
        for place, call in enumerate(choice.calls):
            start = {
                "index": place,
                "id": "call_" + letters(24),
                "type": "function",
                "function": {"name": call.name, "arguments": ""},
            }
            yield event(index, {"content": None, "role": "assistant", "tool_calls": [start]})
            for fragment in call.fragments:
                part = {"index": place, "function": {"arguments": fragment}}
                yield event(index, {"content": None, "role": "assistant", "tool_calls": [part]})
        closing: dict[str, Any] = {"content": "", "role": "assistant"}
        yield event(index, closing | ({"reasoning": None} if choice.calls else {}), choice.finish_reason)
    # The usage chunk has choices, and repeats the finish reason.
    last = len(content.choices) - 1
    closing_part = _part(ask, last, {"content": "", "role": "assistant"}, content.choices[last].finish_reason)
    yield sse(base | {"service_tier": None, "choices": [closing_part], "usage": usage(content)})
    yield DONE


def _reasoning_delta(piece: str) -> dict[str, Any]:
    detail = {"type": "reasoning.text", "text": piece, "format": "unknown", "index": 0}
    return {"content": "", "role": "assistant", "reasoning": piece, "reasoning_details": [detail]}


def _part(ask: Ask, index: int, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    scored = {"logprobs": openai.logprobs(ask, [delta["content"]])} if ask.logprobs and delta.get("content") else {}
    return {
        "index": index,
        "delta": delta,
        "finish_reason": finish_reason,
        "native_finish_reason": None if finish_reason is None else _native(ask, finish_reason),
        **scored,
    }


def _error_event(base: dict[str, Any], content: Content, message: str, code: str | None) -> bytes:
    """A chunk with an `error` beside its choices, then the usage and the end of the stream as if all were well."""
    part = {
        "index": 0,
        "delta": {"role": "assistant", "content": ""},
        "finish_reason": None,
        "native_finish_reason": None,
        "logprobs": None,
    }
    chunk = {
        "id": base["id"],
        "provider": base["provider"],
        "error": {"code": int(code) if code and code.isdecimal() else 502, "message": message},
        "model": base["model"],
        "object": base["object"],
        "created": base["created"],
        "choices": [part],
        "usage": usage(content),
    }
    return sse(chunk) + DONE


OPENROUTER = shape(
    Dialect(
        known=known,
        unknown_model=unknown_model,
        refused=lambda ask: None,
        unary=unary,
        events=events,
        error=error,
        headers=headers,
        models=models,
        bad_key=Problem(401, "This API key is not one of ours."),
        no_key=Problem(401, "There is no API key in this request."),
        comment=b": OPENROUTER PROCESSING\n\n",
        vendor="openrouter",
    )
)
