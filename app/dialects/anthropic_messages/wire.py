"""What a client of Anthropic's Messages API may send, as far as chat completions have room for it.

What is not here (tools that Anthropic runs, files by id, citations) has none: the structs refuse members that they do
not know, and the refusal names the place.
Source: Anthropic API reference, Messages.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Raw, Struct

from app.wire import ABSENT, CacheControl


class Turn(Struct, frozen=True, forbid_unknown_fields=True):
    """A message; its blocks are read one by one, so that a refusal can name the one that it is about."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Raw]


class Source(Struct, frozen=True, forbid_unknown_fields=True):
    """Where an image or a document is: `base64` and `text` carry `data`, `url` names a place."""

    type: Literal["base64", "text", "url"]
    media_type: str | None = None
    data: str | None = None
    url: str | None = None


class Citations(Struct, frozen=True, forbid_unknown_fields=True):
    enabled: bool = False


class Direct(Struct, frozen=True, forbid_unknown_fields=True):
    """Who called a tool: the model itself."""

    type: Literal["direct"]


class Block(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Part of a message."""


class Text(Block, frozen=True, tag="text"):
    """`citations` of an earlier answer say where its text came from; they are not sent again."""

    text: str
    cache_control: CacheControl | None = None
    citations: Raw = ABSENT


class Image(Block, frozen=True, tag="image"):
    source: Source
    cache_control: CacheControl | None = None


class Document(Block, frozen=True, tag="document"):
    source: Source
    title: str | None = None
    context: str | None = None
    citations: Citations | None = None
    cache_control: CacheControl | None = None


class Thinking(Block, frozen=True, tag="thinking"):
    thinking: str
    signature: str


class RedactedThinking(Block, frozen=True, tag="redacted_thinking"):
    data: str


class ToolUse(Block, frozen=True, tag="tool_use"):
    id: str
    name: str
    input: Raw
    cache_control: CacheControl | None = None
    caller: Direct | None = None
    toolset_name: None = None


class ToolResult(Block, frozen=True, tag="tool_result"):
    tool_use_id: str
    content: str | list[Raw] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None
    toolset_name: None = None


AnyBlock = Text | Image | Document | Thinking | RedactedThinking | ToolUse | ToolResult


class Tool(Struct, frozen=True, forbid_unknown_fields=True):
    """A tool of the client's. `eager_input_streaming` only says how finely a call is streamed."""

    name: str
    input_schema: Raw
    type: Literal["custom"] | None = None
    description: str | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    defer_loading: Literal[False] | None = None


class ToolChoice(Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingAsked(Struct, frozen=True, forbid_unknown_fields=True):
    """`budget_tokens` belongs to `enabled`. `display` is about how much of the thinking is shown."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Struct, frozen=True, forbid_unknown_fields=True):
    schema: Raw
    type: Literal["json_schema"]


class OutputConfig(Struct, frozen=True, forbid_unknown_fields=True):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(Struct, frozen=True, forbid_unknown_fields=True):
    user_id: str | None = None
