"""What a request to Gemini may hold: the vendor refuses every other name.

Source: Gemini API reference (models.generateContent, models.batchEmbedContents), Vertex AI reference (predict).
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

DIMENSIONS = 3072


class Part(Struct, rename="camel", forbid_unknown_fields=True):
    text: str | None = None
    thought: bool | None = None
    thought_signature: str | None = None
    function_call: dict[str, Any] | None = None
    function_response: dict[str, Any] | None = None
    inline_data: dict[str, str] | None = None
    file_data: dict[str, str] | None = None


class Turn(Struct, forbid_unknown_fields=True):
    parts: list[Part]
    role: str = "user"


class Calling(Struct, rename="camel", forbid_unknown_fields=True):
    mode: str = "AUTO"
    allowed_function_names: list[str] = []


class ToolConfig(Struct, rename="camel", forbid_unknown_fields=True):
    function_calling_config: Calling = msgspec.field(default_factory=Calling)


class Declaration(Struct, rename="camel", forbid_unknown_fields=True):
    name: str
    description: str = ""
    parameters_json_schema: dict[str, Any] = {}


class Declarations(Struct, rename="camel", forbid_unknown_fields=True):
    function_declarations: list[Declaration]


class Thinking(Struct, rename="camel", forbid_unknown_fields=True):
    thinking_budget: int | None = None
    thinking_level: str | None = None
    include_thoughts: bool = False


class GenerationConfig(Struct, rename="camel", forbid_unknown_fields=True):
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop_sequences: list[str] = []
    candidate_count: int | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    response_logprobs: bool = False
    logprobs: int | None = None
    response_mime_type: str = "text/plain"
    response_json_schema: dict[str, Any] | None = None
    media_resolution: str | None = None
    thinking_config: Thinking = msgspec.field(default_factory=Thinking)


class GenerateAsk(Struct, rename="camel", forbid_unknown_fields=True):
    """What a request may hold: the vendor refuses every other name."""

    contents: list[Turn]
    system_instruction: Turn | None = None
    tools: list[Declarations] = []
    tool_config: ToolConfig = msgspec.field(default_factory=ToolConfig)
    generation_config: GenerationConfig = msgspec.field(default_factory=GenerationConfig)


class BatchItem(Struct, rename="camel", forbid_unknown_fields=True):
    model: str
    content: Turn
    output_dimensionality: int = DIMENSIONS


class Batch(Struct, forbid_unknown_fields=True):
    requests: list[BatchItem]


class Parameters(Struct, rename="camel", forbid_unknown_fields=True):
    auto_truncate: bool = True
    output_dimensionality: int = DIMENSIONS


class Instance(Struct, forbid_unknown_fields=True):
    content: str


class Predict(Struct, forbid_unknown_fields=True):
    instances: list[Instance]
    parameters: Parameters = msgspec.field(default_factory=Parameters)
