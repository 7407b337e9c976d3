"""What Gemini writes, as far as we act on it. Liberal: whatever it may leave out is optional, unknown members pass.

Source: Gemini API reference v1beta (GenerateContentResponse), Vertex AI reference v1, google.rpc error details.
"""

from __future__ import annotations

from msgspec import Raw, Struct, field

from app.wire import ABSENT


class FunctionCall(Struct, rename="camel"):
    """`args` is a JSON object; `id` comes from newer models only."""

    name: str = ""
    args: Raw = ABSENT
    id: str | None = None


class Blob(Struct, rename="camel"):
    """`data` is base64."""

    mime_type: str = ""
    data: str = ""


class Part(Struct, rename="camel"):
    """One part of an answer. `thought` marks `text` as a summary of the reasoning.

    `thought_signature` is base64 and may stand on any part, also on one with an empty text.
    """

    text: str | None = None
    thought: bool | None = None
    thought_signature: str | None = None
    function_call: FunctionCall | None = None
    inline_data: Blob | None = None


class Content(Struct, rename="camel"):
    """An answer that ran out of tokens while thinking has no `parts`."""

    parts: list[Part] | None = None


class LogprobsCandidate(Struct, rename="camel"):
    token: str | None = None
    log_probability: float | None = None


class TopCandidates(Struct, rename="camel"):
    candidates: list[LogprobsCandidate] | None = None


class LogprobsResult(Struct, rename="camel"):
    """The tokens chosen, and beside each the likeliest ones."""

    chosen_candidates: list[LogprobsCandidate] | None = None
    top_candidates: list[TopCandidates] | None = None


class Candidate(Struct, rename="camel"):
    """One of `candidateCount` answers. A blocked one has no `content`; the first may lack its `index`."""

    content: Content | None = None
    finish_reason: str | None = None
    finish_message: str | None = None
    index: int | None = None
    logprobs_result: LogprobsResult | None = None


class PromptFeedback(Struct, rename="camel"):
    """Stands instead of candidates where the prompt was blocked."""

    block_reason: str | None = None
    block_reason_message: str | None = None


class ModalityTokens(Struct, rename="camel"):
    """`modality` is TEXT, IMAGE, VIDEO, AUDIO or DOCUMENT."""

    modality: str = ""
    token_count: int | None = None


class UsageMetadata(Struct, rename="camel"):
    """Tokens so far. `prompt_token_count` holds the cached ones; thoughts and tool-use prompts stand beside.

    `service_tier` (AI Studio: standard, flex, priority) and `traffic_type` (Vertex: ON_DEMAND, ...): how it was served.
    """

    prompt_token_count: int | None = None
    cached_content_token_count: int | None = None
    candidates_token_count: int | None = None
    thoughts_token_count: int | None = None
    tool_use_prompt_token_count: int | None = None
    total_token_count: int | None = None
    prompt_tokens_details: list[ModalityTokens] | None = None
    cache_tokens_details: list[ModalityTokens] | None = None
    candidates_tokens_details: list[ModalityTokens] | None = None
    tool_use_prompt_tokens_details: list[ModalityTokens] | None = None
    service_tier: str | None = None
    traffic_type: str | None = None


class GenerateContentResponse(Struct, rename="camel"):
    """A whole answer, and every event of a stream. `usage_metadata` of the last event is the stream's."""

    candidates: list[Candidate] | None = None
    prompt_feedback: PromptFeedback | None = None
    usage_metadata: UsageMetadata | None = None
    model_version: str | None = None
    response_id: str | None = None
    error: Raw = ABSENT


class ErrorDetail(Struct, rename="camel"):
    """One of google.rpc's details: ErrorInfo has `reason`, RetryInfo `retry_delay` such as `48s`."""

    type: str = field(default="", name="@type")
    reason: str | None = None
    retry_delay: str | None = None


class ErrorBody(Struct, rename="camel"):
    """The inside of Google's error envelope. `code` is the HTTP status, `status` the canonical code's name."""

    code: int | None = None
    message: str | None = None
    status: str | None = None
    details: list[ErrorDetail] | None = None
