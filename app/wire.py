"""Request and answer shapes that we act on; everything else is carried as the sender's bytes.

Shapes: OpenAI API reference, chat completions, and the recorded answers of vendors that speak it.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from msgspec import Raw, Struct

ABSENT = Raw()
"""A member that was not there; one that was null reads `null`."""

Service = Literal["chat", "embeddings", "completions", "moderations", "speech", "transcriptions", "images"]
"""What a target's model is for."""
Need = Literal["vision", "audio", "tools", "json_schema"]
"""What a request may want of a model beyond text, and a model may not have."""
Operation = Literal[
    "chat", "embeddings", "count_tokens", "completions", "moderations", "speech", "transcriptions", "translations",
    "images", "image_edits", "retrieve", "delete",
]  # fmt: skip
"""What a call wants of a model."""


class Units(Struct, frozen=True):
    """What a vendor is paid by that does not count tokens: images made, seconds heard, characters spoken."""

    images: int = 0
    seconds: int = 0
    characters: int = 0


class ChatRequest(Struct, frozen=True):
    """A request for chat: `body` as the client wrote it, `fields` every top-level member of it in its order.

    `headers` are the client's own that a vendor who speaks its dialect gets too: those of `Dialect.relayed`. `stored`:
    it wants its answer kept at the vendor, or goes on from `previous`, one that is; `owner` then seals what the tenant
    may name.
    """

    operation: ClassVar[Operation] = "chat"
    serves: ClassVar[Service] = "chat"
    input_tokens: ClassVar[int] = 0
    units: ClassVar[None] = None

    body: bytes
    alias: str
    fields: dict[str, Raw]
    stream: bool = False
    include_usage: bool = False
    max_output_tokens: int | None = None
    choices: int = 1
    headers: tuple[tuple[str, str], ...] = ()
    stored: bool = False
    previous: str | None = None
    owner: bytes = b""


class EmbedRequest(Struct, frozen=True):
    """An embeddings request: `inputs` are texts, or lists of token numbers, of which there are `input_tokens`."""

    operation: ClassVar[Operation] = "embeddings"
    serves: ClassVar[Service] = "embeddings"
    stream: ClassVar[bool] = False
    include_usage: ClassVar[bool] = False
    max_output_tokens: ClassVar[int] = 0
    choices: ClassVar[int] = 1
    stored: ClassVar[bool] = False
    units: ClassVar[None] = None

    body: bytes
    alias: str
    fields: dict[str, Raw]
    inputs: list[str] | list[list[int]]
    input_tokens: int = 0
    encoding: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class CountRequest(Struct, frozen=True):
    """A request for the number of a prompt's tokens, in its dialect's own words. It makes nothing."""

    operation: ClassVar[Operation] = "count_tokens"
    serves: ClassVar[Service] = "chat"
    stream: ClassVar[bool] = False
    include_usage: ClassVar[bool] = False
    input_tokens: ClassVar[int] = 0
    max_output_tokens: ClassVar[int] = 0
    choices: ClassVar[int] = 1
    stored: ClassVar[bool] = False
    units: ClassVar[None] = None

    body: bytes
    alias: str
    fields: dict[str, Raw]
    headers: tuple[tuple[str, str], ...] = ()


class Field(Struct, frozen=True):
    """A field of a form, as it was sent. A file has a `file_name`: what is said of it behind the field's own name."""

    name: str
    value: bytes
    file_name: bytes = b""
    content_type: bytes = b""


class PassedRequest(Struct, frozen=True, kw_only=True):
    """A request that is passed on as it came, to `path` at the vendor: JSON (`fields`) or a form.

    With `units` the vendor may count those and no tokens, and the size of the body says nothing: `input_tokens` is what
    the prompt is taken to be.
    """

    stored: ClassVar[bool] = False

    body: bytes
    alias: str
    path: str
    operation: Operation
    serves: Service
    fields: dict[str, Raw] = {}
    form: tuple[Field, ...] = ()
    stream: bool = False
    include_usage: bool = False
    max_output_tokens: int | None = 0
    choices: int = 1
    input_tokens: int = 0
    units: Units | None = None
    headers: tuple[tuple[str, str], ...] = ()


