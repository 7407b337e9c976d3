"""What the simulator says: text, tool calls, vectors and usage figures, all functions of the request alone.

A streamed and a unary answer to one request are equal in text and usage, and so are two answers to equal
requests. Text comes in pieces; a piece is a token, so usage can be checked by counting.

The last user message may steer the answer with directives anywhere in its text:

    tokens=500       length of the answer in tokens (pieces), at most 99999; otherwise 12 to 43, by the request
    chunk_ms=20      pause between the chunks of a stream
    latency_ms=300   pause before the first byte
    tools=2          call that many of the given tools at once, although `tool_choice` leaves the choice; a tool's
                     result is then answered with text
    beside=5         text of that many tokens before those calls
    refusal=6        the model refuses, in that many tokens, in the words that its vendor has for it
    cached=64        `cached_tokens` of the usage
    reasoning=128    reasoning tokens before the answer (vendors that show reasoning stream it)

A last message that is in the BOOK gets the answer that stands there.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Struct

WORDS = """
    amber anchor autumn bridge candle canyon cedar cobalt compass copper coral crystal desert ember falcon fern
    forest garden glacier granite harbor hazel island ivory jasper juniper lantern lemon linen maple marble meadow
    mirror morning mountain nectar oak ocean olive orchard paper pebble pepper pine prairie quartz rain river
    saffron sandstone silver spruce stone summer thunder timber topaz tulip valley velvet violet walnut water willow
    winter naïve café façade Zürich smörgåsbord 東京 Ελλάδα ✓ 🌊
""".split()  # noqa: SIM905 (a hundred quoted words read worse)

BOOK: dict[str, str] = {}
"""What is answered to a last message of these words, as `PUT /_sim/answers` says, at every vendor."""
_DIRECTIVE = re.compile(
    r"\b(?:(tokens|tools|beside|refusal|cached|reasoning)=(\d{1,5})|(chunk_ms|latency_ms)=(\d{1,7}))\b"
)
_EXACTLY = re.compile(r"Reply with exactly: ([^\n]{1,200})")
_FRAGMENT_CHARS = 4
_SCHEMA_DEPTH = 8
_MOST_CALLS = 128


class Message(Struct):
    role: str
    content: str | list[dict[str, Any]] | None = None


class Function(Struct):
    name: str
    parameters: dict[str, Any] = {}


class Tool(Struct):
    function: Function


class StreamOptions(Struct):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Ask(Struct):
    """The part of a chat completions request that steers the answer."""

    model: str
    messages: list[Message]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    service_tier: str | None = None
    seed: int | None = None
    web_search_options: dict[str, Any] | None = None
    prompt_cache_options: dict[str, Any] | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class Words(Struct, frozen=True):
    """Text in pieces, made while it is read, so that a very long answer does not keep the event loop."""

    seed: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, cut: slice) -> Words:
        """The first pieces: `words[:limit]`, and no other cut."""
        return Words(self.seed, min(self.count, cut.stop))

    def __iter__(self) -> Iterator[str]:
        """Sentences of about nine words, one piece a word or full stop."""
        state, in_sentence = self.seed, 0
        for index in range(self.count):
            state = (state * 1103515245 + 12345) & 0x7FFFFFFF
            if in_sentence > 4 and (in_sentence > 9 or state & 0x30000 == 0):
                in_sentence = 0
                yield "."
                continue
            word = WORDS[(state >> 12) % len(WORDS)]
            word = word if in_sentence else word.capitalize()
            in_sentence += 1
            yield word if index == 0 else " " + word


class ToolCall(Struct, frozen=True):
    name: str
    fragments: list[str]
    """The arguments, JSON text in pieces."""


class Choice(Struct, frozen=True):
    """One of `n` answers: text, calls with or without text before them, or a refusal and nothing else."""

    pieces: Words | list[str]
    calls: list[ToolCall]
    finish_reason: str
    """In OpenAI's words, which tell no refusal from another end."""
    refusal: Words | list[str] = []


