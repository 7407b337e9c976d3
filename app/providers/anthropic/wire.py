"""Anthropic's Messages API: the shapes of a request, an answer and a stream's events that we act on.

Blocks that go out are tagged structs; a block that comes in is one loose struct, as new types of blocks appear.
Source: Anthropic API reference, Messages and Streaming Messages.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Raw, Struct

from app.wire import ABSENT, CacheControl

# --- requests ---------------------------------------------------------------------------------------------------------


class Source(Struct, frozen=True, omit_defaults=True):
    """Where an image or a document is: `base64` and `text` carry `data` of a `media_type`, `url` names a place."""

    type: Literal["base64", "text", "url"]
    media_type: str | None = None
    data: str | None = None
    url: str | None = None


class Block(Struct, frozen=True, omit_defaults=True, tag_field="type"):
    """Part of a message."""


class TextBlock(Block, frozen=True, tag="text"):
    text: str
    cache_control: CacheControl | None = None


class ImageBlock(Block, frozen=True, tag="image"):
    source: Source
    cache_control: CacheControl | None = None


class DocumentBlock(Block, frozen=True, tag="document"):
    source: Source
    title: str | None = None
    cache_control: CacheControl | None = None


class ToolUseBlock(Block, frozen=True, tag="tool_use"):
    """A call by the model; `input` is a JSON object."""

    id: str
    name: str
    input: Raw


class ToolResultBlock(Block, frozen=True, tag="tool_result"):
    tool_use_id: str
    content: str | list[TextBlock | ImageBlock | DocumentBlock] = ""
    is_error: bool = False
    cache_control: CacheControl | None = None


class ThinkingBlock(Block, frozen=True, tag="thinking"):
    """Goes back unchanged: the vendor checks the signature."""

    thinking: str
    signature: str


class RedactedThinkingBlock(Block, frozen=True, tag="redacted_thinking"):
    data: str


class MessageTurn(Struct, frozen=True):
    role: Literal["user", "assistant"]
    content: list[Block]


class ToolDefinition(Struct, frozen=True, omit_defaults=True):
    name: str
    input_schema: Raw
    description: str | None = None
    strict: bool = False
    cache_control: CacheControl | None = None


class ToolChoice(Struct, frozen=True, omit_defaults=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Struct, frozen=True, omit_defaults=True):
    """`budget_tokens` belongs to `enabled`; `display` says whether the text of the thinking is sent."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Struct, frozen=True):
    schema: Raw
    type: Literal["json_schema"] = "json_schema"


class OutputConfig(Struct, frozen=True, omit_defaults=True):
    effort: str | None = None
    format: OutputFormat | None = None


class Metadata(Struct, frozen=True):
    user_id: str


class MessagesRequest(Struct, frozen=True, omit_defaults=True):
    """The body of `POST /v1/messages`; `max_tokens` includes what is thought."""

    model: str
    max_tokens: int
    messages: list[MessageTurn]
    system: list[TextBlock] | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    stop_sequences: list[str] | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


# --- answers ----------------------------------------------------------------------------------------------------------


class CacheCreation(Struct, frozen=True):
    """`cache_creation_input_tokens` by how long they live."""

    ephemeral_5m_input_tokens: int | None = None
    ephemeral_1h_input_tokens: int | None = None


class OutputDetails(Struct, frozen=True):
    thinking_tokens: int | None = None


class MessagesUsage(Struct, frozen=True):
    """`input_tokens` leaves out what the cache gave or took; `output_tokens` includes what was thought.

    `service_tier` is standard, priority or batch.
    """

    input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    output_tokens: int | None = None
    cache_creation: CacheCreation | None = None
    output_tokens_details: OutputDetails | None = None
    service_tier: str | None = None


class StopDetails(Struct, frozen=True):
    """Why the model refused."""

    explanation: str | None = None


class ErrorBody(Struct, frozen=True):
    type: str | None = None
    message: str | None = None


class AnswerBlock(Struct, frozen=True):
    """Part of an answer: which members are set follows from `type`."""

    type: str
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    id: str | None = None
    name: str | None = None
    input: Raw = ABSENT


class Message(Struct, frozen=True):
    """An answer; with `type` error the vendor's error envelope."""

    type: str | None = None
    id: str | None = None
    model: str | None = None
    content: list[AnswerBlock] | None = None
    stop_reason: str | None = None
    stop_details: StopDetails | None = None
    usage: MessagesUsage | None = None
    error: ErrorBody | None = None


class EventDelta(Struct, frozen=True):
    """What an event adds: to a block by `type`, or to the message (`stop_reason`)."""

    type: str | None = None
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    partial_json: str | None = None
    stop_reason: str | None = None
    stop_details: StopDetails | None = None


class Event(Struct, frozen=True):
    """One event of a stream. The usage in `message_delta` is cumulative."""

    type: str
    index: int | None = None
    message: Message | None = None
    content_block: AnswerBlock | None = None
    delta: EventDelta | None = None
    usage: MessagesUsage | None = None
    error: ErrorBody | None = None


class TokensCounted(Struct, frozen=True):
    input_tokens: int = 0
    error: ErrorBody | None = None
