"""Gemini's shape, at both fronts: AI Studio under `/gemini`, Vertex AI under `/vertex`.

    POST /gemini/v1beta/models/{model}:generateContent | :streamGenerateContent?alt=sse | :batchEmbedContents
    POST /vertex/v1/projects/{p}/locations/{l}/publishers/google/models/{model}:generateContent | … | :predict
    POST /vertex/token       a service account's assertion for an access token, good for an hour

AI Studio's key comes as `x-goog-api-key`, Vertex's token as a bearer. Thoughts come where `includeThoughts` asks for
them, and with them every function call is signed; from Gemini 3 on the signature has to come back. The directive
`blocked=1` in a prompt has it blocked. Without `alt=sse` a stream would be one JSON array; nobody asks for that here.
Source: recorded answers of 2026; Gemini API and Vertex AI references for what a request may hold.
"""

from __future__ import annotations

import base64
import re
import time
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any
from urllib.parse import parse_qs

import msgspec

from loadtest.simulator.content import Ask, Choice, Content, Function, Message, Tool, content_of, text_tokens, vector_of
from loadtest.simulator.gemini_asks import Batch, GenerateAsk, Predict, Turn
from loadtest.simulator.http import Headers, Request
from loadtest.simulator.identity import letters
from loadtest.simulator.shape import Problem, Quota, Shape, Stream, Unary

WINDOW_TOKENS = 1_048_576
TOKEN_SECONDS = 3600
_ROUTE = re.compile(r"/(?:v1beta|v1/projects/[^/]+/locations/[^/]+/publishers/google)/models/([^/:]+):([A-Za-z]+)")
_KNOWN = re.compile(r"gemini-[a-z0-9.-]+")
_UNSIGNED = re.compile(r"gemini-[12]\.")
_STATUSES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_FINISH_REASONS = {"stop": "STOP", "length": "MAX_TOKENS", "tool_calls": "STOP"}
_UNSAFE = {"category": "HARM_CATEGORY_DANGEROUS_CONTENT", "probability": "HIGH", "blocked": True}


_generate = msgspec.json.Decoder(GenerateAsk)
_batch = msgspec.json.Decoder(Batch)
_predict = msgspec.json.Decoder(Predict)


def _model_of(request: Request) -> str:
    route = _ROUTE.fullmatch(request.path)
    return "" if route is None else route[1]


# --- signing in -------------------------------------------------------------------------------------------------------


def _key_problem(request: Request, key: str | None) -> Problem | None:
    given = request.headers.get("x-goog-api-key", "").strip()
    if not given or given.startswith("bad-") or (key is not None and given != key):
        return Problem(400, "API key not valid. Please pass a valid API key.", code="API_KEY_INVALID")
    return None


def _token_problem(request: Request, key: str | None) -> Problem | None:
    """A token that the simulator gave out, or the key itself."""
    if request.path == "/token":
        return None
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme != "Bearer" or not token or token.startswith("bad-"):
        return Problem(401, "Request had invalid authentication credentials.", code="ACCESS_TOKEN_TYPE_UNSUPPORTED")
    if key is not None and token != key and not token.startswith("ya29.simulated-"):
        return Problem(401, "Request had invalid authentication credentials.", code="ACCESS_TOKEN_EXPIRED")
    return None


def _token(request: Request) -> Unary:
    """OAuth's answer to an assertion; who is called `bad-…` is refused. The signature is not looked at."""
    form = {name: values[0] for name, values in parse_qs(request.body.decode()).items()}
    try:
        claims = msgspec.json.decode(_base64url(form["assertion"].split(".")[1]), type=dict[str, Any])
        good = form["grant_type"].endswith("jwt-bearer") and claims["exp"] > time.time() and claims["scope"]
        good = good and not claims["iss"].startswith("bad-")
    except (LookupError, ValueError, msgspec.DecodeError):
        good = False
    if not good:
        refusal = {"error": "invalid_grant", "error_description": "Invalid JWT."}
        return Unary(400, [("content-type", "application/json; charset=utf-8")], msgspec.json.encode(refusal))
    token = {"access_token": "ya29.simulated-" + letters(40), "expires_in": TOKEN_SECONDS, "token_type": "Bearer"}
    return Unary(200, [("content-type", "application/json; charset=utf-8")], msgspec.json.encode(token))


