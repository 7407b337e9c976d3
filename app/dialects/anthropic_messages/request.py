"""A Messages request in the words of chat completions.

Members beyond OpenAI's own (cache hints, reasoning sent back) go only to vendors that take them: `Translator.extras`.
Source: Anthropic API reference, Messages; OpenAI API reference, chat completions.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw

from app.dialects import asked
from app.dialects.anthropic_messages import thinking as sealed
from app.dialects.anthropic_messages.wire import (
    AnyBlock,
    Document,
    Image,
    Metadata,
    OutputConfig,
    OutputFormat,
    RedactedThinking,
    Text,
    Thinking,
    ThinkingAsked,
    Tool,
    ToolChoice,
    ToolResult,
    ToolUse,
    Turn,
)
from app.dialects.asked import Asked, Part
from app.dialects.openai_chat import MAX_OUTPUT_TOKENS, alias_of, member, members
from app.errors import InvalidRequest
from app.providers.chat_shape import cannot
from app.wire import CacheControl, ChatRequest

_encode = msgspec.json.encode
_flag = msgspec.json.Decoder(bool | None)
_tokens = msgspec.json.Decoder(Annotated[int, Meta(ge=1, le=MAX_OUTPUT_TOKENS)] | None)
_turn = msgspec.json.Decoder(Turn)
_block = msgspec.json.Decoder(AnyBlock)
_tool = msgspec.json.Decoder(Tool)
_raws = msgspec.json.Decoder(list[Raw])
_system = msgspec.json.Decoder(str | list[Raw] | None)
_tools = msgspec.json.Decoder(list[Raw] | None)
_tool_choice = msgspec.json.Decoder(ToolChoice | None)
_thinking = msgspec.json.Decoder(ThinkingAsked | None)
_output_config = msgspec.json.Decoder(OutputConfig | None)
_output_format = msgspec.json.Decoder(OutputFormat | None)
_metadata = msgspec.json.Decoder(Metadata | None)
_tier = msgspec.json.Decoder(str | None)
_hint = msgspec.json.Decoder(CacheControl | None)

_AS_THEY_ARE = ("temperature", "top_p")
_TRANSLATED = frozenset(
    {
        "model",
        "messages",
        "max_tokens",
        "system",
        "stream",
        "stop_sequences",
        "tools",
        "tool_choice",
        "thinking",
        "output_config",
        "output_format",
        "metadata",
        "service_tier",
        "cache_control",
        *_AS_THEY_ARE,
    }
)
_ASKS_NOTHING = (b"null", b"[]", b"{}")
_EFFORTS = ((0.35, "low"), (0.65, "medium"), (1.0, "high"))
"""Up to which share of the answer's length a budget of thinking is which effort: the middle between the shares that the
Anthropic provider makes of efforts, so that both ways agree."""
_DEFAULT_EFFORT = "high"
"""What Anthropic takes for adaptive thinking without an effort."""


def read(body: bytes) -> ChatRequest:
    """The request in `body`; the members we do not act on stay as the client wrote them.

    Raises InvalidRequest.
    """
    fields = members(body)
    alias = alias_of(fields)
    if memoryview(fields.get("messages", b""))[:1] != b"[":
        raise InvalidRequest("`messages` must be a list.", param="messages")
    length = member(fields, "max_tokens", _tokens)
    if length is None:
        raise InvalidRequest("`max_tokens` is required: the longest answer, in tokens.", param="max_tokens")
    return ChatRequest(
        body=body,
        alias=alias,
        fields=fields,
        stream=member(fields, "stream", _flag) or False,
        include_usage=True,
        max_output_tokens=length,
    )


class _Asked(Asked):
    """One request of Messages."""

    def said(self) -> Part:
        for name, value in self.fields.items():
            if name not in _TRANSLATED and bytes(value) not in _ASKS_NOTHING:
                raise cannot(name, self.target)
        return {
            "messages": self._hinted_at_last(list(self._messages())),
            "max_completion_tokens": self.request.max_output_tokens,
            "stop": self._unless_empty("stop_sequences"),
            "tools": list(self._tools()) or None,
            "reasoning_effort": self._effort(),
            "response_format": self._response_format(),
            "user": metadata.user_id if (metadata := self.member("metadata", _metadata)) else None,
            "service_tier": self._service_tier(),
            **self._tool_choice(),
            **{name: self.fields.get(name) for name in _AS_THEY_ARE},
        }

    def own_member(self, param: str) -> str:
        if param == "reasoning_effort":
            return "thinking" if "thinking" in self.fields else "output_config"
        if param == "response_format":
            return "output_format" if "output_format" in self.fields else "output_config"
        return _OWN_NAMES.get(param, param)

    # --- messages -----------------------------------------------------------------------------------------------------

    def _messages(self) -> Iterator[Part]:
        system = self.member("system", _system)
        if system:
            yield self.wrote("system", {"role": "system", "content": self._content(system, "system")})
        turns = self.read(_raws, self.fields["messages"], "messages")
        for place, written in enumerate(turns):
            where = f"messages[{place}]"
            turn = self.read(_turn, written, where)
            if isinstance(turn.content, str):
                yield self.wrote(where, {"role": turn.role, "content": turn.content})
            elif turn.role == "assistant":
                yield self._answered(turn.content, where)
            else:
                yield from self._asked(turn.role, turn.content, where)

    def _hinted_at_last(self, messages: list[Part]) -> list[Part]:
        """A hint of the whole request stands for one on its last part."""
        hint = self.member("cache_control", _hint)
        last = messages[-1] if messages else {}
        if hint is not None and last.get("content"):
            content = last["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            self._hinted(parts[-1], hint)
            last["content"] = self._plain(parts)
        return messages

    def _asked(self, role: str, content: list[Raw], where: str) -> Iterator[Part]:
        """Results of tools are messages of their own, in front of what else the user says, as either API wants them."""
        blocks = list(self._blocks(content, f"{where}.content"))
        for block, at in blocks:
            if isinstance(block, ToolResult):
                content = (
                    "" if block.content is None else self._content(block.content, f"{at}.content", block.cache_control)
                )
                message = {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}
                yield self.wrote(at, message)
        said = [(block, at) for block, at in blocks if not isinstance(block, ToolResult)]
        if said or not blocks:
            message: Part = {"role": role, "content": self._plain([self._part(*one) for one in said])}
            yield self.wrote(where, message, [at for _, at in said])

    def _answered(self, content: list[Raw], where: str) -> Part:
        """An earlier answer. Its reasoning goes back to a vendor that wants it."""
        parts: list[Part] = []
        calls: list[Part] = []
        thinking: list[Thinking | RedactedThinking] = []
        for block, at in self._blocks(content, f"{where}.content"):
            if isinstance(block, Thinking | RedactedThinking):
                thinking.append(block)
            elif isinstance(block, ToolUse):
                function = {"name": block.name, "arguments": self._arguments(block.input, at)}
                calls.append({"id": block.id, "type": "function", "function": function})
            else:
                parts.append(self._part(block, at))
        message: Part = {"role": "assistant", "content": self._plain(parts) if parts or not calls else None}
        if calls:
            message["tool_calls"] = calls
        details = [sealed.detail_of(block, place) for place, block in enumerate(thinking)]
        if "reasoning_details" in self.extras and any(details):
            message["reasoning_details"] = [detail for detail in details if detail]
        text = "".join(block.thinking for block in thinking if isinstance(block, Thinking))
        if "reasoning_content" in self.extras and text:
            message["reasoning_content"] = text
        return self.wrote(where, message)

    def _arguments(self, written: Raw, where: str) -> str:
        if bytes(written)[:1] != b"{":
            raise cannot(f"{where}.input", self.target, "it must be an object")
        return bytes(written).decode()

    def _content(self, content: str | list[Raw], where: str, hint: CacheControl | None = None) -> str | list[Part]:
        """Text and attachments. A hint on the whole stands on the last part."""
        if isinstance(content, str):
            parts = [self._hinted({"type": "text", "text": content}, hint)]
        else:
            parts = [self._part(block, at) for block, at in self._blocks(content, where)]
            if parts:
                self._hinted(parts[-1], hint)
        return self._plain(parts)

    def _plain(self, parts: list[Part]) -> str | list[Part]:
        """A text alone is written as such, which every vendor takes."""
        if not parts:
            return ""
        alone = len(parts) == 1 and parts[0].keys() == {"type", "text"}
        return parts[0]["text"] if alone else parts  # type: ignore[return-value]

    def _blocks(self, content: list[Raw], where: str) -> Iterator[tuple[AnyBlock, str]]:
        for place, written in enumerate(content):
            at = f"{where}[{place}]"
            yield self.read(_block, written, at), at

    def _part(self, block: AnyBlock, where: str) -> Part:
        if isinstance(block, Text):
            return self._hinted({"type": "text", "text": block.text}, block.cache_control)
        if isinstance(block, Image):
            return self._hinted(
                {"type": "image_url", "image_url": {"url": self._url(block, where)}}, block.cache_control
            )
        if isinstance(block, Document):
            return self._hinted(self._document(block, where), block.cache_control)
        raise cannot(where, self.target, f"a block of type {type(block).__struct_config__.tag} has no place here")

    def _document(self, block: Document, where: str) -> Part:
        """A file, or the text of one with its title and context in front."""
        if block.citations and block.citations.enabled:
            raise cannot(f"{where}.citations", self.target)
        if block.source.type == "text":
            told = [part for part in (block.title, block.context, block.source.data) if part]
            return {"type": "text", "text": "\n\n".join(told)}
        if block.context:
            raise cannot(f"{where}.context", self.target)
        return {
            "type": "file",
            "file": {"filename": block.title or "document.pdf", "file_data": self._url(block, where)},
        }

    def _url(self, block: Image | Document, where: str) -> str:
        source = block.source
        if source.type == "url" and source.url:
            return source.url
        if source.type == "base64" and source.media_type and source.data:
            return f"data:{source.media_type};base64,{source.data}"
        raise cannot(f"{where}.source", self.target, "it needs a `url`, or `media_type` and `data`")

    def _hinted(self, part: Part, hint: CacheControl | None) -> Part:
        if hint is not None and "cache_control" in self.extras:
            part["cache_control"] = hint
        return part

    # --- what else a request says -------------------------------------------------------------------------------------

    def _tools(self) -> Iterator[Part]:
        for place, written in enumerate(self.member("tools", _tools) or ()):
            tool = self.read(_tool, written, f"tools[{place}]")
            function: Part = {"name": tool.name, "parameters": tool.input_schema}
            if tool.description is not None:
                function["description"] = tool.description
            if tool.strict:
                function["strict"] = True
            yield self._hinted({"type": "function", "function": function}, tool.cache_control)

    def _tool_choice(self) -> Part:
        choice = self.member("tool_choice", _tool_choice)
        if choice is None:
            return {}
        said: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none"}
        made: Part = {"tool_choice": said.get(choice.type) or {"type": "function", "function": {"name": choice.name}}}
        if choice.disable_parallel_tool_use:
            made["parallel_tool_calls"] = False
        return made

    def _effort(self) -> str | None:
        """How much to think. Not thinking is what a request without a word about it asks for too."""
        thinking = self.member("thinking", _thinking)
        config = self.member("output_config", _output_config)
        effort = config.effort if config else None
        if thinking is None or thinking.type == "disabled":
            return effort
        if thinking.type == "adaptive":
            return effort or _DEFAULT_EFFORT
        if thinking.budget_tokens is None:
            raise cannot("thinking", self.target, "`budget_tokens` is missing")
        share = thinking.budget_tokens / self.request.max_output_tokens
        return effort or next((effort for most, effort in _EFFORTS if share <= most), "high")

    def _response_format(self) -> Part | None:
        config = self.member("output_config", _output_config)
        wanted = self.member("output_format", _output_format) or (config.format if config else None)
        if wanted is None:
            return None
        schema = {"name": "answer", "schema": wanted.schema, "strict": True}
        return {"type": "json_schema", "json_schema": schema}

    def _service_tier(self) -> str | None:
        tier = self.member("service_tier", _tier)
        if tier not in (None, "auto", "standard_only"):
            raise cannot("service_tier", self.target)
        return "default" if tier == "standard_only" else None

    def _unless_empty(self, name: str) -> Raw | None:
        written = self.fields.get(name)
        return None if written is None or bytes(written) in _ASKS_NOTHING else written


_OWN_NAMES = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "parallel_tool_calls": "tool_choice",
    "user": "metadata",
}


chat = partial(asked.chat, _Asked)
"""The vendor's request, by way of chat completions. Raises VendorCannot."""
