"""A chat completions request in the words of Anthropic's Messages API.

Source: Anthropic API reference, Messages; its guides on thinking, effort, structured outputs, prompt caching and PDFs;
its page on compatibility with OpenAI's SDK, after which system messages are put in front wherever they stand.
"""

from __future__ import annotations

import re

import msgspec
from msgspec import Raw

from app.config import Credential, Target
from app.providers.anthropic.wire import (
    Block,
    DocumentBlock,
    ImageBlock,
    MessagesRequest,
    MessageTurn,
    Metadata,
    OutputConfig,
    OutputFormat,
    RedactedThinkingBlock,
    Source,
    TextBlock,
    Thinking,
    ThinkingBlock,
    ToolChoice,
    ToolDefinition,
    ToolResultBlock,
    ToolUseBlock,
)
from app.providers.chat_shape import cannot, read
from app.providers.translator import Outgoing
from app.wire import ChatBody, ChatMessage, ChatRequest, ContentPart, NamedTool, ReasoningDetail, ResponseFormat, Tool

_encode = msgspec.json.encode
_members = msgspec.json.Decoder(dict[str, Raw])
_VERSION = ("anthropic-version", "2023-06-01")
WHOLE = (("content-type", "application/json"), ("accept", "application/json"), _VERSION)
STREAMED = (("content-type", "application/json"), ("accept", "text/event-stream"), _VERSION)
_NO_PARAMETERS = Raw(b'{"type":"object","properties":{}}')

REASONING_FORMAT = "anthropic-claude-v1"
"""Marks reasoning that this vendor signed (OpenRouter's word): only that goes back to it, as it refuses another's."""

CARRIED = frozenset(
    {
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "stop",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "response_format",
        "reasoning_effort",
        "service_tier",
        "user",
    }
)

# What a model takes follows from its version; a name without one is taken for a recent model.
_MODEL = re.compile(r"claude-(?:[a-z]+-)?(\d)(?:-(\d{1,2}))?(?!\d)")
_FIRST_TO_THINK = (3, 7)
_FIRST_ADAPTIVE = (4, 6)  # before it, thinking has a budget in tokens, and rules of its own
_FIRST_WITHOUT_SAMPLING = (4, 7)
_RECENT = (9, 0)
_EFFORTS = ("low", "medium", "high", "xhigh", "max")
_BUDGET_SHARES = {"minimal": 0.1, "low": 0.2, "medium": 0.5, "high": 0.8, "xhigh": 0.95}
"""Of the answer's length, which includes the thinking. OpenRouter's shares, so that both routes think alike."""
_LEAST_BUDGET_TOKENS = 1024
_LEAST_TOP_P_THINKING = 0.95


def chat(request: ChatRequest, target: Target) -> Outgoing:
    """The length, which this vendor must be told, is the request's, else the target's `max_output_tokens`."""
    body = read(request, target, CARRIED)
    length = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    max_tokens = target.max_output_tokens if length is None else length
    system, turns = _conversation(body.messages, target)
    version = _version(target.model)
    thinking = _thinking(body, target, version, max_tokens)
    asked = MessagesRequest(
        model=target.model,
        max_tokens=max_tokens,
        messages=turns,
        system=system or None,
        stream=request.stream,
        temperature=_temperature(body.temperature, target, version, thinking),
        top_p=_top_p(body.top_p, target, version, thinking),
        stop_sequences=[body.stop] if isinstance(body.stop, str) else body.stop or None,
        tools=[_tool(tool, place, target) for place, tool in enumerate(body.tools or ())] or None,
        tool_choice=_tool_choice(body, target, thinking),
        thinking=thinking,
        output_config=_output_config(body, target, thinking),
        metadata=None if body.user is None else Metadata(body.user),
        service_tier=_service_tier(body.service_tier, target),
    )
    return Outgoing(
        url=target.provider.base_url + "/messages",
        headers=STREAMED if request.stream else WHOLE,
        body=_encode(asked),
    )


