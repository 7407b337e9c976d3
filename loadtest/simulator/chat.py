"""The API that OpenAI and its compatible vendors share: paths, credentials, checks of a request, embeddings, models.

How an answer is written is the vendor's `Dialect`; `shape` makes a `Shape` of one.
"""

from __future__ import annotations

import base64
import time
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec
from msgspec import Struct

from loadtest.simulator import others, responses
from loadtest.simulator.content import Ask, Content, content_of, text_tokens, vector_of
from loadtest.simulator.http import Headers, Request
from loadtest.simulator.shape import Problem, Quota, Shape, Stream, Unary


class Dialect(Struct, frozen=True):
    """How one vendor writes what they all say."""

    known: Callable[[str], bool]
    """Whether the vendor has a model of that name."""
    unknown_model: Callable[[str], Problem]
    refused: Callable[[Ask], Problem | None]
    """A request that this vendor, or the model, does not take."""
    unary: Callable[[Ask, Content], dict[str, Any]]
    events: Callable[[Ask, Content], tuple[Iterator[bytes], Callable[[str, str | None], bytes]]]
    """The events of a stream, and how to write an error event into it."""
    error: Callable[[Problem], Unary]
    headers: Callable[[str, Quota | None, bool], Headers]
    """Headers from the model, the quota (None on refusals) and whether the answer is a stream."""
    models: Callable[[], list[dict[str, Any]]]
    bad_key: Problem
    no_key: Problem
    snapshot: Callable[[str], str] = str
    """What a model is called in answers."""
    logprob: Callable[[str], dict[str, Any]] = dict
    """What a token's log probability is written as."""
    pretty: bool = False
    """Whether unary bodies are indented."""
    comment: bytes = b""
    vendor: str = "openai"
    """Who keeps its answers."""


class EmbeddingAsk(Struct):
    model: str
    input: str | list[str | int | list[int]]
    dimensions: int | None = None
    encoding_format: str = "float"


class _Named(Struct):
    model: str = ""


DIMENSIONS = {"text-embedding-3-large": 3072}
DEFAULT_DIMENSIONS = 1536
DEFAULT_WINDOW_TOKENS = 128_000
WINDOW_TOKENS = (
    # Prefix of a model, and its context window as its vendor publishes it; the first that fits counts.
    ("gpt-3.5-turbo", 16_385),
    ("gpt-4.1", 1_047_576),
    ("gpt-4o", 128_000),
    ("gpt-4-turbo", 128_000),
    ("gpt-4", 8_192),
    ("gpt-5", 400_000),
    ("o1", 200_000),
    ("o3", 200_000),
    ("o4", 200_000),
)

_ask = msgspec.json.Decoder(Ask)
_embedding_ask = msgspec.json.Decoder(EmbeddingAsk)
_named = msgspec.json.Decoder(_Named)


def shape(dialect: Dialect) -> Shape:
    """The whole behaviour of a vendor that speaks this dialect."""
    return Shape(
        answer=partial(_answer, dialect),
        model=model_of,
        authorize=partial(_authorize, dialect),
        error=dialect.error,
    )


def model_of(request: Request) -> str:
    """The `model` member of the body, empty when there is none."""
    if request.body.startswith(b"--"):
        return others.model_of(request)
    try:
        return _named.decode(request.body).model
    except msgspec.DecodeError:
        return ""


def window_tokens(model: str) -> int:
    """Context window of a model, an author's prefix such as `openai/` put aside."""
    name = model.rpartition("/")[2]
    return next((size for prefix, size in WINDOW_TOKENS if name.startswith(prefix)), DEFAULT_WINDOW_TOKENS)


def _authorize(dialect: Dialect, request: Request, key: str | None) -> Problem | None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token:
        return dialect.no_key
    if token.startswith("bad-") or (key is not None and token != key):
        return dialect.bad_key
    return None


