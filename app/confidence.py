"""Whether an answer may be trusted, for cascades. Pure.

Finish reasons are read in every dialect; refusals, schemas and log probabilities in chat completions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Raw, Struct

from app.config import Cascade
from app.providers import chat_shape
from app.relay import FILTERED
from app.sse import FrameSplitter, data_of
from app.wire import ChatRequest, Request

_decode = msgspec.json.decode
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
DEEPEST = 64
"""How deep a schema is followed: one that refers to itself has no end."""
MOST_STEPS = 20_000
"""How long a schema is followed, some 20 ms: it is the client's, and everybody waits meanwhile."""


class _LogProb(Struct):
    logprob: float


class _LogProbs(Struct):
    content: list[_LogProb] | None = None


class _Said(Struct):
    """A message, or a delta of one."""

    content: str | None = None
    refusal: str | None = None
    tool_calls: list[Raw] | None = None


class _Choice(Struct):
    index: int = 0
    message: _Said | None = None
    delta: _Said | None = None
    logprobs: _LogProbs | None = None


class _Answer(Struct):
    choices: list[_Choice] = []


class _Format(Struct):
    type: str
    json_schema: dict[str, Any] | None = None


_answer = msgspec.json.Decoder(_Answer)
_format = msgspec.json.Decoder(_Format | None)


class Told(Struct):
    """One choice of an answer, whole."""

    text: str = ""
    refused: bool = False
    called: bool = False
    logprobs: list[float] = []


def doubt(cascade: Cascade, request: Request, chat: bool, finish_reason: str | None, answer: bytes) -> str | None:
    """Why an answer is not to be trusted; None where it is. `answer` is a whole body or all frames of a stream.

    `chat`: it is a chat completion; of others the finish reason alone is read.
    """
    if "length" in cascade.doubts and finish_reason == "length":
        return "length"
    if "refusal" in cascade.doubts and finish_reason == FILTERED:
        return "refusal"
    if not chat or request.operation != "chat":
        return None
    told = read(answer)
    if "refusal" in cascade.doubts and any(choice.refused for choice in told):
        return "refusal"
    if "schema" in cascade.doubts and not all(choice.called or fits(request, choice.text) for choice in told):
        return "schema"
    if cascade.mean_logprob is not None:
        probabilities = [value for choice in told for value in choice.logprobs]
        if probabilities and sum(probabilities) / len(probabilities) < cascade.mean_logprob:
            return "low_confidence"
    return None


def read(answer: bytes) -> list[Told]:
    """The choices of a body or of a stream's frames; nothing of what is not of the shape."""
    told: dict[int, Told] = {}
    for part in _parts(answer):
        try:
            choices = _answer.decode(part).choices
        except _UNREADABLE:
            continue
        for choice in choices:
            one = told.setdefault(choice.index, Told())
            said = choice.message or choice.delta or _Said()
            one.text += said.content or ""
            one.refused = one.refused or bool(said.refusal)
            one.called = one.called or bool(said.tool_calls)
            if choice.logprobs is not None:
                one.logprobs.extend(token.logprob for token in choice.logprobs.content or ())
    return list(told.values())


def _parts(answer: bytes) -> Iterator[bytes]:
    if answer[:1] == b"{":
        yield answer
    else:
        yield from (data for one in FrameSplitter().feed(answer) if (data := data_of(one))[:1] == b"{")


# --- log probabilities that nobody asked for --------------------------------------------------------------------------


def unasked(cascade: Cascade, request: Request, chat: bool) -> bool:
    """Whether log probabilities are needed that the client has not asked for."""
    if cascade.mean_logprob is None or not chat or request.operation != "chat":
        return False
    return bytes(request.fields.get("logprobs", b"null")) != b"true"


def asking(request: ChatRequest) -> ChatRequest:
    """The request with log probabilities asked for."""
    fields = request.fields | {"logprobs": Raw(b"true")}
    return msgspec.structs.replace(request, fields=fields, body=msgspec.json.encode(fields))


