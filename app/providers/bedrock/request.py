"""A chat completions request as a Converse request.

System and developer messages become `system`, in their order; neighbours of one role become one message, as Bedrock
wants roles to alternate. Plain `reasoning_content` is not sent again, as it has no signature; `reasoning_details` are,
where they came from such a model. Source: API reference, Converse.
"""

from __future__ import annotations

from urllib.parse import quote

import msgspec
from msgspec import Raw

from app.config import Target
from app.errors import InvalidRequest, VendorCannot
from app.providers.bedrock.content import Documents, blocks_of, cache_point, reasoning_blocks
from app.providers.bedrock.models import effort, has_json_schema
from app.providers.bedrock.wire import ANSWER_TOOL
from app.providers.chat_shape import cannot, read
from app.providers.translator import Outgoing
from app.wire import ABSENT, ChatBody, ChatMessage, ChatRequest, JsonSchema, NamedTool, ToolCall

_encode = msgspec.json.encode
_members = msgspec.json.Decoder(dict[str, Raw])

OWN = ("additionalModelRequestFields", "guardrailConfig", "performanceConfig")
"""Bedrock's own members, which a client may send as Bedrock writes them."""
CARRIED = frozenset(
    {
        "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "stop", "tools", "tool_choice",
        "response_format", "reasoning_effort", "service_tier", "metadata", *OWN,
    }
)  # fmt: skip
TIERS = frozenset({"flex", "priority", "reserved"})
_WHOLE = (("content-type", "application/json"), ("accept", "application/json"))
_STREAMED = (("content-type", "application/json"), ("accept", "application/vnd.amazon.eventstream"))
_AUTO = {"auto": {}}

Members = dict[str, object]


def chat(request: ChatRequest, target: Target) -> Outgoing:
    """Raises VendorCannot, InvalidRequest."""
    body = read(request, target, CARRIED)
    fields = {name: value for name, value in request.fields.items() if name not in target.drop_params}
    system, messages = _conversation(body.messages, target)
    additional = _additional(body, fields, target)
    tool_config = _tool_config(body, messages, target)
    if _has_budget(additional) and tool_config is not None and tool_config.get("toolChoice", _AUTO) != _AUTO:
        param = "tool_choice" if body.tool_choice not in (None, "auto") else "response_format"
        raise cannot(param, target, "this model is not forced to a tool while `reasoning_effort` is set")
    converse: Members = {
        "messages": messages,
        "system": system,
        "inferenceConfig": _inference(body),
        "toolConfig": tool_config,
        "outputConfig": _output_config(body, target),
        "serviceTier": _tier(body, target),
        "requestMetadata": body.metadata,
        "additionalModelRequestFields": additional,
        "guardrailConfig": _own(fields, "guardrailConfig"),
        "performanceConfig": _own(fields, "performanceConfig"),
    }
    return Outgoing(
        url=f"{model_url(target)}/{'converse-stream' if request.stream else 'converse'}",
        headers=_STREAMED if request.stream else _WHOLE,
        body=_encode({name: value for name, value in converse.items() if value}),
    )


def model_url(target: Target) -> str:
    """The model's place; an id may be an ARN, whose colons and slashes are no part of the path."""
    return f"{target.provider.base_url}/model/{quote(target.model, safe='')}"


def _own(fields: dict[str, Raw], name: str) -> Raw | None:
    value = fields.get(name)
    return None if value is None or bytes(value).strip() == b"null" else value


def _max_tokens(body: ChatBody) -> int | None:
    return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens


def _inference(body: ChatBody) -> Members:
    most = _max_tokens(body)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    members = {"maxTokens": most, "temperature": body.temperature, "topP": body.top_p, "stopSequences": stop or None}
    return {name: value for name, value in members.items() if value is not None}


def _additional(body: ChatBody, fields: dict[str, Raw], target: Target) -> Members:
    """What Converse has no member for, as the model's own vendor spells it; the client's own words come last."""
    members: Members = {}
    if body.reasoning_effort is not None:
        asked = effort(target.model, body.reasoning_effort, _max_tokens(body))
        if asked is None:
            why = f"the model has no equivalent of {body.reasoning_effort!r} for an answer of this length"
            raise cannot("reasoning_effort", target, why)
        members |= asked
    written = _own(fields, "additionalModelRequestFields")
    if written is not None:
        try:
            members |= _members.decode(written)
        except msgspec.DecodeError as error:
            raise InvalidRequest(
                f"`additionalModelRequestFields` must be an object: {error}.", param="additionalModelRequestFields"
            ) from None
    return members


def _has_budget(additional: Members) -> bool:
    thinking = additional.get("thinking")
    return isinstance(thinking, dict) and thinking["type"] == "enabled"


def _tier(body: ChatBody, target: Target) -> Members | None:
    if body.service_tier in (None, "auto", "default"):
        return None
    if body.service_tier not in TIERS:
        raise cannot("service_tier", target, f"Bedrock's tiers are default, {', '.join(sorted(TIERS))}")
    return {"type": body.service_tier}


# --- tools and structured output --------------------------------------------------------------------------------------


