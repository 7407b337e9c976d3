"""OpenAI's shape: chat completions, embeddings, models, errors and headers as the vendor writes them.

Two model families differ: gpt-3.5 and gpt-4 (all kinds) send `logprobs` and a fingerprint, gpt-5 and the o-series
leave `logprobs` out, send a null fingerprint, and refuse `max_tokens`.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from loadtest.simulator.chat import DONE, Dialect, created, shape, sse
from loadtest.simulator.content import Ask, Choice, Content
from loadtest.simulator.http import Headers
from loadtest.simulator.identity import hexadecimal, letters
from loadtest.simulator.shape import Problem, Quota, Unary

SNAPSHOTS = {
    # What a floating name answers as, from the vendor's model list; a name that is not here answers as itself.
    "gpt-3.5-turbo": "gpt-3.5-turbo-0125",
    "gpt-4": "gpt-4-0613",
    "gpt-4-turbo": "gpt-4-turbo-2024-04-09",
    "gpt-4o": "gpt-4o-2024-08-06",
    "gpt-4o-mini": "gpt-4o-mini-2024-07-18",
    "gpt-4.1": "gpt-4.1-2025-04-14",
    "gpt-4.1-mini": "gpt-4.1-mini-2025-04-14",
    "gpt-4.1-nano": "gpt-4.1-nano-2025-04-14",
    "gpt-5": "gpt-5-2025-08-07",
    "gpt-5-mini": "gpt-5-mini-2025-08-07",
    "gpt-5-nano": "gpt-5-nano-2025-08-07",
    "o3": "o3-2025-04-16",
    "o3-mini": "o3-mini-2025-01-31",
    "o4-mini": "o4-mini-2025-04-16",
}
EMBEDDING_MODELS = ("text-embedding-3-small", "text-embedding-3-large", "text-embedding-ada-002")

_KNOWN = re.compile(
    r"(whisper|tts|dall-e|gpt-image|omni-moderation|gpt-3\.5-turbo|gpt-4|gpt-4o|gpt-4\.1|gpt-5(\.\d)?|o[134]|chatgpt-4o)(-[a-z0-9-]+)?"
)
_REASONS = re.compile(r"gpt-5|o\d")
_PADDING = letters(64)
_MODELS_CREATED = 1_721_172_717


def reasons(model: str) -> bool:
    """Whether the model belongs to the reasoning families."""
    return _REASONS.match(model) is not None


def known(model: str) -> bool:
    """A name that OpenAI has, or might have for what it is: any snapshot of a family counts."""
    return model in EMBEDDING_MODELS or _KNOWN.fullmatch(model) is not None


def snapshot(model: str) -> str:
    """What a floating name answers as."""
    return SNAPSHOTS.get(model, model)


def unknown_model(model: str) -> Problem:
    return Problem(404, f"There is no model `{model}`, or not for you.", code="model_not_found")


def refused(ask: Ask) -> Problem | None:
    """Parameters that the model does not take."""
    if ask.max_tokens is not None and reasons(ask.model):
        return Problem(
            400,
            "Unsupported parameter: this model takes 'max_completion_tokens', not 'max_tokens'.",
            param="max_tokens",
            code="unsupported_parameter",
        )
    if ask.web_search_options is not None and "search" not in ask.model:
        return Problem(400, "This model does not search the web.", param="web_search_options")
    return None


def unary(ask: Ask, content: Content) -> dict[str, Any]:
    return {
        "id": "chatcmpl-" + letters(29),
        "object": "chat.completion",
        "created": created(),
        "model": snapshot(ask.model),
        "choices": [_whole_choice(ask, index, choice) for index, choice in enumerate(content.choices)],
        "usage": usage(ask, content),
        "service_tier": _tier(ask),
        "system_fingerprint": _fingerprint(ask.model),
    }


def usage(ask: Ask, content: Content) -> dict[str, Any]:
    prompt_details = {"cached_tokens": content.cached_tokens, "audio_tokens": 0}
    if ask.prompt_cache_options is not None:
        prompt_details["cache_write_tokens"] = 0
    return {
        "prompt_tokens": content.prompt_tokens,
        "completion_tokens": content.completion_tokens,
        "total_tokens": content.prompt_tokens + content.completion_tokens,
        "prompt_tokens_details": prompt_details,
        "completion_tokens_details": {
            "reasoning_tokens": content.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def events(ask: Ask, content: Content) -> tuple[Iterator[bytes], Callable[[str, str | None], bytes]]:
    return _events(ask, content), error_event


def error_event(message: str, code: str | None) -> bytes:
    return sse({"error": {"message": message, "type": "server_error", "param": None, "code": code}})


def error(problem: Problem) -> Unary:
    body = {
        "error": {
            "message": problem.message,
            "type": problem.type,
            "param": problem.param,
            "code": problem.code,
        }
    }
    named = headers("", None, False)
    if problem.status == 404:
        named[0] = ("content-type", "application/json; charset=utf-8")  # only there
    return Unary(
        status=problem.status,
        headers=[*named, *problem.headers],
        body=msgspec.json.format(msgspec.json.encode(body)),
    )


def headers(model: str, quota: Quota | None, streamed: bool) -> Headers:
    """The vendor's headers, with what a proxy must not pass on: cookie, `alt-svc`, the account's names."""
    named = [
        ("content-type", "text/event-stream; charset=utf-8" if streamed else "application/json"),
        ("access-control-expose-headers", "X-Request-ID"),
        ("openai-organization", "simulated-organization"),
        ("openai-processing-ms", "7"),
        ("openai-project", "proj_simulated"),
        ("openai-version", "2020-10-01"),
    ]
    if model.startswith("text-embedding"):
        named.append(("openai-model", model))
    if quota is not None:
        named += ratelimit_headers(quota)
    named += [
        ("x-request-id", "req_" + hexadecimal(32)),
        ("cf-cache-status", "DYNAMIC"),
        ("set-cookie", "__cf_bm=simulated; path=/; HttpOnly; Secure; SameSite=None"),
        ("strict-transport-security", "max-age=31536000; includeSubDomains; preload"),
        ("x-content-type-options", "nosniff"),
        ("server", "cloudflare"),
        ("cf-ray", hexadecimal(16) + "-SIM"),
        ("alt-svc", 'h3=":443"; ma=86400'),
    ]
    return named


def ratelimit_headers(quota: Quota) -> Headers:
    """`x-ratelimit-*`, figures of the running minute."""
    return [
        ("x-ratelimit-limit-requests", str(quota.requests_limit)),
        ("x-ratelimit-limit-tokens", str(quota.tokens_limit)),
        ("x-ratelimit-remaining-requests", str(max(0, quota.requests_limit - quota.requests_used))),
        ("x-ratelimit-remaining-tokens", str(max(0, quota.tokens_limit - quota.tokens_used))),
        ("x-ratelimit-reset-requests", duration(60 * quota.requests_used / quota.requests_limit)),
        ("x-ratelimit-reset-tokens", duration(60 * quota.tokens_used / quota.tokens_limit)),
    ]


def duration(seconds: float) -> str:
    """A duration as OpenAI writes it: `12ms`, `8.64s`, `1m6.779s`."""
    if seconds < 1:
        milliseconds = round(seconds * 1000)
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(round(seconds, 3), 60)
    return f"{int(minutes)}m{rest:.3g}s" if minutes else f"{rest:g}s"


def models() -> list[dict[str, Any]]:
    names = sorted({*SNAPSHOTS, *SNAPSHOTS.values(), *EMBEDDING_MODELS})
    return [{"id": name, "object": "model", "created": _MODELS_CREATED, "owned_by": "system"} for name in names]


def whole_message(choice: Choice) -> dict[str, Any]:
    """The message of a unary answer."""
    unsaid = not choice.pieces and (choice.calls or choice.refusal)
    message: dict[str, Any] = {"role": "assistant", "content": None if unsaid else "".join(choice.pieces)}
    if choice.calls:
        message["tool_calls"] = [
            {
                "id": "call_" + letters(24),
                "type": "function",
                "function": {"name": call.name, "arguments": "".join(call.fragments)},
            }
            for call in choice.calls
        ]
    message["refusal"] = "".join(choice.refusal) or None
    message["annotations"] = []
    return message


def _whole_choice(ask: Ask, index: int, choice: Choice) -> dict[str, Any]:
    whole: dict[str, Any] = {"index": index, "message": whole_message(choice)}
    if not reasons(ask.model):
        whole["logprobs"] = None if choice.calls else logprobs(ask, choice.pieces, choice.refusal)
    whole["finish_reason"] = choice.finish_reason
    return whole


def _events(ask: Ask, content: Content) -> Iterator[bytes]:
    base = {
        "id": "chatcmpl-" + letters(29),
        "object": "chat.completion.chunk",
        "created": created(),
        "model": snapshot(ask.model),
        "service_tier": _tier(ask),
        "system_fingerprint": _fingerprint(ask.model),
    }
    obfuscated = ask.stream_options is None or ask.stream_options.include_obfuscation is not False
    # Parallel tool calls come with `usage` before `choices`, everything else after it.
    parallel = any(len(choice.calls) > 1 for choice in content.choices)
    usage_member = {"usage": None} if ask.include_usage else {}

    def event(choices: list[dict[str, Any]], text: str, usage_first: bool = False, **last: Any) -> bytes:
        chunk = base | (usage_member if usage_first else {}) | {"choices": choices}
        chunk |= usage_member | last
        if obfuscated:
            chunk["obfuscation"] = _PADDING[len(text) % 16 : 16]
        return sse(chunk)

    deltas = [_deltas(choice) for choice in content.choices]
    for index, delta, text in _interleaved(deltas):
        yield event([_part(ask, index, delta, text, None)], text, usage_first=parallel)
    for index, choice in enumerate(content.choices):
        yield event([_part(ask, index, {}, "", choice.finish_reason)], "")
    if ask.include_usage:
        yield event([], "", usage=usage(ask, content))
    yield DONE


def _interleaved(
    deltas: list[Iterator[tuple[dict[str, Any], str]]],
) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Deltas of all choices in turn: each choice opens with two, then one each a round."""
    open_choices = list(enumerate(deltas))
    for round_number in range(1_000_000_000):
        for index, source in list(open_choices):
            for _ in range(2 if round_number == 0 else 1):
                step = next(source, None)
                if step is None:
                    open_choices.remove((index, source))
                    break
                yield index, *step
        if not open_choices:
            return


