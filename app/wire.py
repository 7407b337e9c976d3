"""Request and answer shapes that we act on; everything else is carried as the sender's bytes.

Shapes: OpenAI API reference, chat completions, and the recorded answers of vendors that speak it.
"""

from __future__ import annotations

from msgspec import Raw, Struct

ABSENT = Raw()
"""A member that was not there; one that was null reads `null`."""


class ChatRequest(Struct, frozen=True):
    """A chat completions request: `fields` holds every top-level member as the client wrote it, in its order."""

    alias: str
    fields: dict[str, Raw]
    stream: bool = False
    include_usage: bool = False
    max_output_tokens: int | None = None
    choices: int = 1


class StreamOptions(Struct):
    """`stream_options` of a request: the one member that we read."""

    include_usage: bool | None = None


class PromptDetails(Struct):
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None
    audio_tokens: int | None = None


class CompletionDetails(Struct):
    reasoning_tokens: int | None = None
    audio_tokens: int | None = None


class OpenAIUsage(Struct):
    """`usage` of chat completions and embeddings. Details may be null or absent, whatever the reference says."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None


class OpenAIErrorBody(Struct):
    """The inside of OpenAI's error envelope. Compatible vendors write `code` as a number, or leave fields out."""

    message: str | None = None
    type: str | None = None
    param: str | None = None
    code: str | int | None = None


class Delta(Struct):
    """The members of a streamed delta that are content; any of them may be null, absent, or a list (Mistral)."""

    content: Raw = ABSENT
    tool_calls: Raw = ABSENT
    reasoning: Raw = ABSENT
    reasoning_content: Raw = ABSENT
    refusal: Raw = ABSENT
    audio: Raw = ABSENT
    function_call: Raw = ABSENT


class ChunkChoice(Struct):
    delta: Delta | None = None
    finish_reason: str | None = None


class OpenAIChunk(Struct):
    """One `chat.completion.chunk`, as far as the relay acts on it."""

    model: str | None = None
    choices: list[ChunkChoice] | None = None
    usage: OpenAIUsage | None = None
    error: Raw = ABSENT


class Choice(Struct):
    finish_reason: str | None = None
    message: Raw = ABSENT


class OpenAICompletion(Struct):
    """One `chat.completion`, as far as the ledger needs it."""

    model: str | None = None
    choices: list[Choice] | None = None
    usage: OpenAIUsage | None = None
    error: Raw = ABSENT