class Content(Struct, frozen=True):
    """What to say, before a vendor's shape says it."""

    choices: list[Choice]
    reasoning: Words
    """Pieces of the reasoning, the same for every choice."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    """Pieces of all choices plus the reasoning of each."""
    latency_ms: float
    chunk_ms: float

    @property
    def reasoning_tokens(self) -> int:
        return len(self.reasoning) * len(self.choices)


def content_of(ask: Ask) -> Content:
    """The answer to a request."""
    texts = [_text(message) for message in ask.messages]
    prompt = "\n".join(texts)
    directives = _directives(ask, texts)
    # `seed` picks another answer, as it would at a vendor.
    seed = zlib.crc32(f"{ask.model}\n{ask.seed}\n{prompt}".encode())
    limit = ask.max_completion_tokens or ask.max_tokens
    reasoning = Words(seed ^ 0x5EED, directives.get("reasoning", 0))
    if limit is not None:
        reasoning = reasoning[:limit]
        limit -= len(reasoning)
    exactly = _EXACTLY.search(prompt)
    known = BOOK.get(texts[-1]) if BOOK and texts else None
    said = re.findall(r"\s*\S+", known or exactly[1]) if known or exactly else None
    choices = [_choice(ask, seed + index, directives, limit, said) for index in range(ask.n or 1)]
    prompt_tokens = prompt_tokens_of(ask, texts)
    return Content(
        choices=choices,
        reasoning=reasoning,
        prompt_tokens=prompt_tokens,
        cached_tokens=min(directives.get("cached", 0), prompt_tokens),
        completion_tokens=sum(len(reasoning) + _size(choice) for choice in choices),
        latency_ms=directives.get("latency_ms", 0),
        chunk_ms=directives.get("chunk_ms", 0),
    )


def misheard(body: bytes) -> bytes:
    """A request whose prompt no longer says what to reply with; as long as before."""
    return body.replace(b"Reply with exactly: ", b"Reply, if you like: ")


def prompt_tokens_of(ask: Ask, texts: list[str]) -> int:
    """About what a tokenizer would count: four characters a token, some overhead a message and a tool."""
    tokens = 3 + sum(4 + text_tokens(text) for text in texts)
    for tool in ask.tools or ():
        tokens += 8 + len(msgspec.json.encode(tool.function.parameters)) // 5
    return tokens


def text_tokens(text: str) -> int:
    """Tokens of a text, about four bytes each."""
    return (len(text.encode()) + 3) // 4


def vector_of(text: str, dimensions: int) -> list[float]:
    """A unit vector of hashed words and word trigrams: equal texts are equal, texts that share words are near."""
    vector = [0.0] * dimensions
    for word in re.findall(r"\w+", text.lower()) or [text]:
        for feature in (word, *(word[at : at + 3] for at in range(len(word) - 2))):
            code = zlib.crc32(feature.encode())
            vector[code % dimensions] += 1.0 if code & 0x80000000 else -1.0
    norm = sum(value * value for value in vector) ** 0.5
    if norm == 0:  # the features cancelled each other out
        vector[zlib.crc32(text.encode()) % dimensions] = norm = 1.0
    return [value / norm for value in vector]


def _text(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    # Parts that are not text (images, audio, files) count by their size as sent, at most 340 characters.
    return "\n".join(
        part["text"] if isinstance(part.get("text"), str) else str(part)[:340] for part in message.content or ()
    )


def _directives(ask: Ask, texts: list[str]) -> dict[str, int]:
    for message, text in zip(reversed(ask.messages), reversed(texts), strict=True):
        if message.role == "user":
            if "=" not in text:
                return {}
            return {count or pause: int(number or wait) for count, number, pause, wait in _DIRECTIVE.findall(text)}
    return {}


def _choice(ask: Ask, seed: int, directives: dict[str, int], limit: int | None, said: list[str] | None) -> Choice:
    if directives.get("refusal"):
        refusal = Words(seed ^ 0xBAD, directives["refusal"])
        if limit is not None and limit < len(refusal):
            return Choice(pieces=[], calls=[], finish_reason="length", refusal=refusal[:limit])
        return Choice(pieces=[], calls=[], finish_reason="stop", refusal=refusal)
    calls = _calls(ask, seed, directives)
    if calls:
        kept: list[ToolCall] = []
        text = Words(seed, directives.get("beside", 0))
        if limit is not None:
            if limit <= len(text):
                return Choice(pieces=text[:limit], calls=kept, finish_reason="length")
            limit -= len(text)
        for call in calls:
            fragments = call.fragments if limit is None else call.fragments[:limit]
            limit = None if limit is None else limit - len(fragments)
            kept.append(ToolCall(name=call.name, fragments=fragments))
            if limit == 0:
                return Choice(pieces=text, calls=kept, finish_reason="length")
        return Choice(pieces=text, calls=kept, finish_reason="tool_calls")
    pieces = said or _pieces(ask, seed, directives)
    if limit is not None and limit < len(pieces):
        return Choice(pieces=pieces[:limit], calls=[], finish_reason="length")
    return Choice(pieces=pieces, calls=[], finish_reason="stop")


def _pieces(ask: Ask, seed: int, directives: dict[str, int]) -> Words | list[str]:
    kind = (ask.response_format or {}).get("type")
    if kind == "json_schema":
        schema = ask.response_format["json_schema"].get("schema") or {}
        return _fragments(example(schema, seed))
    if kind == "json_object":
        return _fragments({"answer": WORDS[seed % len(WORDS)]})
    return Words(seed, directives.get("tokens", 12 + seed % 32))


def _calls(ask: Ask, seed: int, directives: dict[str, int]) -> list[ToolCall]:
    choice = ask.tool_choice
    tools = ask.tools or []
    count = min(directives.get("tools", 0), _MOST_CALLS)
    if choice == "none" or not tools:
        return []
    if ask.messages[-1].role == "tool":
        count = 0
    if isinstance(choice, dict):
        named = (choice.get("function") or {}).get("name")
        tools = [tool for tool in tools if tool.function.name == named] or tools
    if choice == "required" or isinstance(choice, dict):
        count = max(count, 1)
    if ask.parallel_tool_calls is False:
        count = min(count, 1)
    calls = []
    for index in range(count):
        function = tools[index % len(tools)].function
        calls.append(ToolCall(name=function.name, fragments=_fragments(example(function.parameters, seed + index))))
    return calls


def _size(choice: Choice) -> int:
    return len(choice.pieces) + len(choice.refusal) + sum(len(call.fragments) for call in choice.calls)


def _fragments(value: Any) -> list[str]:
    text = msgspec.json.encode(value).decode()
    return [text[at : at + _FRAGMENT_CHARS] for at in range(0, len(text), _FRAGMENT_CHARS)]


def example(schema: Any, seed: int) -> Any:
    """A value that fits a JSON schema (types, enum, const, properties, items, anyOf, local $ref; no patterns)."""
    return _example(schema, schema, seed, 0)


def _example(schema: Any, root: Any, seed: int, depth: int) -> Any:
    if not isinstance(schema, dict) or depth > _SCHEMA_DEPTH:
        return None
    if "$ref" in schema:
        target = root
        for step in str(schema["$ref"]).removeprefix("#").strip("/").split("/"):
            target = target.get(step, {}) if step else target
        return _example(target, root, seed, depth + 1)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][seed % len(schema["enum"])]
    for union in ("anyOf", "oneOf", "allOf"):
        if schema.get(union):
            options = [option for option in schema[union] if option.get("type") != "null"] or schema[union]
            # Deep in a recursive schema the last option is the likelier way out.
            return _example(options[-1 if depth > _SCHEMA_DEPTH // 2 else 0], root, seed, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    if isinstance(kind, list):
        kind = next((name for name in kind if name != "null"), "null")
    if kind == "object":
        properties = schema.get("properties", {})
        names = schema.get("required", list(properties)) if depth > _SCHEMA_DEPTH // 2 else list(properties)
        return {
            name: _example(properties.get(name, {}), root, seed + place, depth + 1) for place, name in enumerate(names)
        }
    if kind == "array":
        count = schema.get("minItems", 0 if depth > _SCHEMA_DEPTH // 2 else 1)
        return [_example(schema.get("items", {}), root, seed + place, depth + 1) for place in range(count)]
    low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
    scalars = {"integer": int(low) + 1 + seed % 7, "number": low + 1.5, "boolean": seed % 2 == 0, "null": None}
    return scalars.get(kind, WORDS[seed % 60])
