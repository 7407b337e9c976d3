"""A chat completions request as `generateContent` takes it.

Sources: Gemini API reference (generateContent, function calling, thinking, thought signatures, OpenAI compatibility),
Vertex AI reference (publishers.models.generateContent).

Where the two shapes differ in kind:
- System and developer messages, wherever they stand, become the one `systemInstruction`, in their order.
- A tool's result names its function, so it is looked up by `tool_call_id`; results go back in the order of the calls.
- Reasoning is not sent again as text. Its signature is, on the part that it came with (`answer.py` gives them out).
- `cache_control` asks for what happens anyway: Gemini caches repeated prefixes by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Raw, Struct

from app.config import Target
from app.errors import InvalidRequest
from app.providers import chat_shape
from app.providers.chat_shape import cannot
from app.providers.translator import Outgoing
from app.wire import ChatBody, ChatMessage, ChatRequest, ContentPart, FunctionTool, NamedTool, Tool, ToolCall

_encode = msgspec.json.encode
_members = msgspec.json.Decoder(dict[str, Raw])
_Json = dict[str, Any]

CARRIED = frozenset(
    {
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "stop",
        "n",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "logprobs",
        "top_logprobs",
        "tools",
        "tool_choice",
        "response_format",
        "reasoning_effort",
    }
)
SIGNATURE_FORMAT = "google-gemini-v1"
"""Marks a `reasoning_details` entry as ours to send back (OpenRouter's name for it)."""
SKIP_SIGNATURE = "skip_thought_signature_validator"
"""What Google documents for a function call whose signature is not known: from another vendor, or lost by a client.

Models from Gemini 3 on refuse a turn whose first function call has none.
"""
UNSIGNED_MODELS = ("gemini-1.", "gemini-2.")
BUDGET_MODELS = ("gemini-2.",)
"""These take a budget of thinking tokens; later ones a level."""
BUDGETS = {"none": 0, "minimal": 1024, "low": 1024, "medium": 8192, "high": 24576}
"""Tokens by effort, as Google's own OpenAI endpoint maps it."""
LEVELS = ("minimal", "low", "medium", "high")
DETAILS = {"low": "MEDIA_RESOLUTION_LOW", "high": "MEDIA_RESOLUTION_HIGH"}
MIME_TYPES = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "gif": "image/gif",
    "heic": "image/heic",
    "heif": "image/heif",
    "pdf": "application/pdf",
    "mp4": "video/mp4",
}
"""By a URL's ending. Vertex wants a type beside every URL; without one it says so."""
_WHOLE = (("content-type", "application/json"), ("accept", "application/json"))
_STREAMED = (("content-type", "application/json"), ("accept", "text/event-stream"))


class Front(Struct, frozen=True):
    """Where the API stands. `models` is the path of a model below the base URL.

    `call_ids`: whether function calls and their results may carry ids; Vertex pairs them by name and order.
    """

    models: str
    call_ids: bool


def model_path(front: Front, target: Target) -> str:
    """Below the base URL. A model with a slash (`tunedModels/…`, `endpoints/…`) is a path of its own."""
    return target.model if "/" in target.model else front.models + target.model


def chat(front: Front, request: ChatRequest, target: Target) -> Outgoing:
    """The request to `target`.

    Raises VendorCannot for what Gemini has no equivalent for, InvalidRequest for what OpenAI would refuse too.
    """
    body = chat_shape.read(request, target, CARRIED)
    conversation = _Conversation(front, target)
    for index, message in enumerate(body.messages):
        conversation.add(message, f"messages[{index}]")
    sent: _Json = {"contents": conversation.turns()}
    if conversation.system:
        sent["systemInstruction"] = {"parts": conversation.system}
    if body.tools:
        sent["tools"] = [{"functionDeclarations": [_declaration(tool.function) for tool in body.tools]}]
        sent["toolConfig"] = {"functionCallingConfig": _calling(body.tools, body.tool_choice)}
    config = _generation_config(body, target) | conversation.media_config()
    if config:
        sent["generationConfig"] = config
    method = "streamGenerateContent?alt=sse" if request.stream else "generateContent"
    return Outgoing(
        url=f"{target.provider.base_url}/{model_path(front, target)}:{method}",
        headers=_STREAMED if request.stream else _WHOLE,
        body=_encode(sent),
    )


# --- the conversation -------------------------------------------------------------------------------------------------