def _deltas(choice: Choice) -> Iterator[tuple[dict[str, Any], str]]:
    """The deltas of one choice, each with the text that it adds."""
    if choice.refusal:
        yield {"role": "assistant", "content": None, "refusal": ""}, ""
        for piece in choice.refusal:
            yield {"refusal": piece}, piece
        return
    if choice.pieces or not choice.calls:
        yield {"role": "assistant", "content": "", "refusal": None}, ""
        for piece in choice.pieces:
            yield {"content": piece}, piece
    opening: dict[str, Any] = {} if choice.pieces else {"role": "assistant", "content": None}
    if len(choice.calls) > 1 and opening:
        yield opening, ""
    for index, call in enumerate(choice.calls):
        start = {
            "index": index,
            "id": "call_" + letters(24),
            "type": "function",
            "function": {"name": call.name, "arguments": ""},
        }
        if len(choice.calls) > 1 or not opening:
            yield {"tool_calls": [start]}, ""
        else:
            yield opening | {"tool_calls": [start], "refusal": None}, ""
        for fragment in call.fragments:
            yield {"tool_calls": [{"index": index, "function": {"arguments": fragment}}]}, fragment


def _part(ask: Ask, index: int, delta: dict[str, Any], text: str, finish_reason: str | None) -> dict[str, Any]:
    part: dict[str, Any] = {"index": index, "delta": delta}
    if not reasons(ask.model):
        spoken = text and next((name for name in ("content", "refusal") if name in delta), None)
        part["logprobs"] = logprobs(ask, **{spoken: [text]}) if spoken else None
    part["finish_reason"] = finish_reason
    return part