def sign(outgoing: Outgoing, credential: Credential, at: float) -> Outgoing:
    key = ("x-api-key", credential.secret.reveal())
    return Outgoing(outgoing.url, (*outgoing.headers, key), outgoing.body)


# --- messages ---------------------------------------------------------------------------------------------------------


def _conversation(messages: list[ChatMessage], target: Target) -> tuple[list[TextBlock], list[MessageTurn]]:
    """The system prompt, and turns of user and assistant in alternation: the results of parallel calls are one turn."""
    system: list[TextBlock] = []
    turns: list[MessageTurn] = []
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if message.name is not None and message.role != "tool":  # a tool's name is said by the id of its call
            raise cannot(f"{where}.name", target)
        if message.role in ("system", "developer"):
            blocks = _blocks(message.content, where, target)
            if not all(isinstance(block, TextBlock) for block in blocks):
                raise cannot(f"{where}.content", target, "a system message is text there")
            system += blocks
            continue
        if message.role == "assistant":
            role, blocks = "assistant", _answered(message, where, target)
            if not blocks:  # an answer without anything in it, which the vendor refuses
                continue
        elif message.role == "tool":
            role, blocks = "user", [_result(message, where, target)]
        else:
            role, blocks = "user", _blocks(message.content, where, target)
        if turns and turns[-1].role == role:
            turns[-1].content.extend(blocks)
        else:
            turns.append(MessageTurn(role, blocks))
    return system, turns


def _answered(message: ChatMessage, where: str, target: Target) -> list[Block]:
    """An earlier answer. Of its reasoning only what this vendor signed goes back."""
    blocks: list[Block] = _thoughts(message.reasoning_details or [])
    said = [*_blocks(message.content or "", where, target), TextBlock(message.refusal or "")]
    blocks += [block for block in said if not isinstance(block, TextBlock) or block.text]
    for place, call in enumerate(message.tool_calls or ()):
        arguments = _arguments(call.function.arguments, f"{where}.tool_calls[{place}].function.arguments", target)
        blocks.append(ToolUseBlock(_call_id(call.id), call.function.name, arguments))
    return blocks


def _thoughts(details: list[ReasoningDetail]) -> list[Block]:
    """Details with one index are parts of one thought, for clients that collect a stream without joining them."""
    thoughts: dict[int, list[ReasoningDetail]] = {}
    for place, detail in enumerate(details):
        thoughts.setdefault(place if detail.index is None else detail.index, []).append(detail)
    blocks: list[Block] = []
    for parts in thoughts.values():
        if all(part.format != REASONING_FORMAT for part in parts):
            continue
        if data := "".join(part.data or "" for part in parts):
            blocks.append(RedactedThinkingBlock(data))
        elif signature := "".join(part.signature or "" for part in parts):
            blocks.append(ThinkingBlock("".join(part.text or "" for part in parts), signature))
    return blocks


def _result(message: ChatMessage, where: str, target: Target) -> ToolResultBlock:
    if message.tool_call_id is None:
        raise cannot(f"{where}.tool_call_id", target, "a result names its call")
    call = _call_id(message.tool_call_id)
    if isinstance(message.content, str):
        return ToolResultBlock(call, message.content)
    blocks = _blocks(message.content or [], where, target)
    hints = [block.cache_control for block in blocks if block.cache_control]  # may stand on the result alone
    parts = [msgspec.structs.replace(block, cache_control=None) for block in blocks]
    return ToolResultBlock(call, parts, cache_control=hints[-1] if hints else None)


def _call_id(written: str) -> str:
    """A call's id within the vendor's alphabet. It ties a result to its call in this request, and means no more."""
    return re.sub(r"[^a-zA-Z0-9_-]", lambda found: f"_{ord(found[0]):x}_", written)


def _arguments(written: str | None, where: str, target: Target) -> Raw:
    if written is None or written.strip() in ("", "null"):
        return Raw(b"{}")
    _object(written, where, target)
    return Raw(written.encode())