class _Conversation:
    """Messages in, `systemInstruction` and `contents` out."""

    def __init__(self, front: Front, target: Target) -> None:
        self.system: list[_Json] = []
        self._front = front
        self._target = target
        self._contents: list[_Json] = []
        self._calls: dict[str, tuple[int, str]] = {}
        self._results: list[tuple[int, _Json]] = []
        self._detail: str | None = None

    def add(self, message: ChatMessage, at: str) -> None:
        if message.name is not None and message.role != "tool":
            raise cannot(f"{at}.name", self._target)
        if message.role == "tool":
            self._results.append(self._result(message, at))
            return
        self._close_results()
        if message.role in ("system", "developer"):
            self.system += self._texts(message.content, at)
        elif message.role == "user":
            self._turn("user", self._parts(message.content, at))
        else:
            self._turn("model", self._said(message, at))

    def turns(self) -> list[_Json]:
        self._close_results()
        return self._contents

    def media_config(self) -> _Json:
        return {"mediaResolution": DETAILS[self._detail]} if self._detail else {}

    def _turn(self, role: str, parts: list[_Json]) -> None:
        self._contents.append({"role": role, "parts": parts or [{"text": ""}]})

    def _close_results(self) -> None:
        """The results of parallel calls are one turn, in the order of the calls, whatever order they came back in."""
        if self._results:
            self._turn("user", [part for _, part in sorted(self._results, key=lambda numbered: numbered[0])])
            self._results = []

    def _result(self, message: ChatMessage, at: str) -> tuple[int, _Json]:
        if message.tool_call_id not in self._calls:
            raise InvalidRequest(
                f"`{at}.tool_call_id` names no tool call of an earlier message.", param=f"{at}.tool_call_id"
            )
        number, name = self._calls[message.tool_call_id]
        text = "".join(part["text"] for part in self._texts(message.content, at))
        response: _Json = {"name": name, "response": {"output": text}}
        if self._front.call_ids:
            response["id"] = message.tool_call_id
        return number, {"functionResponse": response}

    def _texts(self, content: str | list[ContentPart] | None, at: str) -> list[_Json]:
        parts = self._parts(content, at)
        for index, part in enumerate(parts):
            if "text" not in part:
                raise cannot(f"{at}.content[{index}]", self._target, "only text can stand there")
        return parts

    def _parts(self, content: str | list[ContentPart] | None, at: str) -> list[_Json]:
        if content is None:
            return []
        if isinstance(content, str):
            return [{"text": content}]
        return [self._part(part, f"{at}.content[{index}]") for index, part in enumerate(content)]

    def _part(self, part: ContentPart, at: str) -> _Json:
        if part.type == "image_url" and part.image_url is not None:
            self._note_detail(part.image_url.detail, f"{at}.image_url.detail")
            return self._media(part.image_url.url, f"{at}.image_url")
        if part.type == "input_audio" and part.input_audio is not None:
            audio = part.input_audio
            return {"inlineData": {"mimeType": f"audio/{audio.format}", "data": audio.data}}
        if part.type == "file" and part.file is not None:
            if part.file.file_data is None:
                raise cannot(f"{at}.file.file_id", self._target, "files at OpenAI are not there")
            return self._media(part.file.file_data, f"{at}.file")
        text = part.refusal if part.type == "refusal" else part.text
        if text is None:
            raise InvalidRequest(f"`{at}.{part.type}` is missing.", param=f"{at}.{part.type}")
        return {"text": text}

    def _media(self, url: str, at: str) -> _Json:
        """A data URL goes inline; a public one by its name, for the vendor to fetch."""
        if url.startswith("data:"):
            head, comma, data = url.partition(",")
            if not comma or not head.endswith(";base64"):
                raise cannot(at, self._target, "a data URL must be in base64")
            return {"inlineData": {"mimeType": head[5:-7].partition(";")[0], "data": data}}
        if not url.startswith(("https://", "http://", "gs://")):
            raise cannot(at, self._target, "expected a data URL, or one that starts with https:// or gs://")
        ending = url.partition("?")[0].partition("#")[0].rpartition(".")[2].lower()
        kind = {"mimeType": MIME_TYPES[ending]} if ending in MIME_TYPES else {}
        return {"fileData": kind | {"fileUri": url}}

    def _note_detail(self, detail: str | None, at: str) -> None:
        """Gemini sets the resolution of all images at once, so one request can ask for one."""
        if detail in (None, "auto"):
            return
        if detail not in DETAILS or self._detail not in (None, detail):
            raise cannot(at, self._target, "one detail, low or high, for all images of a request")
        self._detail = detail

    def _said(self, message: ChatMessage, at: str) -> list[_Json]:
        """An answer of the model, each signature on the part that it came with."""
        parts = self._texts(message.content, at)
        if message.refusal:
            parts.append({"text": message.refusal})
        signatures: dict[str, str] = {}
        for detail in message.reasoning_details or ():
            if detail.format == SIGNATURE_FORMAT and detail.data:
                if detail.id:
                    signatures[detail.id] = detail.data
                elif unsigned := next((part for part in parts if "thoughtSignature" not in part), None):
                    unsigned["thoughtSignature"] = detail.data
                else:
                    parts.append({"text": "", "thoughtSignature": detail.data})
        calls = message.tool_calls or []
        if calls and not self._target.model.startswith(UNSIGNED_MODELS):
            signatures.setdefault(calls[0].id, SKIP_SIGNATURE)
        for index, call in enumerate(calls):
            part = self._call(call, f"{at}.tool_calls[{index}]")
            if call.id in signatures:
                part["thoughtSignature"] = signatures[call.id]
            parts.append(part)
        return parts

    def _call(self, call: ToolCall, at: str) -> _Json:
        name, written = call.function.name, call.function.arguments
        if written in (None, "", "null"):  # what some vendors write where a function takes nothing
            written = "{}"
        self._calls[call.id] = (len(self._calls), name)
        try:
            _members.decode(written)
        except (msgspec.DecodeError, RecursionError):
            path = f"{at}.function.arguments"
            raise InvalidRequest(f"`{path}` is not a JSON object.", param=path) from None
        made: _Json = {"name": name, "args": Raw(written.encode())}
        if self._front.call_ids:
            made["id"] = call.id
        return {"functionCall": made}