def _base64url(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


# --- answers ----------------------------------------------------------------------------------------------------------


def _answer(vertex: bool, request: Request, quota: Quota) -> Unary | Stream:
    if vertex and (request.method, request.path) == ("POST", "/token"):
        return _token(request)
    route = _ROUTE.fullmatch(request.path)
    if request.method != "POST" or route is None:
        return error(Problem(404, f"The requested URL {request.path} was not found on this server."))
    model, method = route[1], route[2]
    if not _KNOWN.fullmatch(model):
        return error(Problem(404, f"models/{model} is not found, or is not supported for {method}."))
    try:
        match method:
            case "generateContent":
                return _generated(vertex, model, _generate.decode(request.body), stream=False)
            case "streamGenerateContent" if request.query.get("alt") == "sse":
                return _generated(vertex, model, _generate.decode(request.body), stream=True)
            case "batchEmbedContents" if not vertex:
                return _batched(_batch.decode(request.body))
            case "predict" if vertex:
                return _predicted(_predict.decode(request.body))
    except msgspec.DecodeError as fault:
        return error(Problem(400, f"Invalid JSON payload received. {fault}."))
    return error(Problem(404, f"models/{model} is not supported for {method}."))


def _generated(vertex: bool, model: str, ask: GenerateAsk, *, stream: bool) -> Unary | Stream:
    problem = _fault_in(model, ask)
    if problem is not None:
        return error(problem)
    content = content_of(_as_chat(model, ask))
    if content.prompt_tokens > WINDOW_TOKENS:
        limit = f"exceeds the maximum number of tokens allowed ({WINDOW_TOKENS})"
        return error(Problem(400, f"The input token count ({content.prompt_tokens}) {limit}."))
    about = {"modelVersion": model, "responseId": letters(23)}
    tokens = content.prompt_tokens + content.completion_tokens
    if stream:
        return Stream(
            headers=_headers(True),
            events=_events(vertex, ask, content, about),
            error_event=_error_event,
            latency_ms=content.latency_ms,
            chunk_ms=content.chunk_ms,
            tokens=tokens,
        )
    body = _indented(_whole(vertex, ask, content) | about)
    return Unary(200, _headers(False), body, latency_ms=content.latency_ms, tokens=tokens)


def _fault_in(model: str, ask: GenerateAsk) -> Problem | None:
    if not ask.contents:
        return Problem(400, "* GenerateContentRequest.contents: contents is not specified")
    if any(not turn.parts for turn in ask.contents):
        return Problem(400, "* GenerateContentRequest.contents: at least one part must be specified")
    calling = ask.tool_config.function_calling_config
    if calling.mode not in ("AUTO", "ANY", "NONE", "VALIDATED"):
        return Problem(400, "Invalid value at 'tool_config.function_calling_config.mode'")
    thinking = ask.generation_config.thinking_config
    if thinking.thinking_budget is not None and thinking.thinking_level is not None:
        return Problem(400, "You can only set only one of thinking budget and thinking level.")
    if not _UNSIGNED.match(model):
        for turn in ask.contents:
            called = next((part for part in turn.parts if part.function_call is not None), None)
            if called is not None and not called.thought_signature:
                return Problem(400, "Function call is missing a thought_signature in functionCall parts.")
    return None


def _as_chat(model: str, ask: GenerateAsk) -> Ask:
    """The same request as the content's maker knows it."""
    config = ask.generation_config
    system = [_message("system", ask.system_instruction)] if ask.system_instruction else []
    calling = ask.tool_config.function_calling_config
    named = calling.allowed_function_names
    choice = {"NONE": "none", "ANY": "required"}.get(calling.mode, "auto")
    wanted = config.response_mime_type == "application/json"
    schema = {"type": "json_schema", "json_schema": {"schema": config.response_json_schema}}
    return Ask(
        model=model,
        messages=[*system, *(_message(_role(turn), turn) for turn in ask.contents)],
        n=config.candidate_count,
        max_tokens=config.max_output_tokens,
        tools=[
            Tool(Function(one.name, one.parameters_json_schema))
            for tool in ask.tools
            for one in tool.function_declarations
        ]
        or None,
        tool_choice={"type": "function", "function": {"name": named[0]}} if len(named) == 1 else choice,
        response_format=None if not wanted else schema if config.response_json_schema else {"type": "json_object"},
        seed=config.seed,
    )


def _role(turn: Turn) -> str:
    if any(part.function_response is not None for part in turn.parts):
        return "tool"
    return "assistant" if turn.role == "model" else "user"


def _message(role: str, turn: Turn) -> Message:
    return Message(role, [{"text": part.text} if part.text is not None else {"part": str(part)} for part in turn.parts])


def _blocked(ask: GenerateAsk) -> bool:
    return any("blocked=1" in (part.text or "") for part in ask.contents[-1].parts)


def _thoughts(ask: GenerateAsk, content: Content) -> str:
    return "".join(content.reasoning) if ask.generation_config.thinking_config.include_thoughts else ""


def _signature() -> str:
    return base64.b64encode(letters(60).encode()).decode()


def _call_parts(choice: Choice) -> list[dict[str, Any]]:
    """Only the first of parallel calls is signed. Arguments that the length cut off are left out whole."""
    parts: list[dict[str, Any]] = []
    for call in choice.calls:
        try:
            arguments = msgspec.json.decode("".join(call.fragments))
        except msgspec.DecodeError:
            arguments = {}
        parts.append({"functionCall": {"name": call.name, "args": arguments}})
    if parts:
        parts[0]["thoughtSignature"] = _signature()
    return parts


def _usage(vertex: bool, content: Content, answer_tokens: int | None) -> dict[str, Any]:
    """Figures of an event; `answer_tokens` are those so far, None before the first."""
    thoughts = content.reasoning_tokens
    usage: dict[str, Any] = {"promptTokenCount": content.prompt_tokens}
    if answer_tokens:
        usage["candidatesTokenCount"] = answer_tokens
    usage["totalTokenCount"] = content.prompt_tokens + (answer_tokens or 0) + thoughts
    if content.cached_tokens:
        usage["cachedContentTokenCount"] = content.cached_tokens
    usage["promptTokensDetails"] = [{"modality": "TEXT", "tokenCount": content.prompt_tokens}]
    if content.cached_tokens:
        usage["cacheTokensDetails"] = [{"modality": "TEXT", "tokenCount": content.cached_tokens}]
    if thoughts:
        usage["thoughtsTokenCount"] = thoughts
    return usage | ({"trafficType": "ON_DEMAND"} if vertex else {"serviceTier": "standard"})


def _block(vertex: bool, content: Content) -> dict[str, Any]:
    usage = {"promptTokenCount": content.prompt_tokens, "totalTokenCount": content.prompt_tokens}
    return {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": usage}


def _whole(vertex: bool, ask: GenerateAsk, content: Content) -> dict[str, Any]:
    if _blocked(ask):
        return _block(vertex, content)
    candidates = []
    for index, choice in enumerate(content.choices):
        if choice.refusal:
            candidates.append(_stopped(vertex, choice) | {"index": index})
            continue
        parts: list[dict[str, Any]] = []
        if thoughts := _thoughts(ask, content):
            parts.append({"text": thoughts, "thought": True})
        if len(choice.pieces):
            parts.append({"text": "".join(choice.pieces)})
        parts += _call_parts(choice)
        # A length spent on thinking leaves a content without parts.
        said: dict[str, Any] = ({"parts": parts} if parts else {}) | {"role": "model"}
        candidate = {"content": said, "finishReason": _FINISH_REASONS[choice.finish_reason], "index": index}
        if choice.calls:
            candidate["finishMessage"] = "Model generated function call(s)."
        if ask.generation_config.response_logprobs and len(choice.pieces):
            candidate["logprobsResult"] = _logprobs(choice.pieces, ask.generation_config.logprobs or 0)
        candidates.append(candidate)
    made = content.completion_tokens - content.reasoning_tokens
    return {"candidates": candidates, "usageMetadata": _usage(vertex, content, made)}


def _stopped(vertex: bool, choice: Choice) -> dict[str, Any]:
    """A candidate that a filter took: without content, and at Vertex with the words of the filter."""
    if vertex:
        return {"finishReason": "MODEL_ARMOR", "finishMessage": "".join(choice.refusal)}
    return {"finishReason": "SAFETY", "safetyRatings": [_UNSAFE]}


def _logprobs(pieces: Any, alternatives: int) -> dict[str, Any]:
    chosen = [{"token": piece, "tokenId": zlib.crc32(piece.encode()) % 250_000, "logProbability": _score(piece)}
              for piece in pieces]  # fmt: skip
    result: dict[str, Any] = {"chosenCandidates": chosen}
    if alternatives:
        others = [{"token": f" {place}", "tokenId": place, "logProbability": -5.0 - place} for place in range(1, 20)]
        result["topCandidates"] = [{"candidates": [one, *others][:alternatives]} for one in chosen]
    return result


def _score(piece: str) -> float:
    return -(zlib.crc32(piece.encode()) % 1000) / 10_000


def _events(vertex: bool, ask: GenerateAsk, content: Content, about: dict[str, Any]) -> Iterator[bytes]:
    """One piece an event, function calls whole; the last event has the reason of every candidate."""

    def event(index: int, part: dict[str, Any], made: int | None, **more: Any) -> bytes:
        candidate = {"content": {"parts": [part], "role": "model"}, "index": index, **more}
        return _event({"candidates": [candidate], "usageMetadata": _usage(vertex, content, made)} | about)

    if _blocked(ask):
        yield _event(_block(vertex, content) | about)
        return
    made = 0
    scored = ask.generation_config.response_logprobs
    for index, choice in enumerate(content.choices):
        if thoughts := _thoughts(ask, content):
            half = len(thoughts) // 2
            yield event(index, {"text": thoughts[:half], "thought": True}, made)
            yield event(index, {"text": thoughts[half:], "thought": True}, made)
        for piece in choice.pieces:
            made += 1
            more = {"logprobsResult": _logprobs([piece], ask.generation_config.logprobs or 0)} if scored else {}
            yield event(index, {"text": piece}, made, **more)
        for part, call in zip(_call_parts(choice), choice.calls, strict=True):
            made += len(call.fragments)
            yield event(index, part, made)
    for index, choice in enumerate(content.choices):
        if choice.refusal:
            made += len(choice.refusal)
            candidate = _stopped(vertex, choice) | {"index": index}
            yield _event({"candidates": [candidate], "usageMetadata": _usage(vertex, content, made)} | about)
        else:
            yield event(index, {"text": ""}, made, finishReason=_FINISH_REASONS[choice.finish_reason])


def _batched(ask: Batch) -> Unary:
    vectors = [{"values": vector_of(_text(one.content), one.output_dimensionality)} for one in ask.requests]
    tokens = sum(text_tokens(_text(one.content)) for one in ask.requests)
    return Unary(200, _headers(False), _indented({"embeddings": vectors}), tokens=tokens)


def _text(turn: Turn) -> str:
    return "".join(part.text or "" for part in turn.parts)


def _predicted(ask: Predict) -> Unary:
    made = []
    for one in ask.instances:
        tokens = text_tokens(one.content)
        values = vector_of(one.content, ask.parameters.output_dimensionality)
        made.append(
            {"embeddings": {"statistics": {"truncated": False, "token_count": float(tokens)}, "values": values}}
        )
    characters = sum(len(one.content) for one in ask.instances)
    body = {"predictions": made, "metadata": {"billableCharacterCount": characters}}
    return Unary(200, _headers(False), _indented(body), tokens=characters // 4)


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\r\n\r\n"


def _indented(value: dict[str, Any]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value)) + b"\n"


def _headers(streamed: bool) -> Headers:
    """No header has an id of the request, and none a quota."""
    kind = "text/event-stream" if streamed else "application/json; charset=UTF-8"
    named = [("content-type", kind)] + ([("content-disposition", "attachment")] if streamed else [])
    return [
        *named,
        ("vary", "Origin"),
        ("server", "scaffolding on HTTPServer2"),
        ("x-xss-protection", "0"),
        ("x-frame-options", "SAMEORIGIN"),
        ("x-content-type-options", "nosniff"),
        ("server-timing", "gfet4t7; dur=7"),
        ("alt-svc", 'h3=":443"; ma=2592000'),
    ]


# --- errors -----------------------------------------------------------------------------------------------------------


def error(problem: Problem) -> Unary:
    """google.rpc's envelope. How long to wait stands in the body alone."""
    inner: dict[str, Any] = {
        "code": problem.status,
        "message": problem.message,
        "status": _status(problem.status, problem.code),
    }
    waits = [float(value) for name, value in problem.headers if name == "retry-after"]
    if problem.code in ("API_KEY_INVALID", "ACCESS_TOKEN_EXPIRED", "ACCESS_TOKEN_TYPE_UNSUPPORTED"):
        info = {"reason": problem.code, "domain": "googleapis.com"}
        inner["details"] = [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", **info}]
    elif waits:
        delay = f"{waits[0]:g}s"
        inner["details"] = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}]
    return Unary(problem.status, _headers(False), _indented({"error": inner}))


def _error_event(message: str, code: str | None) -> bytes:
    status = code if code in _STATUSES.values() else "UNAVAILABLE"
    number = next(number for number, name in _STATUSES.items() if name == status)
    return _event({"error": {"code": number, "message": message, "status": status}})


def _status(status: int, asked: str | None) -> str:
    return asked if asked in _STATUSES.values() else _STATUSES.get(status, "UNKNOWN")  # type: ignore[return-value]


GEMINI = Shape(answer=partial(_answer, False), model=_model_of, authorize=_key_problem, error=error)
VERTEX = Shape(answer=partial(_answer, True), model=_model_of, authorize=_token_problem, error=error)