class KeptRequest(Struct, frozen=True, kw_only=True):
    """A request for an answer that a vendor keeps, or for its deletion, by the `name` that its tenant has for it.

    The name leads to the target that keeps it, so no alias is asked for: `alias` is the one that the tenant gets there
    by. `items` are what the answer was given to. `query` goes on to the vendor. `owner` is the tenant's seal.
    """

    serves: ClassVar[Service] = "chat"
    stream: ClassVar[bool] = False
    include_usage: ClassVar[bool] = False
    input_tokens: ClassVar[int] = 0
    max_output_tokens: ClassVar[int] = 0
    choices: ClassVar[int] = 1
    stored: ClassVar[bool] = True
    units: ClassVar[Units] = Units()
    body: ClassVar[bytes] = b"{}"

    operation: Literal["retrieve", "delete"]
    name: str
    items: bool = False
    query: tuple[tuple[str, str], ...] = ()
    alias: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    owner: bytes = b""


Request = ChatRequest | EmbedRequest | CountRequest | PassedRequest | KeptRequest


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
    metadata: Raw = ABSENT


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
    service_tier: Raw = ABSENT
    error: Raw = ABSENT


class Choice(Struct):
    finish_reason: str | None = None
    message: Raw = ABSENT


class OpenAICompletion(Struct):
    """One `chat.completion`, as far as the ledger needs it."""

    model: str | None = None
    choices: list[Choice] | None = None
    usage: OpenAIUsage | None = None
    service_tier: Raw = ABSENT
    error: Raw = ABSENT


class OpenAIEmbedding(Struct):
    embedding: Raw = ABSENT


class OpenAIEmbeddings(Struct):
    """The answer to an embeddings request, as far as the ledger needs it."""

    data: list[OpenAIEmbedding] | None = None
    model: str | None = None
    usage: OpenAIUsage | None = None
    error: Raw = ABSENT


# --- a chat request in full, for vendors that speak otherwise ---------------------------------------------------------


class ImageUrl(Struct, frozen=True, forbid_unknown_fields=True):
    url: str
    detail: str | None = None


class InputAudio(Struct, frozen=True, forbid_unknown_fields=True):
    data: str
    format: str


class InputFile(Struct, frozen=True, forbid_unknown_fields=True):
    """`file_data` is a data URL; `file_id` names a file at OpenAI."""

    filename: str | None = None
    file_data: str | None = None
    file_id: str | None = None


class CacheControl(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A prompt-cache hint: the prefix up to here may be cached. `ttl` is `5m` or `1h`."""

    type: Literal["ephemeral"]
    ttl: str | None = None


class ContentPart(Struct, frozen=True, forbid_unknown_fields=True):
    """One part of a message: which member is set follows from `type`."""

    type: Literal["text", "image_url", "input_audio", "file", "refusal"]
    text: str | None = None
    image_url: ImageUrl | None = None
    input_audio: InputAudio | None = None
    file: InputFile | None = None
    refusal: str | None = None
    cache_control: CacheControl | None = None


class CalledFunction(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    arguments: str | None = None


class ToolCall(Struct, frozen=True, forbid_unknown_fields=True):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"
    index: int | None = None


class ReasoningDetail(Struct, frozen=True):
    """Reasoning that a vendor wants back unchanged: text with its signature, or encrypted data."""

    type: str
    text: str | None = None
    signature: str | None = None
    data: str | None = None
    id: str | None = None
    format: str | None = None
    index: int | None = None


class ChatMessage(Struct, frozen=True, forbid_unknown_fields=True):
    """A message of a conversation. `annotations`, `audio` and `images` of an earlier answer are not sent again."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning_details: list[ReasoningDetail] | None = None
    annotations: Raw = ABSENT
    audio: Raw = ABSENT
    images: Raw = ABSENT
    function_call: None = None


class FunctionTool(Struct, frozen=True, forbid_unknown_fields=True):
    """`parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: Raw = ABSENT
    strict: bool | None = None


class Tool(Struct, frozen=True, forbid_unknown_fields=True):
    function: FunctionTool
    type: Literal["function"] = "function"
    cache_control: CacheControl | None = None


class NamedFunction(Struct, frozen=True, forbid_unknown_fields=True):
    name: str


class NamedTool(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="function"):
    """`tool_choice` that names the one function to call."""

    function: NamedFunction


class ToolSubset(Struct, frozen=True, forbid_unknown_fields=True):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedTools(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="allowed_tools"):
    """`tool_choice` that narrows the tools without taking them out of the request, so that a prompt cache holds."""

    allowed_tools: ToolSubset


class JsonSchema(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    description: str | None = None
    schema: Raw = ABSENT
    strict: bool | None = None


class ResponseFormat(Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(Struct, frozen=True):
    """A chat completions request, as far as another vendor's API has room for it."""

    messages: list[ChatMessage]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    service_tier: str | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