def _answer(dialect: Dialect, request: Request, quota: Quota) -> Unary | Stream:
    route = (request.method, request.path)
    if route == ("POST", "/v1/chat/completions"):
        return _chat(dialect, request.body, quota)
    if route == ("POST", "/v1/responses"):
        return _responses(dialect, request.body, quota)
    if request.path.startswith("/v1/responses/"):
        name = request.path.removeprefix("/v1/responses/")
        found = responses.kept(dialect.vendor, request.method, name)
        gone = Problem(404, f"Response with id '{name.partition('/')[0]}' not found.")
        return dialect.error(gone) if found is None else _json(dialect, found, "", quota)
    if request.method == "POST" and request.path in others.PATHS:
        return _others(dialect, request, quota)
    if route == ("POST", "/v1/embeddings"):
        return _embeddings(dialect, request.body, quota)
    if route == ("GET", "/v1/models"):
        return _json(dialect, {"object": "list", "data": dialect.models()}, "", None)
    if request.method == "GET" and request.path.startswith("/v1/models/"):
        name = request.path.removeprefix("/v1/models/")
        model = next((model for model in dialect.models() if model["id"] == name), None)
        return _json(dialect, model, "", None) if model else dialect.error(dialect.unknown_model(name))
    return dialect.error(Problem(404, f"Invalid URL ({request.method} {request.path})"))


def _chat(dialect: Dialect, body: bytes, quota: Quota) -> Unary | Stream:
    try:
        ask = _ask.decode(body)
    except msgspec.DecodeError as error:
        return dialect.error(_unreadable(body, error, ("model", "messages")))
    problem = _fault_in(dialect, ask)
    if problem is not None:
        return dialect.error(problem)
    content = content_of(ask)
    tokens = content.prompt_tokens + content.completion_tokens
    if content.prompt_tokens > window_tokens(ask.model):
        return dialect.error(
            Problem(
                400,
                f"This model reads at most {window_tokens(ask.model)} tokens; "
                f"your messages are {content.prompt_tokens} tokens long.",
                param="messages",
                code="context_length_exceeded",
            )
        )
    headers = dialect.headers(ask.model, quota, bool(ask.stream))
    if not ask.stream:
        return Unary(
            status=200,
            headers=headers,
            body=_encode(dialect, dialect.unary(ask, content)),
            latency_ms=content.latency_ms,
            tokens=tokens,
        )
    events, error_event = dialect.events(ask, content)
    return Stream(
        headers=headers,
        events=events,
        error_event=error_event,
        latency_ms=content.latency_ms,
        chunk_ms=content.chunk_ms,
        tokens=tokens,
        comment=dialect.comment,
    )


