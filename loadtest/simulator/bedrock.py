"""AWS Bedrock's shape: Converse and ConverseStream for chat, InvokeModel for the embeddings of Titan and Cohere.

Paths are AWS's below the vendor's name: `/bedrock/model/{id}/converse`, with the id percent-encoded.
"""

from __future__ import annotations

import random
import re
import string
import uuid
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import msgspec
from msgspec import Struct

from loadtest.simulator import event_stream
from loadtest.simulator.bedrock_access import authorize
from loadtest.simulator.content import Ask, Choice, Content, Function, Message, Tool, content_of, text_tokens, vector_of
from loadtest.simulator.http import Headers, Request
from loadtest.simulator.identity import letters
from loadtest.simulator.shape import Problem, Quota, Shape, Stream, Unary

_PATH = re.compile(r"/model/(?P<model>.+)/(?P<action>converse|converse-stream|invoke)")
_MODEL = re.compile(
    r"(?:(?:us|eu|apac|jp|au|global)\.)?(?:ai21|amazon|anthropic|cohere|deepseek|meta|mistral|moonshot|openai|qwen)\..+"
    r"|arn:aws:bedrock:.+"
)
_WINDOW_TOKENS = 200_000
_PADDING = string.ascii_letters + string.digits
_TYPES = {
    400: "ValidationException",
    403: "AccessDeniedException",
    404: "ResourceNotFoundException",
    408: "ModelTimeoutException",
    424: "ModelErrorException",
    429: "ThrottlingException",
    503: "ServiceUnavailableException",
}
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_GUARDED = "guardrail_intervened"
"""How an answer ends that a guardrail has put its own words in the place of."""
_TITAN_DIMENSIONS = (1024, 512, 256)
_COHERE_DIMENSIONS = {"cohere.embed-v4": 1536}
_COHERE_MOST_TEXTS = 96


class _Named(Struct):
    name: str


class _Spec(Struct, rename="camel"):
    name: str
    input_schema: dict[str, dict[str, Any]]


class _Tool(Struct, rename="camel"):
    tool_spec: _Spec | None = None


class _Choose(Struct):
    any: dict[str, Any] | None = None
    tool: _Named | None = None


class _ToolConfig(Struct, rename="camel"):
    tools: list[_Tool]
    tool_choice: _Choose | None = None


class _Inference(Struct, frozen=True, rename="camel"):
    max_tokens: int | None = None


class _Turn(Struct):
    role: str
    content: list[dict[str, Any]]


class Converse(Struct, rename="camel"):
    """The part of a Converse request that steers the answer."""

    messages: list[_Turn]
    system: list[dict[str, Any]] = []
    inference_config: _Inference = _Inference()
    tool_config: _ToolConfig | None = None
    output_config: dict[str, Any] = {}


class Titan(Struct, rename="camel"):
    input_text: str
    dimensions: int = _TITAN_DIMENSIONS[0]


class Cohere(Struct):
    texts: list[str]
    input_type: str
    embedding_types: list[str] | None = None
    output_dimension: int | None = None


_converse = msgspec.json.Decoder(Converse)
_titan = msgspec.json.Decoder(Titan)
_cohere = msgspec.json.Decoder(Cohere)
_encode = msgspec.json.encode


def model_of(request: Request) -> str:
    path = _PATH.fullmatch(request.path)
    return path["model"] if path else ""


def error(problem: Problem) -> Unary:
    """The type stands in a header, with a URL behind it."""
    kind = problem.code if (problem.code or "").endswith("Exception") else _TYPES.get(problem.status)
    kind = kind or "InternalServerException"
    origin = "http://internal.amazon.com/coral/com.amazon.bedrock/"
    return Unary(
        status=problem.status,
        headers=[*_headers("application/json"), ("x-amzn-errortype", f"{kind}:{origin}"), *problem.headers],
        body=_encode({"message": problem.message}),
    )


def answer(request: Request, quota: Quota) -> Unary | Stream:
    path = _PATH.fullmatch(request.path)
    if request.method != "POST" or path is None:
        return error(Problem(404, "There is no such operation.", code="UnknownOperationException"))
    if not _MODEL.fullmatch(path["model"]) or "does-not-exist" in path["model"]:
        return error(Problem(400, "There is no model with this identifier."))
    try:
        if path["action"] == "invoke":
            return _embed(path["model"], request.body)
        return _chat(path["model"], request.body, streamed=path["action"] == "converse-stream")
    except msgspec.DecodeError as fault:
        return error(Problem(400, f"The request cannot be read: {fault}."))


def _headers(content_type: str) -> Headers:
    return [("content-type", content_type), ("x-amzn-requestid", str(uuid.uuid4()))]


