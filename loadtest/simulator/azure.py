"""Azure OpenAI's shape: OpenAI's answers under deployments, members in alphabetical order, content filters beside them.

    POST /azure/openai/deployments/{deployment}/chat/completions?api-version=2024-10-21
    POST /azure/openai/deployments/{deployment}/embeddings?api-version=2024-10-21
    POST /azure/openai/responses?api-version=2025-04-01-preview              (the body's model is the deployment)
    POST /azure/openai/v1/chat/completions, /azure/openai/v1/embeddings      (here too)

A deployment is named as the model it serves. The key comes as `api-key`. A prompt that contains `filtered=1` gets what
the filter leaves of an answer: a choice without a message, or a stream whose last choice has no delta.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from msgspec.structs import replace

from loadtest.simulator import chat, openai
from loadtest.simulator.chat import DONE
from loadtest.simulator.content import Ask, Content
from loadtest.simulator.http import Headers, Request
from loadtest.simulator.identity import guid
from loadtest.simulator.shape import Problem, Quota, Shape, Stream, Unary

_ROUTES = (
    "chat/completions|embeddings|completions|audio/speech|audio/transcriptions|audio/translations|"
    "images/generations|images/edits"
)
_DEPLOYMENT = re.compile(rf"/openai/deployments/([^/]+)(/(?:{_ROUTES}))")
_VERSIONLESS = re.compile(rf"/openai(/v1/(?:{_ROUTES}|responses(?:/.+)?))")
_sorted = msgspec.json.Encoder(order="sorted").encode
_CATEGORIES = ("hate", "self_harm", "sexual", "violence")
_SAFE = {category: {"filtered": False, "severity": "safe"} for category in _CATEGORIES}
_FILTERED = _SAFE | {"violence": {"filtered": True, "severity": "high"}}
_PROMPT_FILTERED = [
    {"prompt_index": 0, "content_filter_results": _SAFE | {"jailbreak": {"detected": False, "filtered": False}}}
]
_LATENCY = dict.fromkeys(
    (
        "engine_tbt_ms", "engine_ttft_ms", "engine_ttlt_ms", "pre_inference_ms", "service_tbt_ms", "service_ttft_ms",
        "service_ttlt_ms", "total_duration_ms", "user_visible_ttft_ms",
    ),
    10,
)  # fmt: skip


def unary(ask: Ask, content: Content) -> dict[str, Any]:
    answer = openai.unary(ask, content)
    del answer["service_tier"]
    for choice in answer["choices"]:
        choice |= {"content_filter_results": _SAFE, "logprobs": choice.get("logprobs")}
        if _is_filtered(ask):
            del choice["message"]
            choice |= {"content_filter_results": _FILTERED, "finish_reason": "content_filter"}
    return msgspec.json.decode(_sorted(answer | {"prompt_filter_results": _PROMPT_FILTERED}))


def events(ask: Ask, content: Content) -> tuple[Iterator[bytes], Callable[[str, str | None], bytes]]:
    return _events(ask, openai.events(ask, content)[0]), openai.error_event


def _events(ask: Ask, written: Iterator[bytes]) -> Iterator[bytes]:
    opening = {"choices": [], "created": 0, "id": "", "model": "", "object": ""}
    yield _event(opening | {"prompt_filter_results": _PROMPT_FILTERED})
    for one in written:
        if one == DONE:
            yield one
            return
        chunk = msgspec.json.decode(one[6:])
        for choice in chunk["choices"]:
            spoken = choice["delta"].get("content") or choice["delta"].get("tool_calls")
            choice |= {"content_filter_results": _SAFE if spoken else {}, "logprobs": choice.get("logprobs")}
            if choice["finish_reason"] and _is_filtered(ask):
                del choice["delta"]
                choice |= {"content_filter_results": _FILTERED, "finish_reason": "content_filter"}
        if not chunk["choices"]:
            chunk["latency_checkpoint"] = _LATENCY
        yield _event(chunk)


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + _sorted(chunk) + b"\n\n"


def _is_filtered(ask: Ask) -> bool:
    return "filtered=1" in str(ask.messages[-1].content)


def error(problem: Problem) -> Unary:
    """`type` and `param` stand only in what the model itself refused; the service's own errors have a code."""
    code = problem.code
    if problem.status == 429 and code == "rate_limit_exceeded":
        code = "RateLimitReached"
    inner: dict[str, Any] = {"code": code or str(problem.status), "message": problem.message}
    if problem.status == 429:
        inner["details"] = problem.message
    elif problem.status == 400:
        inner |= {"param": problem.param, "type": problem.type}
    return Unary(
        status=problem.status,
        headers=[*headers("", None, False), *problem.headers],
        body=msgspec.json.encode({"error": inner}),
    )


def headers(model: str, quota: Quota | None, streamed: bool) -> Headers:
    named = [
        ("content-type", "text/event-stream; charset=utf-8" if streamed else "application/json"),
        ("strict-transport-security", "max-age=31536000; includeSubDomains; preload"),
        ("apim-request-id", guid()),
        ("x-content-type-options", "nosniff"),
        ("x-ms-region", "Simulated"),
    ]
    if quota is not None:
        named += [
            ("x-ms-deployment-name", model),
            ("x-ratelimit-limit-requests", str(quota.requests_limit)),
            ("x-ratelimit-limit-tokens", str(quota.tokens_limit)),
            ("x-ratelimit-remaining-requests", str(max(0, quota.requests_limit - quota.requests_used))),
            ("x-ratelimit-remaining-tokens", str(max(0, quota.tokens_limit - quota.tokens_used))),
            ("x-request-id", guid()),
        ]
    return named


def _unknown(model: str) -> Problem:
    message = "The API deployment for this resource does not exist."
    return Problem(404, message, code="DeploymentNotFound")


DIALECT = replace(
    openai.DIALECT,
    unknown_model=_unknown,
    unary=unary,
    events=events,
    error=error,
    headers=headers,
    bad_key=Problem(401, "Access denied due to invalid subscription key or wrong API endpoint.", code="401"),
    no_key=Problem(401, "Access denied due to missing subscription key.", code="401"),
    pretty=False,
    vendor="azure",
)
_OPENAI = chat.shape(DIALECT)


def _named(request: Request) -> Request | None:
    """The request as OpenAI would get it; None for a path that there is not."""
    if match := _VERSIONLESS.fullmatch(request.path):
        return replace(request, path=match[1])
    if request.path.startswith("/openai/responses") and "api-version" in request.query:
        return replace(request, path="/v1" + request.path.removeprefix("/openai"))
    match = _DEPLOYMENT.fullmatch(request.path)
    if match is None or "api-version" not in request.query:
        return None
    try:
        body = msgspec.json.decode(request.body, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:  # a form, or none
        return replace(request, path="/v1" + match[2])
    return replace(request, path="/v1" + match[2], body=msgspec.json.encode(body | {"model": match[1]}))


def _answer(request: Request, quota: Quota) -> Unary | Stream:
    named = _named(request)
    return error(Problem(404, "Resource not found", code="404")) if named is None else _OPENAI.answer(named, quota)


def _model(request: Request) -> str:
    named = _named(request)
    return "" if named is None else _OPENAI.model(named)


def _authorize(request: Request, key: str | None) -> Problem | None:
    given = request.headers.get("api-key")
    bearer = {"authorization": f"Bearer {given}"} if given else {}
    return _OPENAI.authorize(replace(request, headers=bearer), key)


AZURE = Shape(answer=_answer, model=_model, authorize=_authorize, error=error)