def _responses(dialect: Dialect, body: bytes, quota: Quota) -> Unary | Stream:
    try:
        ask = responses.read(body)
        echo = msgspec.json.decode(body)
    except msgspec.DecodeError as error:
        return dialect.error(_unreadable(body, error, ("model",)))
    unknown = responses.unknown_answer(ask)
    if unknown is not None:
        return dialect.error(
            Problem(
                400,
                f"Previous response with id '{unknown}' not found.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        )
    problem = _fault_in(dialect, responses.in_chat(ask))
    if problem is not None:
        return dialect.error(problem)
    said, content = responses.said(ask, dialect.snapshot(ask.model), created(), echo, dialect.logprob)
    responses.keep(dialect.vendor, ask, said)
    headers = dialect.headers(ask.model, quota, bool(ask.stream))
    tokens = said.usage["total_tokens"]
    if not ask.stream:
        written = _encode(dialect, responses.whole(said))
        return Unary(status=200, headers=headers, body=written, latency_ms=content.latency_ms, tokens=tokens)
    return Stream(
        headers=headers,
        events=responses.events(said),
        error_event=responses.error_event,
        latency_ms=content.latency_ms,
        chunk_ms=content.chunk_ms,
        tokens=tokens,
    )


def _others(dialect: Dialect, request: Request, quota: Quota) -> Unary | Stream:
    model = model_of(request)
    if not dialect.known(model):
        return dialect.error(dialect.unknown_model(model))
    try:
        made = others.answer(request, model, dialect.snapshot(model), created())
    except others.Unreadable as missing:
        return dialect.error(Problem(400, f"Missing required parameter: '{missing}'.", param=str(missing)))
    named = dialect.headers(model, quota, made.events is not None)
    if made.events is not None:
        return Stream(
            headers=named,
            events=made.events,
            error_event=lambda message, code: sse({"error": {"message": message, "code": code}}),
            latency_ms=made.latency_ms,
            chunk_ms=made.chunk_ms,
            tokens=made.tokens,
        )
    named = [(name, made.content_type if name == "content-type" else value) for name, value in named]
    body = made.body if isinstance(made.body, bytes) else _encode(dialect, made.body)
    return Unary(status=200, headers=named, body=body, latency_ms=made.latency_ms, tokens=made.tokens)


def _fault_in(dialect: Dialect, ask: Ask) -> Problem | None:
    if not ask.model:
        return Problem(400, "you must provide a model parameter")
    if not dialect.known(ask.model) or ask.model.rpartition("/")[2].startswith("text-embedding"):
        return dialect.unknown_model(ask.model)
    if not ask.messages:
        return Problem(400, "The array 'messages' is empty.", param="messages", code="empty_array")
    if not 1 <= (1 if ask.n is None else ask.n) <= 128:
        return Problem(400, "'n' is outside of 1 to 128.", param="n", code="integer_out_of_range")
    for name in ("max_tokens", "max_completion_tokens"):
        limit = getattr(ask, name)
        if limit is not None and limit < 1:
            return Problem(400, f"'{name}' is below 1.", param=name, code="integer_below_min_value")
    if ask.stream_options is not None and not ask.stream:
        return Problem(400, "'stream_options' is for streams only.", param="stream_options")
    return dialect.refused(ask)


def _embeddings(dialect: Dialect, body: bytes, quota: Quota) -> Unary:
    try:
        ask = _embedding_ask.decode(body)
    except msgspec.DecodeError as error:
        return dialect.error(_unreadable(body, error, ("model", "input")))
    if not dialect.known(ask.model) or not ask.model.rpartition("/")[2].startswith("text-embedding"):
        return dialect.error(dialect.unknown_model(ask.model))
    most = DIMENSIONS.get(ask.model.rpartition("/")[2], DEFAULT_DIMENSIONS)
    dimensions = most if ask.dimensions is None else ask.dimensions
    if not 1 <= dimensions <= most:
        return dialect.error(Problem(400, f"'dimensions' is outside of 1 to {most}.", param="dimensions"))
    if ask.encoding_format not in ("float", "base64"):
        return dialect.error(Problem(400, "'encoding_format' is float or base64.", param="encoding_format"))
    inputs = _inputs(ask.input)
    if not inputs or "" in inputs:
        return dialect.error(Problem(400, "'input' is empty.", param="input"))
    in_base64 = ask.encoding_format == "base64"
    data = []
    for index, text in enumerate(inputs):
        vector = vector_of(text, dimensions)
        # The order of these members differs by encoding in what vendors send.
        if in_base64:
            encoded = base64.b64encode(array("f", vector).tobytes()).decode()
            data.append({"object": "embedding", "index": index, "embedding": encoded})
        else:
            data.append({"object": "embedding", "embedding": vector, "index": index})
    tokens = sum(text_tokens(text) for text in inputs)
    answer = {
        "object": "list",
        "data": data,
        "model": ask.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    encoded_answer = msgspec.json.encode(answer)
    return Unary(
        status=200,
        headers=dialect.headers(ask.model, quota, False),
        # Only base64 answers are indented in what vendors send.
        body=msgspec.json.format(encoded_answer) if in_base64 and dialect.pretty else encoded_answer,
        tokens=tokens,
    )


def _inputs(value: str | list[str | int | list[int]]) -> list[str]:
    """Each input as text; token numbers are written as words."""
    if isinstance(value, str):
        return [value]
    if value and isinstance(value[0], int):
        return [" ".join(map(str, value))]
    return [one if isinstance(one, str) else " ".join(map(str, one)) for one in value]


def _unreadable(body: bytes, error: msgspec.DecodeError, required: tuple[str, ...]) -> Problem:
    if not isinstance(error, msgspec.ValidationError):
        return Problem(400, "The body of your request is not JSON.")
    text = str(error)
    for name in required:
        if f"missing required field `{name}`" in text and " - at `$" not in text:
            if name == "model":
                return Problem(400, "you must provide a model parameter")
            return Problem(400, f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
    path = text.rpartition("`$.")[2].rstrip("`") if "`$." in text else None
    return Problem(400, f"Invalid type: {text}.", param=path, code="invalid_type")


def _json(dialect: Dialect, value: Any, model: str, quota: Quota | None) -> Unary:
    return Unary(status=200, headers=dialect.headers(model, quota, False), body=_encode(dialect, value))


def _encode(dialect: Dialect, value: Any) -> bytes:
    encoded = msgspec.json.encode(value)
    return msgspec.json.format(encoded) if dialect.pretty else encoded


def sse(value: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def created() -> int:
    """Seconds since 1970, as vendors stamp their answers."""
    return int(time.time())