# --- chat -------------------------------------------------------------------------------------------------------------


def _chat(model: str, body: bytes, *, streamed: bool) -> Unary | Stream:
    asked = _converse.decode(body)
    wrong = _wrong(asked)
    if wrong is not None:
        return error(Problem(400, wrong))
    content = content_of(_ask(model, asked))
    if content.prompt_tokens > _WINDOW_TOKENS:
        return error(Problem(400, "The model returned an error: the input has too many tokens for it."))
    tokens = content.prompt_tokens + content.completion_tokens
    if not streamed:
        return Unary(200, _headers("application/json"), _whole(model, content), content.latency_ms, tokens)
    return Stream(
        headers=_headers("application/vnd.amazon.eventstream"),
        events=_events(content),
        error_event=_error_event,
        latency_ms=content.latency_ms,
        chunk_ms=content.chunk_ms,
        tokens=tokens,
    )


def _wrong(asked: Converse) -> str | None:
    """What Bedrock refuses, and other vendors do not."""
    roles = [turn.role for turn in asked.messages]
    if not roles or roles[0] != "user":
        return "A conversation must start with a user message."
    if any(one == next_one for one, next_one in pairwise(roles)):
        return "The roles of messages must alternate between user and assistant."
    blocks = [block for turn in asked.messages for block in turn.content]
    if not all(turn.content for turn in asked.messages) or any(not block.get("text", "x") for block in blocks):
        return "The text of a content block is blank. Write something into it."
    if asked.tool_config is None and any("toolUse" in block or "toolResult" in block for block in blocks):
        return "toolConfig must be there when content blocks hold toolUse or toolResult."
    names = [block["document"]["name"] for block in blocks if "document" in block]
    if len(set(names)) != len(names):
        return "Two documents have the same name."
    return None


def _ask(model: str, asked: Converse) -> Ask:
    """The request in the words that steer what is said."""
    tools, choice = [], None
    if asked.tool_config is not None:
        specs = [tool.tool_spec for tool in asked.tool_config.tools if tool.tool_spec is not None]
        tools = [Tool(Function(spec.name, spec.input_schema.get("json", {}))) for spec in specs]
        wanted = asked.tool_config.tool_choice
        if wanted is not None and wanted.tool is not None:
            choice = {"function": {"name": wanted.tool.name}}
        elif wanted is not None and wanted.any is not None:
            choice = "required"
    messages = [Message("system", [block for block in asked.system if "text" in block])] if asked.system else []
    for turn in asked.messages:
        given = any("toolResult" in block for block in turn.content)
        messages.append(Message("tool" if given else turn.role, turn.content))
    return Ask(
        model=model,
        messages=messages,
        max_tokens=asked.inference_config.max_tokens,
        tools=tools,
        tool_choice=choice,
        response_format=_response_format(asked.output_config),
    )


def _response_format(output_config: dict[str, Any]) -> dict[str, Any] | None:
    wanted = output_config.get("textFormat")
    if wanted is None:
        return None
    schema = msgspec.json.decode(wanted["structure"]["jsonSchema"]["schema"])
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def _usage(content: Content, *, cache: bool) -> dict[str, Any]:
    """The cache's members come where the cache was used, and in whole answers of Claude; two are not documented."""
    fresh = content.prompt_tokens - content.cached_tokens
    usage: dict[str, Any] = {}
    if cache or content.cached_tokens:
        usage = {
            "cacheReadInputTokenCount": content.cached_tokens,
            "cacheReadInputTokens": content.cached_tokens,
            "cacheWriteInputTokenCount": 0,
            "cacheWriteInputTokens": 0,
        }
    return usage | {
        "inputTokens": fresh,
        "outputTokens": content.completion_tokens,
        "serverToolUsage": {},
        "totalTokens": content.prompt_tokens + content.completion_tokens,
    }


def _whole(model: str, content: Content) -> bytes:
    choice = content.choices[0]
    blocks: list[dict[str, Any]] = []
    if content.reasoning:
        text = {"signature": _signature(), "text": "".join(content.reasoning)}
        blocks.append({"reasoningContent": {"reasoningText": text}})
    if choice.pieces or not choice.calls:
        blocks.append({"text": "".join(choice.refusal or choice.pieces)})
    for call in choice.calls:
        use = {"input": _object("".join(call.fragments)), "name": call.name, "toolUseId": _tool_use_id()}
        blocks.append({"toolUse": use})
    return _encode(
        {
            "metrics": {"latencyMs": 10 + content.completion_tokens},
            "output": {"message": {"content": blocks, "role": "assistant"}},
            "stopReason": _GUARDED if choice.refusal else _STOP_REASONS[choice.finish_reason],
            "usage": _usage(content, cache="anthropic." in model),
        }
    )


