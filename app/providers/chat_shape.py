"""The internal form, OpenAI's chat completions, for translators of vendors that speak otherwise: read and written here.

What OpenAI's shape has no member for is written as the field does: `reasoning_content` for reasoning as text (DeepSeek,
vLLM), `reasoning_details` for what a vendor wants back unchanged (OpenRouter: `reasoning.text` with a `signature`,
`reasoning.encrypted` with `data`), `cache_control` on content parts and tools for prompt-cache hints (OpenRouter),
`images` for images that the model made (OpenRouter: parts of type `image_url`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from msgspec import Raw, Struct

from app.config import Target
from app.core import Usage
from app.errors import InvalidRequest, VendorCannot
from app.providers.translator import Stamp
from app.sse import FrameSplitter, data_of, frame
from app.wire import AllowedTools, ChatBody, ChatRequest, ToolSubset

_encode = msgspec.json.encode
_decode = msgspec.json.decode
_body = msgspec.json.Decoder(ChatBody)

NEUTRAL = {
    "n": (b"1",),
    "logprobs": (b"false",),
    "store": (b"false",),
    "parallel_tool_calls": (b"true",),
    "presence_penalty": (b"0", b"0.0"),
    "frequency_penalty": (b"0", b"0.0"),
    "logit_bias": (b"{}",),
    "service_tier": (b'"auto"', b'"default"'),
    "modalities": (b'["text"]',),
    "tools": (b"[]",),
    "tool_choice": (b'"auto"',),
    "stop": (b"[]",),
}
"""Values that ask for what happens anyway: they pass where the parameter cannot be carried. So does null everywhere."""


def read(request: ChatRequest, target: Target, carried: frozenset[str]) -> ChatBody:
    """The request, typed; members named in the target's `drop_params` are taken out.

    `carried` names the top-level members that the vendor can carry; of `tool_choice` no `AllowedTools` are left. Raises
    VendorCannot for another member, InvalidRequest for what OpenAI would refuse too.
    """
    fields = request.fields
    dropped = target.drop_params & fields.keys()
    if dropped:
        fields = {name: value for name, value in fields.items() if name not in dropped}
    for name, value in fields.items():
        known = name in carried or name in ("model", "stream", "stream_options")
        if not known and not asks_nothing(name, value):
            raise cannot(name, target)
    body = request.body if not dropped else _encode(fields)
    try:
        typed = _body.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"The request does not fit chat completions: {error}.") from None
    return _narrowed(typed, typed.tool_choice.allowed_tools) if isinstance(typed.tool_choice, AllowedTools) else typed


def _narrowed(body: ChatBody, allowed: ToolSubset) -> ChatBody:
    """The request with the allowed tools alone, which is how other vendors are told the same."""
    names = {tool.function.name for tool in allowed.tools}
    tools = [tool for tool in body.tools or () if tool.function.name in names]
    return msgspec.structs.replace(body, tools=tools, tool_choice=allowed.mode)


def asks_nothing(name: str, value: Raw) -> bool:
    """Whether a member asks for what happens without it."""
    written = bytes(value)
    return written == b"null" or b"".join(written.split()) in NEUTRAL.get(name, ())


def cannot(param: str, target: Target, why: str = "") -> VendorCannot:
    """The refusal of a parameter that the target's vendor has no equivalent for; only top-level ones can be dropped."""
    act = "Leave it out, or use another model"
    if param.isidentifier():
        act += "; the platform team may name it in the target's `drop_params`"
    return VendorCannot(f"`{param}` cannot be carried to {target.name}{': ' + why if why else ''}. {act}.", param=param)


def rewritten(body: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """An answer with `change` made to each of its choices; what is not of our shape stays as the vendor sent it."""
    try:
        answer = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body
    choices = answer.get("choices") if isinstance(answer, dict) else None
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict):
            change(choice)
    return _encode(answer)


def rewritten_frames(frames: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The same for the frames of a stream: those of chunks are rewritten, the others stay."""
    return b"".join(
        frame(rewritten(data, change)) if (data := data_of(one))[:1] == b"{" else one
        for one in FrameSplitter().feed(frames)
    )


class WrittenToolCall(Struct, omit_defaults=True):
    """`function` has `name` and `arguments`, which is JSON as text: whole in an answer, a fragment in a delta.

    `index` stands in deltas only; `id`, `type` and the name in a call's first delta only.
    """

    index: int | None = None
    id: str | None = None
    type: str | None = None
    function: dict[str, str] | None = None


class WrittenMessage(Struct, omit_defaults=True):
    """An answer's message, or a delta of it; whoever writes a whole message sets `role`, `content` and `refusal`."""

    role: str | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType | None = msgspec.UNSET
    refusal: str | msgspec.UnsetType | None = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning_details: list[dict[str, object]] | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[WrittenToolCall] | msgspec.UnsetType = msgspec.UNSET
    annotations: list[dict[str, object]] | msgspec.UnsetType = msgspec.UNSET
    images: list[dict[str, object]] | msgspec.UnsetType = msgspec.UNSET


class WrittenChoice(Struct):
    index: int
    message: WrittenMessage
    finish_reason: str
    logprobs: Raw | None = None


class _Completion(Struct):
    id: str
    created: int
    model: str
    choices: list[WrittenChoice]
    usage: dict[str, object] | None
    object: str = "chat.completion"


class _ChunkChoice(Struct):
    index: int
    delta: WrittenMessage
    finish_reason: str | None = None
    logprobs: Raw | None = None


class _Chunk(Struct):
    id: str
    created: int
    model: str
    choices: list[_ChunkChoice]
    usage: dict[str, object] | None = None
    object: str = "chat.completion.chunk"


def completion(stamp: Stamp, model: str | None, choices: list[WrittenChoice], usage: Usage | None) -> bytes:
    """A `chat.completion`."""
    return _encode(
        _Completion(stamp.id, stamp.created, model or stamp.model, choices, None if usage is None else usage_of(usage))
    )


def chunk(
    stamp: Stamp,
    model: str | None,
    delta: WrittenMessage,
    *,
    index: int = 0,
    finish_reason: str | None = None,
    logprobs: Raw | None = None,
) -> bytes:
    """One frame with a `chat.completion.chunk` of one choice."""
    choice = _ChunkChoice(index, delta, finish_reason, logprobs)
    return frame(_encode(_Chunk(stamp.id, stamp.created, model or stamp.model, [choice])))


def usage_chunk(stamp: Stamp, model: str | None, usage: Usage) -> bytes:
    """The frame that tells a stream's usage: no choices."""
    return frame(_encode(_Chunk(stamp.id, stamp.created, model or stamp.model, [], usage_of(usage))))


def usage_of(usage: Usage) -> Mapping[str, object]:
    """OpenAI's `usage`: totals, and the classes that are parts of them."""
    given, made = usage.total_input, usage.total_output
    return {
        "prompt_tokens": given,
        "completion_tokens": made,
        "total_tokens": given + made,
        "prompt_tokens_details": {
            "cached_tokens": usage.cache_read,
            "cache_write_tokens": usage.cache_write + usage.cache_write_1h,
            "audio_tokens": usage.audio_input,
        },
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning,
            "audio_tokens": usage.audio_output,
        },
    }