def _object(written: str | Raw, where: str, target: Target) -> dict[str, Raw]:
    try:
        return _members.decode(written)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        raise cannot(where, target, "it is a JSON object there") from None


def _blocks(
    content: str | list[ContentPart] | None, where: str, target: Target
) -> list[TextBlock | ImageBlock | DocumentBlock]:
    if isinstance(content, str):
        return [TextBlock(content)]
    return [_block(part, f"{where}.content[{place}]", target) for place, part in enumerate(content or ())]


def _block(part: ContentPart, where: str, target: Target) -> TextBlock | ImageBlock | DocumentBlock:
    hint = part.cache_control
    if part.image_url is not None:
        if part.image_url.detail == "low":  # the others ask for what happens anyway
            raise cannot(f"{where}.image_url.detail", target)
        url = part.image_url.url
        if url.startswith("data:"):
            return _attached(url, None, hint, f"{where}.image_url.url", target)
        return ImageBlock(Source("url", url=url), hint)
    if part.file is not None:
        if part.file.file_data is None:
            raise cannot(f"{where}.file.file_id", target, "send the file itself")
        data, title = part.file.file_data, part.file.filename
        if data.startswith(("https://", "http://")):
            return DocumentBlock(Source("url", url=data), title, hint)
        return _attached(data, title, hint, f"{where}.file.file_data", target)
    if part.input_audio is not None:
        raise cannot(f"{where}.input_audio", target)
    return TextBlock(part.text or part.refusal or "", hint)


def _attached(url: str, title: str | None, hint: object, where: str, target: Target) -> ImageBlock | DocumentBlock:
    """The block of a data URL (RFC 2397)."""
    head, _, data = url.partition(",")
    media_type, *options = head.removeprefix("data:").split(";")
    if head.startswith("data:") and "base64" in options:
        if media_type.startswith("image/"):
            return ImageBlock(Source("base64", media_type, data), hint)
        if media_type == "application/pdf":
            return DocumentBlock(Source("base64", media_type, data), title, hint)
        if media_type == "text/plain":
            try:
                text = msgspec.convert(data, bytes).decode()
            except (msgspec.ValidationError, UnicodeDecodeError):
                raise cannot(where, target, "the text is not UTF-8 in base64") from None
            return DocumentBlock(Source("text", media_type, text), title, hint)
    raise cannot(where, target, "it takes images, PDFs and plain text, as data URLs in base64")


# --- what else a request says -----------------------------------------------------------------------------------------


def _tool(tool: Tool, place: int, target: Target) -> ToolDefinition:
    function = tool.function
    schema = function.parameters
    if bytes(schema) in (b"", b"null"):
        schema = _NO_PARAMETERS
    elif "type" not in (members := _object(schema, f"tools[{place}].function.parameters", target)):
        schema = Raw(_encode({"type": "object", **members}))
    return ToolDefinition(function.name, schema, function.description, bool(function.strict), tool.cache_control)


def _tool_choice(body: ChatBody, target: Target, thinking: Thinking | None) -> ToolChoice | None:
    choice, one = body.tool_choice, body.parallel_tool_calls is False
    if choice in (None, "auto"):
        return ToolChoice("auto", None, one) if body.tools and (one or choice) else None
    if choice == "none":
        return ToolChoice("none") if body.tools else None
    if _has_budget(thinking):
        raise cannot("tool_choice", target, "this model is not forced to a tool while `reasoning_effort` is set")
    if isinstance(choice, NamedTool):
        return ToolChoice("tool", choice.function.name, one)
    return ToolChoice("any", None, one)


def _version(model: str) -> tuple[int, int]:
    found = _MODEL.search(model)
    return (int(found[1]), int(found[2] or 0)) if found else _RECENT


