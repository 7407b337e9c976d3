"""A request of Responses: read, and in the words of chat completions.

What a vendor keeps for its account (conversations, prompts, items) belongs to no tenant of ours, so none of it can be
named; answers that a client has kept can, by the tenant that they are of (`providers.stored`).
Source: OpenAI API reference, Responses and chat completions.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated

import msgspec
from msgspec import Meta, Raw

from app.dialects import asked, thoughts
from app.dialects.asked import Asked, Part
from app.dialects.openai_chat import MAX_OUTPUT_TOKENS, alias_of, member, members
from app.dialects.openai_responses.wire import (
    AllowedTools,
    AnyPart,
    Call,
    InputAudioPart,
    InputFile,
    InputImage,
    Kind,
    Message,
    NamedTool,
    Reasoning,
    ReasoningAsked,
    Refusal,
    Result,
    Text,
    Tool,
)
from app.errors import InvalidRequest
from app.providers.chat_shape import cannot
from app.wire import ABSENT, ChatRequest

_encode = msgspec.json.encode
_flag = msgspec.json.Decoder(bool | None)
_word = msgspec.json.Decoder(str | None)
_tokens = msgspec.json.Decoder(Annotated[int, Meta(ge=1, le=MAX_OUTPUT_TOKENS)] | None)
_kinds = msgspec.json.Decoder(str | list[Kind])
_raws = msgspec.json.Decoder(list[Raw])
_input = msgspec.json.Decoder(str | list[Raw])
_message = msgspec.json.Decoder(Message)
_call = msgspec.json.Decoder(Call)
_result = msgspec.json.Decoder(Result)
_thought = msgspec.json.Decoder(Reasoning)
_part = msgspec.json.Decoder(AnyPart)
_tools = msgspec.json.Decoder(list[Raw] | None)
_tool = msgspec.json.Decoder(Tool)
_tool_choice = msgspec.json.Decoder(str | NamedTool | AllowedTools | None)
_text = msgspec.json.Decoder(Text | None)
_reasoning = msgspec.json.Decoder(ReasoningAsked | None)
_include = msgspec.json.Decoder(list[str] | None)

_NULL = b"null"
_NOTHING = Raw(_NULL)
_KEPT = {
    "conversation": "send the turns before as items of `input`, or name the last answer as `previous_response_id`",
    "prompt": "send its text as `instructions`",
}
"""Members that name what a vendor keeps for its account, and what does instead."""
_AS_THEY_ARE = (
    "temperature",
    "top_p",
    "parallel_tool_calls",
    "service_tier",
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)
_TRANSLATED = frozenset(
    {
        "model",
        "input",
        "instructions",
        "stream",
        "stream_options",
        "max_output_tokens",
        "tools",
        "tool_choice",
        "text",
        "reasoning",
        "include",
        "top_logprobs",
        "background",
        *_AS_THEY_ARE,
    }
)
_ASKS_NOTHING = {"truncation": (b'"disabled"',), "store": (b"false",)}
"""Values that ask for what happens anyway. So does null everywhere."""
_LOGPROBS = "message.output_text.logprobs"
_SEALED = "reasoning.encrypted_content"


def read(body: bytes) -> ChatRequest:
    """The request in `body`, with `store` switched off unless it asks for it; the other members stay as they came.

    Raises InvalidRequest.
    """
    fields = members(body)
    alias = alias_of(fields)
    for name, instead in _KEPT.items():
        if bytes(fields.get(name, _NULL)) != _NULL:
            raise InvalidRequest(
                f"`{name}` names what is kept at a vendor, where tenants share: {instead}.", param=name
            )
    if member(fields, "background", _flag):
        raise InvalidRequest("`background` is not offered: leave it out, and stream.", param="background")
    previous = member(fields, "previous_response_id", _word)
    stored = member(fields, "store", _flag) or False
    if previous is None and "input" not in fields:
        raise InvalidRequest("`input` is required: a text, or a list of items.", param="input")
    written = member(fields, "input", _kinds)
    if written is not None and not isinstance(written, str) and any(map(_is_reference, written)):
        raise InvalidRequest("`input` names an item that a vendor keeps: send the item itself.", param="input")
    return ChatRequest(
        body=body,
        alias=alias,
        fields=fields if stored else fields | {"store": Raw(b"false")},
        stream=member(fields, "stream", _flag) or False,
        include_usage=True,
        max_output_tokens=member(fields, "max_output_tokens", _tokens),
        stored=stored or previous is not None,
        previous=previous,
    )


def _is_reference(item: Kind) -> bool:
    """A message may have no type, and a reference neither; a message has a role."""
    return item.role is None and item.type in (None, "item_reference")


class _Asked(Asked):
    """One request of Responses."""

    def said(self) -> Part:
        for name, value in self.fields.items():
            if name not in _TRANSLATED and bytes(value) not in (_NULL, *_ASKS_NOTHING.get(name, ())):
                raise cannot(name, self.target, _WHY.get(name, ""))
        tools = list(self._tools())
        said: Part = {
            "messages": list(self._messages()),
            "max_completion_tokens": self.request.max_output_tokens,
            "tools": tools or None,
            **self._effort(),
            **self._text(),
            **self._logprobs(),
            **{name: value for name in _AS_THEY_ARE if bytes(value := self.fields.get(name, _NOTHING)) != _NULL},
        }
        choice = self._tool_choice()
        if tools or choice not in (None, "auto", "none"):
            said["tool_choice"] = choice
        if not tools:  # clients send it all the same, and vendors mind
            said.pop("parallel_tool_calls", None)
        return said

    def own_member(self, param: str) -> str:
        if param == "logprobs" and _LOGPROBS not in bytes(self.fields.get("include", _NOTHING)).decode():
            return "top_logprobs"
        return _OWN_NAMES.get(param, param)

    # --- messages -----------------------------------------------------------------------------------------------------

    def _messages(self) -> Iterator[Part]:
        instructions = self.member("instructions", _word)
        if instructions:
            yield self.wrote("instructions", {"role": "system", "content": instructions})
        written = self.member("input", _input)
        if isinstance(written, str):
            yield self.wrote("input", {"role": "user", "content": written})
            return
        answer = _Answer()
        for place, item in enumerate(written or ()):
            where = f"input[{place}]"
            kind = self.read(_kind, item, where)
            if self._continues(answer, kind, item, where):
                continue
            yield from self._answered(answer)
            answer = _Answer()
            yield self._said(kind, item, where)
        yield from self._answered(answer)

    def _said(self, kind: Kind, item: Raw, where: str) -> Part:
        """A turn that is not the model's."""
        if kind.type == "function_call_output":
            result = self.read(_result, item, where)
            content, parts = self._content(result.output, f"{where}.output")
            return self.wrote(where, {"role": "tool", "tool_call_id": result.call_id, "content": content}, parts)
        if kind.role is None:
            raise cannot(where, self.target, f"an item of type {kind.type} has no place here")
        message = self.read(_message, item, where)
        content, parts = self._content(message.content, f"{where}.content")
        return self.wrote(where, {"role": message.role, "content": content}, parts)

    def _continues(self, answer: _Answer, kind: Kind, item: Raw, where: str) -> bool:
        """Takes an item that is the model's: those in a row are one message of chat completions."""
        if kind.type == "reasoning":
            answer.thoughts.append(self.read(_thought, item, where))
        elif kind.type == "function_call":
            call = self.read(_call, item, where)
            function = {"name": call.name, "arguments": call.arguments}
            answer.calls.append({"id": call.call_id, "type": "function", "function": function})
        elif kind.role == "assistant":
            message = self.read(_message, item, where)
            if isinstance(message.content, str):
                answer.parts.append(({"type": "text", "text": message.content}, f"{where}.content"))
            else:
                answer.parts += self._parts(message.content, f"{where}.content")
        else:
            return False
        answer.where = answer.where or where
        return True

    def _answered(self, answer: _Answer) -> Iterator[Part]:
        """A turn of the model's. Its reasoning goes back to a vendor that wants it."""
        if not answer.parts and not answer.calls:
            return
        content = _plain([part for part, _ in answer.parts])
        message: Part = {"role": "assistant", "content": content if answer.parts else None}
        if answer.calls:
            message["tool_calls"] = answer.calls
        details = [detail for place, item in enumerate(answer.thoughts) if (detail := _detail_of(item, place))]
        if "reasoning_details" in self.extras and details:
            message["reasoning_details"] = details
        text = "".join(map(_text_of, answer.thoughts))
        if "reasoning_content" in self.extras and text:
            message["reasoning_content"] = text
        yield self.wrote(answer.where, message, [at for _, at in answer.parts])

    def _content(self, content: str | list[Raw], where: str) -> tuple[str | list[Part], list[str]]:
        if isinstance(content, str):
            return content, []
        parts = self._parts(content, where)
        return _plain([part for part, _ in parts]), [at for _, at in parts]

    def _parts(self, content: list[Raw], where: str) -> list[tuple[Part, str]]:
        """Each part with its place."""
        places = [(written, f"{where}[{place}]") for place, written in enumerate(content)]
        return [(self._in_chat(self.read(_part, written, at), at), at) for written, at in places]

    def _in_chat(self, part: AnyPart, where: str) -> Part:
        if isinstance(part, InputImage):
            if part.image_url is None:
                raise cannot(where, self.target, "it needs an `image_url`")
            detail = {} if part.detail in (None, "auto") else {"detail": part.detail}
            return {"type": "image_url", "image_url": {"url": part.image_url} | detail}
        if isinstance(part, InputFile):
            data = part.file_data or part.file_url
            if data is None:
                raise cannot(where, self.target, "it needs `file_data` or a `file_url`")
            return {"type": "file", "file": {"filename": part.filename or "document.pdf", "file_data": data}}
        if isinstance(part, InputAudioPart):
            return {"type": "input_audio", "input_audio": part.input_audio}
        if isinstance(part, Refusal):
            return {"type": "refusal", "refusal": part.refusal}
        return {"type": "text", "text": part.text}

    # --- what else a request says -------------------------------------------------------------------------------------

    def _tools(self) -> Iterator[Part]:
        for place, written in enumerate(self.member("tools", _tools) or ()):
            tool = self.read(_tool, written, f"tools[{place}]")
            function: Part = {"name": tool.name}
            if tool.description is not None:
                function["description"] = tool.description
            if bytes(tool.parameters) not in (b"", _NULL):
                function["parameters"] = tool.parameters
            if tool.strict:
                function["strict"] = True
            yield {"type": "function", "function": function}

    def _tool_choice(self) -> object:
        choice = self.member("tool_choice", _tool_choice)
        if isinstance(choice, NamedTool):
            return _named(choice)
        if isinstance(choice, AllowedTools):
            subset = {"mode": choice.mode, "tools": [_named(tool) for tool in choice.tools]}
            return {"type": "allowed_tools", "allowed_tools": subset}
        return choice

    def _effort(self) -> Part:
        """How much to think. How much of it is shown is the vendor's affair."""
        reasoning = self.member("reasoning", _reasoning)
        return {"reasoning_effort": reasoning.effort} if reasoning and reasoning.effort else {}

    def _text(self) -> Part:
        text = self.member("text", _text)
        said: Part = {}
        if text is None:
            return said
        if text.verbosity not in (None, "medium"):
            said["verbosity"] = text.verbosity
        if text.format is not None and text.format.type == "json_object":
            said["response_format"] = {"type": "json_object"}
        elif text.format is not None and text.format.type == "json_schema":
            told = {
                "name": text.format.name or "answer",
                "description": text.format.description,
                "schema": text.format.schema if bytes(text.format.schema) else None,
                "strict": text.format.strict,
            }
            schema = {name: value for name, value in told.items() if value is not None}
            said["response_format"] = {"type": "json_schema", "json_schema": schema}
        return said

    def _logprobs(self) -> Part:
        """What `include` asks for: log probabilities; sealed reasoning is there anyway."""
        wanted = self.member("include", _include) or []
        if strange := [name for name in wanted if name not in (_LOGPROBS, _SEALED)]:
            raise cannot("include", self.target, f"{strange[0]} has no place here")
        top = self.fields.get("top_logprobs", ABSENT)
        told = bytes(top) not in (b"", _NULL, b"0")
        if _LOGPROBS not in wanted and not told:
            return {}
        return {"logprobs": True} | ({"top_logprobs": top} if told else {})


