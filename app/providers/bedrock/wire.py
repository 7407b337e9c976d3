"""Answers and events of Converse and ConverseStream, as far as we act on them."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw, Struct

from app.core import Usage
from app.wire import ABSENT

MAX_TOKENS = 1_000_000_000
"""A count beyond this is no count; taken at its word it would not fit the ledger."""
ANSWER_TOOL = "answer_in_json"
"""The tool that carries a `response_format` to models without structured output; its input is the answer's text."""
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises on bytes that are not the JSON it was told to expect."""
FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "guardrail_intervened": "content_filter",
    "content_filtered": "content_filter",
}
"""OpenAI's word for a `stopReason`; one that is not here says `stop`."""
MALFORMED = frozenset({"malformed_model_output", "malformed_tool_use"})
"""Stop reasons of an answer that nobody can use."""


class ReasoningText(Struct):
    text: str = ""
    signature: str | None = None


class Reasoning(Struct, rename="camel"):
    """Of a whole block `reasoningText` or `redactedContent`; of a delta `text`, `signature` or `redactedContent`."""

    reasoning_text: ReasoningText | None = None
    redacted_content: str | None = None
    text: str | None = None
    signature: str | None = None


class ToolUse(Struct, rename="camel"):
    """`input` is an object, absent at the start of a streamed call. `type` tells tools that Bedrock itself runs."""

    tool_use_id: str = ""
    name: str = ""
    input: Raw = ABSENT
    type: str | None = None

    @property
    def is_bedrocks_own(self) -> bool:
        return self.type == "server_tool_use"


class CitedText(Struct):
    text: str = ""


class Cited(Struct):
    content: list[CitedText] = []
    citations: list[dict[str, Any]] = []


class Block(Struct, rename="camel"):
    """One block of a message; the one member that is set says its kind. Kinds that are not here are not for clients."""

    text: str | None = None
    tool_use: ToolUse | None = None
    reasoning_content: Reasoning | None = None
    citations_content: Cited | None = None


class Message(Struct):
    content: list[Block]


class Output(Struct):
    message: Message | None = None


class CacheWrite(Struct, rename="camel"):
    ttl: str | None = None
    input_tokens: int = 0


class TokenUsage(Struct, rename="camel"):
    """`usage`. Input leaves out what the cache read or was written; the `…Count` members are not documented."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_read_input_token_count: int | None = None
    cache_write_input_tokens: int | None = None
    cache_write_input_token_count: int | None = None
    cache_details: list[CacheWrite] | None = None


class PromptRouter(Struct, rename="camel"):
    invoked_model_id: str | None = None


class Trace(Struct, rename="camel"):
    prompt_router: PromptRouter | None = None


class ServiceTier(Struct):
    type: str | None = None


class ConverseAnswer(Struct, rename="camel"):
    output: Output
    stop_reason: str
    usage: TokenUsage | None = None
    trace: Trace | None = None
    service_tier: ServiceTier | None = None


class Start(Struct, rename="camel"):
    tool_use: ToolUse | None = None


class ToolInput(Struct):
    input: str = ""


class Delta(Struct, rename="camel"):
    text: str | None = None
    tool_use: ToolInput | None = None
    reasoning_content: Reasoning | None = None
    citation: dict[str, Any] | None = None


class Event(Struct, rename="camel"):
    """The payload of any event of a stream; which members are set follows from the event's type."""

    content_block_index: int = 0
    start: Start | None = None
    delta: Delta | None = None
    stop_reason: str | None = None
    usage: TokenUsage | None = None
    trace: Trace | None = None
    service_tier: ServiceTier | None = None


class ErrorBody(Struct):
    message: str | None = None


def usage_of(usage: TokenUsage | None) -> Usage | None:
    """Disjoint classes, as Bedrock counts them: their sum is its `totalTokens`."""
    if usage is None or usage.input_tokens is None:
        return None
    counts = (
        usage.input_tokens,
        usage.cache_read_input_tokens or usage.cache_read_input_token_count or 0,
        usage.cache_write_input_tokens or usage.cache_write_input_token_count or 0,
        usage.output_tokens or 0,
    )
    if not all(0 <= count <= MAX_TOKENS for count in counts):
        return None
    fresh, read, written, made = counts
    hour = sum(part.input_tokens for part in usage.cache_details or () if part.ttl == "1h" and part.input_tokens > 0)
    hour = min(hour, written)
    return Usage(input=fresh, cache_read=read, cache_write=written - hour, cache_write_1h=hour, output=made)


def tier_of(tier: ServiceTier | None) -> str | None:
    return None if tier is None else tier.type


def model_of(trace: Trace | None) -> str | None:
    """The model that answered, where a prompt router chose it; Bedrock names no other."""
    return trace.prompt_router.invoked_model_id if trace is not None and trace.prompt_router is not None else None


def annotation_of(citation: dict[str, Any]) -> dict[str, object]:
    """A citation as OpenAI writes those of the web; one of a document keeps the vendor's members."""
    location = citation.get("location")
    web = location.get("web") if isinstance(location, dict) else None
    if isinstance(web, dict):
        return {"type": "url_citation", "url_citation": {"url": web.get("url"), "title": citation.get("title")}}
    return {"type": "document_citation", "document_citation": citation}