def _thinking(body: ChatBody, target: Target, version: tuple[int, int], max_tokens: int) -> Thinking | None:
    effort = body.reasoning_effort
    if effort is None:
        return None
    if version < _FIRST_TO_THINK:
        if effort == "none":
            return None
        raise cannot("reasoning_effort", target, "this model does not think")
    if effort == "none":
        return Thinking("disabled")
    if version >= _FIRST_ADAPTIVE:
        if effort not in _EFFORTS:
            raise cannot("reasoning_effort", target, f"it knows none, {', '.join(_EFFORTS)}")
        return Thinking("adaptive", display="summarized")
    share = _BUDGET_SHARES.get(effort)
    if share is None:
        raise cannot("reasoning_effort", target, f"it knows none, {', '.join(_BUDGET_SHARES)}")
    if max_tokens <= _LEAST_BUDGET_TOKENS:
        raise cannot("reasoning_effort", target, f"the answer's length must be above {_LEAST_BUDGET_TOKENS} tokens")
    if (place := _unsigned_call(body.messages)) is not None:
        raise cannot("reasoning_effort", target, f"messages[{place}] came back without its `reasoning_details`")
    return Thinking("enabled", max(int(max_tokens * share), _LEAST_BUDGET_TOKENS))


def _unsigned_call(messages: list[ChatMessage]) -> int | None:
    """Place of the call whose results the request brings, where it came back without the thinking before it.

    A model that thinks by a budget refuses that; the adaptive ones do not mind.
    """
    place = len(messages) - 1
    while place > 0 and messages[place].role == "tool":
        place -= 1
    if place == len(messages) - 1 or not messages[place].tool_calls:
        return None
    return None if _thoughts(messages[place].reasoning_details or []) else place


def _has_budget(thinking: Thinking | None) -> bool:
    return thinking is not None and thinking.type == "enabled"


def _temperature(
    asked: float | None, target: Target, version: tuple[int, int], thinking: Thinking | None
) -> float | None:
    """1 is what happens anyway, there as at OpenAI."""
    if asked is None or asked == 1:
        return None
    if asked > 1:
        raise cannot("temperature", target, "it goes up to 1 there")
    if version >= _FIRST_WITHOUT_SAMPLING:
        raise cannot("temperature", target, "this model takes none")
    if _has_budget(thinking):
        raise cannot("temperature", target, "this model takes none while `reasoning_effort` is set")
    return asked


def _top_p(asked: float | None, target: Target, version: tuple[int, int], thinking: Thinking | None) -> float | None:
    if asked is None or asked == 1:
        return None
    if version >= _FIRST_WITHOUT_SAMPLING:
        raise cannot("top_p", target, "this model takes none")
    if _has_budget(thinking) and asked < _LEAST_TOP_P_THINKING:
        raise cannot("top_p", target, f"at least {_LEAST_TOP_P_THINKING} while `reasoning_effort` is set")
    return asked


def _output_config(body: ChatBody, target: Target, thinking: Thinking | None) -> OutputConfig | None:
    effort = body.reasoning_effort if thinking is not None and thinking.type == "adaptive" else None
    schema = _schema(body.response_format, target)
    if effort is None and schema is None:
        return None
    return OutputConfig(effort, None if schema is None else OutputFormat(schema))


def _schema(asked: ResponseFormat | None, target: Target) -> Raw | None:
    """The schema of the answer. Its name is a label; its description becomes the schema's own."""
    if asked is None or asked.type == "text":
        return None
    wanted = asked.json_schema
    if wanted is None or not bytes(wanted.schema):
        raise cannot("response_format", target, "JSON is asked for by `json_schema` there")
    schema = _object(wanted.schema, "response_format", target)
    if wanted.description is None:
        return wanted.schema
    return Raw(_encode({"description": wanted.description, **schema}))


def _service_tier(asked: str | None, target: Target) -> str | None:
    if asked not in (None, "auto", "default"):
        raise cannot("service_tier", target)
    return "standard_only" if asked == "default" else None