class _Answer:
    """The model's items that stand in a row: where they begin, and what becomes one message of them."""

    def __init__(self) -> None:
        self.where = ""
        self.thoughts: list[Reasoning] = []
        self.parts: list[tuple[Part, str]] = []
        self.calls: list[Part] = []


def _plain(parts: list[Part]) -> str | list[Part]:
    """A text alone is written as such, which every vendor takes."""
    if not parts:
        return ""
    alone = len(parts) == 1 and parts[0].keys() == {"type", "text"}
    return parts[0]["text"] if alone else parts  # type: ignore[return-value]


def _named(tool: NamedTool) -> Part:
    return {"type": "function", "function": {"name": tool.name}}


def _text_of(item: Reasoning) -> str:
    return "".join(part.text for part in item.summary or item.content or ())


def _detail_of(item: Reasoning, place: int) -> thoughts.Detail | None:
    """What the item stands for at the vendor that wrote it; None for reasoning that nobody sealed, or OpenAI did."""
    detail = thoughts.unpacked(item.encrypted_content or "")
    if detail is None:
        return None
    said: thoughts.Detail = {}
    if text := _text_of(item):
        said["summary" if detail.get("type") == "reasoning.summary" else "text"] = text
    return detail | said | {"index": place}


_kind = msgspec.json.Decoder(Kind)
_OWN_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning",
    "response_format": "text",
    "verbosity": "text",
    "logprobs": "include",
}
_WHY = {
    "store": "it keeps no answers",
    "previous_response_id": "it keeps no answers; send the turns before as items of `input`",
}


chat = partial(asked.chat, _Asked)
"""The vendor's request, by way of chat completions. Raises VendorCannot."""