def without(answer: bytes) -> bytes:
    """The answer, whole or in frames, without what only we have asked for."""

    def drop(choice: dict[str, Any]) -> None:
        choice["logprobs"] = None

    return chat_shape.rewritten(answer, drop) if answer[:1] == b"{" else chat_shape.rewritten_frames(answer, drop)


# --- schemas ----------------------------------------------------------------------------------------------------------


def fits(request: ChatRequest, text: str) -> bool:
    """Whether a text is what the request's `response_format` asks for."""
    try:
        wanted = _format.decode(request.fields.get("response_format", Raw(b"null")))
    except _UNREADABLE:
        return True
    if wanted is None or wanted.type not in ("json_object", "json_schema"):
        return True
    try:
        value = _decode(text)
    except _UNREADABLE:
        return False
    if wanted.type == "json_object":
        return isinstance(value, dict)
    schema = (wanted.json_schema or {}).get("schema")
    return _Check(schema).meets(value, schema, 0)


class _Check:
    """A value against a JSON schema, as far as vendors take them: what is not known here is taken to be met.

    Patterns are not known: they are the client's, and some take for ever.
    """

    def __init__(self, root: Any) -> None:
        self._root = root
        self._left = MOST_STEPS

    def meets(self, value: Any, schema: Any, depth: int) -> bool:
        self._left -= 1
        if not isinstance(schema, dict) or depth > DEEPEST or self._left < 0:
            return schema is not False
        within = depth + 1
        reference = schema.get("$ref")
        if isinstance(reference, str) and not self.meets(value, self._referred(reference), within):
            return False
        types = schema.get("type")
        if types is not None and not any(_is(value, name) for name in (types if isinstance(types, list) else [types])):
            return False
        if "const" in schema and not _same(value, schema["const"]):
            return False
        if isinstance(schema.get("enum"), list) and not any(_same(value, one) for one in schema["enum"]):
            return False
        return self._combined(value, schema, within) and self._inside(value, schema, within)

    def _referred(self, reference: str) -> Any:
        """The part of a schema that `#/$defs/name` names; another one is not known here."""
        if not reference.startswith("#"):
            return True
        found = self._root
        for step in reference[1:].split("/")[1:]:
            found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
        return found

    def _combined(self, value: Any, schema: dict[str, Any], depth: int) -> bool:
        for name, needed in (("anyOf", any), ("oneOf", any), ("allOf", all)):
            parts = schema.get(name)
            if isinstance(parts, list) and parts and not needed(self.meets(value, part, depth) for part in parts):
                return False
        return True

    def _inside(self, value: Any, schema: dict[str, Any], depth: int) -> bool:
        if isinstance(value, dict):
            members = schema.get("properties")
            members = members if isinstance(members, dict) else {}
            required = schema.get("required")
            if isinstance(required, list) and any(isinstance(n, str) and n not in value for n in required):
                return False
            others = schema.get("additionalProperties", True)
            return all(self.meets(part, members.get(name, others), depth) for name, part in value.items())
        if isinstance(value, list):
            items = schema.get("items", True)
            return _between(len(value), schema, "minItems", "maxItems") and all(
                self.meets(part, items, depth) for part in value
            )
        if isinstance(value, str):
            return _between(len(value), schema, "minLength", "maxLength")
        if isinstance(value, int | float) and not isinstance(value, bool):
            return _between(value, schema, "minimum", "maximum")
        return True


_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "null": (type(None),),
}  # fmt: skip


def _is(value: Any, name: Any) -> bool:
    if name == "integer":
        return (isinstance(value, int) and not isinstance(value, bool)) or (
            isinstance(value, float) and value.is_integer()
        )
    if name == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, _TYPES[name]) if isinstance(name, str) and name in _TYPES else True


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _between(value: float, schema: dict[str, Any], least: str, most: str) -> bool:
    lower, upper = schema.get(least), schema.get(most)
    return not (
        (isinstance(lower, int | float) and value < lower) or (isinstance(upper, int | float) and value > upper)
    )