# --- tools and settings -----------------------------------------------------------------------------------------------


def _declaration(function: FunctionTool) -> _Json:
    declaration: _Json = {"name": function.name}
    if function.description is not None:
        declaration["description"] = function.description
    if bytes(function.parameters) not in (b"", b"null"):
        declaration["parametersJsonSchema"] = function.parameters
    return declaration


def _calling(tools: Sequence[Tool], choice: str | NamedTool | None) -> _Json:
    """VALIDATED leaves the choice as AUTO does, and holds calls to their schemas: what `strict` asks for."""
    if isinstance(choice, NamedTool):
        return {"mode": "ANY", "allowedFunctionNames": [choice.function.name]}
    if choice == "none":
        return {"mode": "NONE"}
    if choice == "required":
        return {"mode": "ANY"}
    return {"mode": "VALIDATED" if any(tool.function.strict for tool in tools) else "AUTO"}


def _generation_config(body: ChatBody, target: Target) -> _Json:
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    config: _Json = {
        "maxOutputTokens": limit,
        "temperature": body.temperature,
        "topP": body.top_p,
        "stopSequences": [body.stop] if isinstance(body.stop, str) else body.stop or None,
        "candidateCount": None if body.n == 1 else body.n,
        "seed": body.seed,
        "presencePenalty": body.presence_penalty or None,  # some models refuse penalties, of nothing too
        "frequencyPenalty": body.frequency_penalty or None,
        "responseLogprobs": body.logprobs or None,
        "logprobs": body.top_logprobs or None,
        "thinkingConfig": _thinking(body.reasoning_effort, target),
    }
    wanted = body.response_format
    if wanted is not None and wanted.type != "text":
        config["responseMimeType"] = "application/json"
        if wanted.json_schema is not None:
            config["responseJsonSchema"] = _schema(wanted.json_schema.schema, wanted.json_schema.description)
    return {name: value for name, value in config.items() if value is not None}


def _schema(schema: Raw, description: str | None) -> Raw | _Json | None:
    """The schema as it came. What describes it stands inside, as JSON Schema has it; its name is a label for OpenAI."""
    if bytes(schema) in (b"", b"null"):
        return None
    if description is None:
        return schema
    try:
        return {"description": description} | _members.decode(schema)
    except (msgspec.DecodeError, RecursionError):
        path = "response_format.json_schema.schema"
        raise InvalidRequest(f"`{path}` is not a JSON object.", param=path) from None


def _thinking(effort: str | None, target: Target) -> _Json | None:
    """Who asks for reasoning also gets to read it, as summaries."""
    if effort is None:
        return None
    if target.model.startswith(BUDGET_MODELS):
        if effort in BUDGETS:
            return {"thinkingBudget": BUDGETS[effort], "includeThoughts": effort != "none"}
        raise cannot("reasoning_effort", target, f"it has {', '.join(BUDGETS)}")
    if effort in LEVELS:
        return {"thinkingLevel": effort, "includeThoughts": True}
    raise cannot("reasoning_effort", target, f"it has {', '.join(LEVELS)}")