def _object(text: str) -> Any:
    """The arguments of a call; those that `maxTokens` cut are no JSON, and come as nothing."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return {}


def _events(content: Content) -> Iterator[bytes]:
    """A block of text or reasoning begins without a `contentBlockStart`."""
    choice = content.choices[0]
    yield _event("messageStart", {"role": "assistant"})
    place = 0
    if content.reasoning:
        for piece in content.reasoning:
            yield _delta(place, {"reasoningContent": {"text": piece}})
        yield _delta(place, {"reasoningContent": {"signature": _signature()}})
        yield _event("contentBlockStop", {"contentBlockIndex": place})
        place += 1
    yield from _choice_events(choice, place)
    yield _event("messageStop", {"stopReason": _GUARDED if choice.refusal else _STOP_REASONS[choice.finish_reason]})
    metrics = {"latencyMs": 10 + content.completion_tokens}
    yield _event("metadata", {"metrics": metrics, "usage": _usage(content, cache=False)})


def _choice_events(choice: Choice, place: int) -> Iterator[bytes]:
    if choice.pieces or not choice.calls:
        for piece in choice.refusal or choice.pieces:
            yield _delta(place, {"text": piece})
        yield _event("contentBlockStop", {"contentBlockIndex": place})
        place += 1
    for call in choice.calls:
        start = {"toolUse": {"name": call.name, "toolUseId": _tool_use_id()}}
        yield _event("contentBlockStart", {"contentBlockIndex": place, "start": start})
        for fragment in call.fragments:
            yield _delta(place, {"toolUse": {"input": fragment}})
        yield _event("contentBlockStop", {"contentBlockIndex": place})
        place += 1


def _delta(place: int, delta: dict[str, Any]) -> bytes:
    return _event("contentBlockDelta", {"contentBlockIndex": place, "delta": delta})


def _event(kind: str, members: dict[str, Any]) -> bytes:
    """`p` is padding of random length, so that the size of an event does not give its text away."""
    padded = members | {"p": _PADDING[: random.randrange(2, len(_PADDING))]}
    return event_stream.event(kind, _encode(dict(sorted(padded.items()))))


def _error_event(message: str, code: str | None) -> bytes:
    kind = code if code and code.endswith("Exception") else "modelStreamErrorException"
    return event_stream.exception(kind, _encode({"message": message}))


def _tool_use_id() -> str:
    return "tooluse_" + letters(22)


def _signature() -> str:
    return letters(120)


# --- embeddings -------------------------------------------------------------------------------------------------------


def _embed(model: str, body: bytes) -> Unary:
    if "titan-embed" in model:
        titan = _titan.decode(body)
        if titan.dimensions not in _TITAN_DIMENSIONS or not titan.input_text:
            return error(Problem(400, f"Titan wants a text, and one of {_TITAN_DIMENSIONS} as `dimensions`."))
        vector, tokens = vector_of(titan.input_text, titan.dimensions), text_tokens(titan.input_text)
        by_type = {"float": vector}
        return _vectors({"embedding": vector, "embeddingsByType": by_type, "inputTextTokenCount": tokens}, tokens)
    if "cohere.embed" in model:
        return _cohere_vectors(model, _cohere.decode(body))
    return error(Problem(400, "The simulator invokes Titan and Cohere embeddings only."))


def _cohere_vectors(model: str, asked: Cohere) -> Unary:
    if not 0 < len(asked.texts) <= _COHERE_MOST_TEXTS or not all(asked.texts):
        return error(Problem(400, f"`texts` holds 1 to {_COHERE_MOST_TEXTS} texts, none of them empty."))
    usual = next((size for name, size in _COHERE_DIMENSIONS.items() if name in model), 1024)
    vectors = [vector_of(text, asked.output_dimension or usual) for text in asked.texts]
    said: dict[str, Any] = {"id": str(uuid.uuid4()), "texts": asked.texts}
    if asked.embedding_types is None:
        said |= {"embeddings": vectors, "response_type": "embeddings_floats"}
    else:
        said |= {"embeddings": {"float": vectors}, "response_type": "embeddings_by_type"}
    return _vectors(said, sum(map(text_tokens, asked.texts)))


def _vectors(said: dict[str, Any], tokens: int) -> Unary:
    counted = [("x-amzn-bedrock-input-token-count", str(tokens)), ("x-amzn-bedrock-invocation-latency", "12")]
    return Unary(200, [*_headers("application/json"), *counted], _encode(said), tokens=tokens)


BEDROCK = Shape(answer=answer, model=model_of, authorize=authorize, error=error)
