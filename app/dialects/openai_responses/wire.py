"""What a client of OpenAI's Responses may send, as far as chat completions have room for it.

What is not here (tools that OpenAI runs, files by id, calls of custom tools) has none: the structs refuse members that
they do not know, and the refusal names the place. Of an earlier answer's items, what only OpenAI reads is left out.
Source: OpenAI API reference, Responses.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Raw, Struct

from app.wire import ABSENT, InputAudio

Status = Literal["in_progress", "completed", "incomplete"]


class Part(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Part of a message, or of a call's result."""


class InputText(Part, frozen=True, tag="input_text"):
    text: str


class InputImage(Part, frozen=True, tag="input_image"):
    """`image_url` is an address or a data URL; `file_id` names a file at OpenAI."""

    image_url: str | None = None
    detail: str | None = None
    file_id: None = None


class InputFile(Part, frozen=True, tag="input_file"):
    """`file_data` is a data URL."""

    file_data: str | None = None
    file_url: str | None = None
    filename: str | None = None
    file_id: None = None


class InputAudioPart(Part, frozen=True, tag="input_audio"):
    input_audio: InputAudio


class OutputText(Part, frozen=True, tag="output_text"):
    text: str
    annotations: Raw = ABSENT
    logprobs: Raw = ABSENT


class Refusal(Part, frozen=True, tag="refusal"):
    refusal: str


AnyPart = InputText | InputImage | InputFile | InputAudioPart | OutputText | Refusal


class Message(Struct, frozen=True, forbid_unknown_fields=True):
    """`phase` tells an answer's commentary from its end; other vendors know no difference."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Raw]
    type: Literal["message"] = "message"
    id: str | None = None
    status: Status | None = None
    phase: str | None = None


class Call(Struct, frozen=True, forbid_unknown_fields=True):
    call_id: str
    name: str
    arguments: str
    type: Literal["function_call"]
    id: str | None = None
    status: Status | None = None


class Result(Struct, frozen=True, forbid_unknown_fields=True):
    call_id: str
    output: str | list[Raw]
    type: Literal["function_call_output"]
    id: str | None = None
    status: Status | None = None


class ReasoningText(Struct, frozen=True):
    text: str = ""


class Reasoning(Struct, frozen=True, forbid_unknown_fields=True):
    """`encrypted_content` is what the vendor wants back."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[ReasoningText] | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None
    status: Status | None = None


class Kind(Struct, frozen=True):
    """An item of the input, as far as it tells what it is."""

    type: str | None = None
    role: str | None = None


class Tool(Struct, frozen=True, forbid_unknown_fields=True):
    """A function of the client's. OpenAI makes a schema strict that does not say; elsewhere `strict` has to be true."""

    name: str
    type: Literal["function"]
    parameters: Raw = ABSENT
    description: str | None = None
    strict: bool | None = None


class NamedTool(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="function"):
    name: str


class AllowedTools(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="allowed_tools"):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class Format(Struct, frozen=True, forbid_unknown_fields=True):
    """`name`, `schema`, `description` and `strict` belong to `json_schema`."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: Raw = ABSENT
    description: str | None = None
    strict: bool | None = None


class Text(Struct, frozen=True, forbid_unknown_fields=True):
    format: Format | None = None
    verbosity: str | None = None


class ReasoningAsked(Struct, frozen=True, forbid_unknown_fields=True):
    """`summary` is about how much of the reasoning is shown."""

    effort: str | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