def logprobs(ask: Ask, content: Iterable[str] = (), refusal: Iterable[str] = ()) -> dict[str, Any] | None:
    """Of these pieces, where they were asked for."""
    if not ask.logprobs:
        return None
    said = {"content": content, "refusal": refusal}
    return {name: [_logprob(piece, ask.top_logprobs or 0) for piece in pieces] or None for name, pieces in said.items()}


def _logprob(piece: str, alternatives: int) -> dict[str, Any]:
    score = -(zlib.crc32(piece.encode()) % 1000) / 10_000
    entry = {"token": piece, "logprob": score, "bytes": list(piece.encode())}
    others = [entry] + [{"token": f" {place}", "logprob": score - place, "bytes": [32, 48]} for place in range(1, 20)]
    return entry | {"top_logprobs": others[:alternatives]}


def _tier(ask: Ask) -> str:
    return "default" if ask.service_tier in (None, "auto") else ask.service_tier


def _fingerprint(model: str) -> str | None:
    # gpt-4 of 2023 has none either.
    return None if reasons(model) or model in ("gpt-4", "gpt-4-0613") else f"fp_{zlib.crc32(model.encode()):010x}"


DIALECT = Dialect(
    known=known,
    unknown_model=unknown_model,
    refused=refused,
    unary=unary,
    events=events,
    error=error,
    headers=headers,
    models=models,
    bad_key=Problem(
        401,
        "This API key is not one of ours.",
        code="invalid_api_key",
        headers=[("www-authenticate", 'Bearer realm="OpenAI API"')],
    ),
    no_key=Problem(
        401,
        "There is no API key in this request: send it as a bearer token.",
        headers=[("www-authenticate", 'Bearer realm="OpenAI API"')],
    ),
    snapshot=snapshot,
    logprob=lambda piece: _logprob(piece, 0),
    pretty=True,
)

OPENAI = shape(DIALECT)