def _tool_config(body: ChatBody, messages: list[Members], target: Target) -> Members | None:
    specs, offered = [], body.tool_choice != "none"
    for place, tool in enumerate((body.tools or ()) if offered else ()):
        function = tool.function
        if function.name == ANSWER_TOOL:
            raise cannot(f"tools[{place}].function.name", target, f"{ANSWER_TOOL!r} is the gateway's own")
        spec: Members = {"name": function.name, "inputSchema": {"json": _object_schema(function.parameters)}}
        if function.description:
            spec["description"] = function.description
        if function.strict:
            spec["strict"] = True
        specs.append({"toolSpec": spec})
        if tool.cache_control is not None:
            specs.append(cache_point(tool.cache_control))
    schema = _schema(body, target)
    if schema is not None and not has_json_schema(target.model):
        return _with_answer_tool(body, specs, schema, target)
    if not specs:
        if _has_tool_blocks(messages):
            raise _calls_without_tools(target, offered)
        if body.tool_choice not in (None, "none", "auto"):
            raise InvalidRequest("`tool_choice` asks for a call, and `tools` is empty.", param="tool_choice")
        return None
    choice = _tool_choice(body)
    return {"tools": specs} if choice is None else {"tools": specs, "toolChoice": choice}


def _tool_choice(body: ChatBody) -> Members | None:
    if isinstance(body.tool_choice, NamedTool):
        return {"tool": {"name": body.tool_choice.function.name}}
    return {"auto": _AUTO, "required": {"any": {}}}.get(body.tool_choice or "")


def _has_tool_blocks(messages: list[Members]) -> bool:
    return any("toolUse" in block or "toolResult" in block for message in messages for block in message["content"])


def _calls_without_tools(target: Target, offered: bool) -> VendorCannot:
    if not offered:
        return cannot("tool_choice", target, "`none` leaves the tools out, and this conversation holds calls of them")
    return VendorCannot(
        f"`tools` is missing: {target.name} takes a conversation that holds tool calls only with their tools. Send "
        "them, or use another model.",
        param="tools",
    )


def _with_answer_tool(body: ChatBody, specs: list[Members], schema: JsonSchema, target: Target) -> Members:
    """The schema as the input of a tool. Beside the client's own tools the model may call those first."""
    if specs and body.tool_choice not in (None, "auto", "required"):
        raise cannot("response_format", target, "this model takes a schema as a tool, and `tool_choice` names another")
    spec = {
        "name": ANSWER_TOOL,
        "description": schema.description or f"Gives the answer, {schema.name}, to the user. Call it exactly once.",
        "inputSchema": {"json": _object_schema(schema.schema)},
    }
    choice = {"any": {}} if specs else {"tool": {"name": ANSWER_TOOL}}
    return {"tools": [*specs, {"toolSpec": spec}], "toolChoice": choice}


def _object_schema(written: Raw) -> Raw | Members:
    """A JSON schema as it came; without one, an object of no members."""
    if written == ABSENT or bytes(written).strip() == b"null":
        return {"type": "object", "properties": {}}
    return written


def _schema(body: ChatBody, target: Target) -> JsonSchema | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        raise cannot("response_format", target, "Bedrock has no JSON mode without a schema; name a `json_schema`")
    if wanted.json_schema is None:
        raise InvalidRequest("`response_format.json_schema` is missing.", param="response_format")
    return wanted.json_schema


def _output_config(body: ChatBody, target: Target) -> Members | None:
    schema = _schema(body, target)
    if schema is None or not has_json_schema(target.model):
        return None
    written: Members = {"name": schema.name, "schema": _text(_object_schema(schema.schema))}
    if schema.description:
        written["description"] = schema.description
    return {"textFormat": {"type": "json_schema", "structure": {"jsonSchema": written}}}


def _text(value: Raw | Members) -> str:
    return (bytes(value) if isinstance(value, Raw) else _encode(value)).decode()


# --- the conversation -------------------------------------------------------------------------------------------------


def _conversation(written: list[ChatMessage], target: Target) -> tuple[list[Members], list[Members]]:
    system: list[Members] = []
    messages: list[Members] = []
    documents = Documents()
    for place, message in enumerate(written):
        path = f"messages[{place}]"
        if message.name is not None and message.role != "tool":
            raise cannot(f"{path}.name", target)
        if message.role in ("system", "developer"):
            system += blocks_of(message, path, target, documents)
            continue
        if message.role == "tool":
            blocks = _tool_result(message, path, target, documents)
        elif message.role == "assistant":
            blocks = _assistant(message, path, target, documents)
        else:
            blocks = blocks_of(message, path, target, documents)
        role = "assistant" if message.role == "assistant" else "user"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += blocks
        elif blocks:
            messages.append({"role": role, "content": blocks})
    return system, messages


def _assistant(message: ChatMessage, path: str, target: Target, documents: Documents) -> list[Members]:
    blocks = reasoning_blocks(message, target)
    blocks += blocks_of(message, path, target, documents)
    if message.refusal:
        blocks.append({"text": message.refusal})
    for place, call in enumerate(message.tool_calls or ()):
        blocks.append({"toolUse": _tool_use(call, f"{path}.tool_calls[{place}]")})
    return blocks


def _tool_use(call: ToolCall, path: str) -> Members:
    written = (call.function.arguments or "").strip() or "{}"
    try:
        arguments = _members.decode(written)
    except (msgspec.DecodeError, RecursionError):
        param = f"{path}.function.arguments"
        raise InvalidRequest(f"`{param}` must be a JSON object, as text.", param=param) from None
    return {"toolUseId": call.id, "name": call.function.name, "input": arguments}


def _tool_result(message: ChatMessage, path: str, target: Target, documents: Documents) -> list[Members]:
    if not message.tool_call_id:
        raise InvalidRequest(f"`{path}.tool_call_id` is missing.", param=f"{path}.tool_call_id")
    blocks = blocks_of(message, path, target, documents)
    hints = [block for block in blocks if "cachePoint" in block]
    content = [block for block in blocks if "cachePoint" not in block]
    return [{"toolResult": {"toolUseId": message.tool_call_id, "content": content}}, *hints]
