"""What the main port's routes are, for machines: an OpenAPI 3.1 document, made from the code that it describes.

Requests are described as far as the gateway reads them; their other members go on to vendors, whose references describe
them. A test holds the document to the route table.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct, field

from app.config import NAME
from app.errors import GatewayError, VendorError
from app.release import VERSION

Schema = dict[str, Any]
_ANY = {"type": "object"}
_FLAG = {"type": ["boolean", "null"]}
_COUNT = {"type": ["integer", "null"], "minimum": 1, "maximum": 128}
_LENGTH = {"type": ["integer", "null"], "minimum": 1, "maximum": 100_000_000}
_MODEL = {"type": "string", "pattern": f"^{NAME.pattern}$", "description": "The name of an alias: GET /v1/models."}
_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array"}]}
_LIST = {"type": "array", "items": _ANY}
_FILE = {"type": "string", "contentMediaType": "application/octet-stream"}
_TEXT = {"schema": {"type": "string"}}
_EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}
_JSON = {"application/json": {"schema": _ANY}}


class Call(Struct, frozen=True):
    """A route that takes calls: what it is, the members that it reads, and which of them have to be there.

    `form` is True where the request is a form. `made` are what an answer may be.
    """

    summary: str
    members: dict[str, Schema]
    required: tuple[str, ...]
    made: dict[str, Schema] = field(default_factory=lambda: {**_JSON, **_EVENTS})
    form: bool = False


_CHAT = {"messages": _LIST, "stream": _FLAG, "tools": {"type": ["array", "null"], "items": _ANY}}
_SOUND = {
    "audio/*": {"schema": {"type": "string"}},
    "application/octet-stream": {"schema": {"type": "string"}},
    **_EVENTS,
}
_WRITTEN = {**_JSON, **_EVENTS, "text/plain": _TEXT}
_TRANSCRIPT = {"file": _FILE, "response_format": {"type": "string"}, "language": {"type": "string"}}
_DRAWN = {"prompt": {"type": "string"}, "n": _COUNT, "stream": _FLAG}

CALLS: dict[str, Call] = {
    "/v1/chat/completions": Call(
        "Chat completions, OpenAI's dialect",
        {**_CHAT, "max_completion_tokens": _LENGTH, "max_tokens": _LENGTH, "n": _COUNT},
        ("messages",),
    ),
    "/v1/responses": Call(
        "Responses, OpenAI's dialect",
        {"input": _TEXTS, "stream": _FLAG, "store": _FLAG, "max_output_tokens": _LENGTH,
         "previous_response_id": {"type": ["string", "null"]}},
        ("input",),
    ),
    "/v1/messages": Call(
        "Messages, Anthropic's dialect", {**_CHAT, "max_tokens": {**_LENGTH, "type": "integer"}},
        ("messages", "max_tokens"),
    ),
    "/v1/messages/count_tokens": Call("Tokens of a prompt, Anthropic's dialect", _CHAT, ("messages",), _JSON),
    "/v1/embeddings": Call(
        "Embeddings",
        {"input": _TEXTS, "encoding_format": {"enum": ["float", "base64", None]}, "dimensions": _LENGTH},
        ("input",),
        _JSON,
    ),
    "/v1/completions": Call(
        "Legacy completions", {"prompt": _TEXTS, "max_tokens": _LENGTH, "n": _COUNT, "stream": _FLAG}, ("prompt",)
    ),
    "/v1/moderations": Call("Moderations", {"input": _TEXTS}, ("input",), _JSON),
    "/v1/audio/speech": Call(
        "Speech of a text", {"input": {"type": "string"}, "voice": {}, "stream_format": {"type": "string"}},
        ("input",), _SOUND,
    ),
    "/v1/audio/transcriptions": Call("Text of speech", _TRANSCRIPT, ("file",), _WRITTEN, form=True),
    "/v1/audio/translations": Call("English text of speech", _TRANSCRIPT, ("file",), _WRITTEN, form=True),
    "/v1/images/generations": Call("Images of a prompt", _DRAWN, ("prompt",)),
    "/v1/images/edits": Call("Images changed", {**_DRAWN, "image": _FILE}, ("prompt",), form=True),
}  # fmt: skip
_NAMED = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
_ID = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
_INCLUDE = {"name": "include", "in": "query", "schema": {"type": "array", "items": {"type": "string"}}}
_DAY = {"in": "query", "schema": {"type": "string", "format": "date"}}
GETS: dict[str, tuple[str, str, list[Schema], bool]] = {
    "/v1/responses/{id}": ("An answer that a vendor keeps for the tenant", "application/json", [_ID, _INCLUDE], True),
    "/v1/responses/{id}/input_items": (
        "What it was given to", "application/json",
        [_ID, _INCLUDE,
         {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1}},
         {"name": "order", "in": "query", "schema": {"enum": ["asc", "desc"]}},
         {"name": "after", "in": "query", "schema": {"type": "string"}}],
        True,
    ),
    "/v1/models": ("The aliases that the tenant may use", "application/json", [], True),
    "/v1/models/{name}": ("One of them", "application/json", [_NAMED], True),
    "/v1/usage": (
        "What the tenant has used, by day", "application/json",
        [{"name": "from", **_DAY}, {"name": "to", **_DAY},
         {"name": "environment", "in": "query", "schema": {"type": "string"}}],
        True,
    ),
    "/schema": ("This document", "application/json", [], False),
    "/status": ("How the gateway is", "application/json", [], False),
    "/health": ("Alive", "text/plain", [], False),
    "/health/live": ("Alive", "text/plain", [], False),
    "/health/liveliness": ("Alive, by LiteLLM's name", "text/plain", [], False),
    "/health/ready": ("Taking calls", "text/plain", [], False),
    "/health/readiness": ("Taking calls, by LiteLLM's name", "text/plain", [], False),
}  # fmt: skip
"""By path: what it is, its type, its parameters, and whether it asks for a credential."""
PAGES = {
    ("GET", "/usage"): "The usage page",
    ("GET", "/usage/usage.css"): "Its style",
    ("POST", "/usage/sign-in"): "Its sign-in",
    ("POST", "/usage/sign-out"): "Its sign-out",
}
"""For browsers."""
HEADERS = {
    "X-Tenant-Id": "On whose behalf, where the credential may act for several",
    "X-Feature-Id": "What of the app calls, for the ledger",
    "X-Request-Id": "Stands in the answer and in the row",
}


def document() -> Schema:
    paths: dict[str, Schema] = {path: {"post": _call(path, call)} for path, call in CALLS.items()}
    for path, (summary, kind, parameters, guarded) in GETS.items():
        paths[path] = {"get": _got(summary, kind, parameters, guarded)}
    paths["/v1/responses/{id}"]["delete"] = _got("Its deletion", "application/json", [_ID], True)
    for (method, path), summary in PAGES.items():
        shown = {"description": "For browsers", "content": {"text/*": {"schema": {"type": "string"}}}}
        page = {"summary": summary, "responses": {"200": shown, "303": {"description": "Another page"}, **_ERRORS}}
        paths.setdefault(path, {})[method.lower()] = page | {"security": []}
    return {
        "openapi": "3.1.0",
        "info": {"title": "LLM gateway", "version": VERSION},
        "paths": paths,
        "security": [{"bearer": []}, {"key": []}],
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "A gateway key, or an issuer's token"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
            "schemas": {"Error": _error(), "AnthropicError": _anthropic_error()},
            "responses": {"Error": _refusal()},
        },
    }


def _call(path: str, call: Call) -> Schema:
    members = {
        "type": "object",
        "required": ["model", *call.required],
        "properties": {"model": _MODEL, **call.members},
        "additionalProperties": True,
    }
    kind = "multipart/form-data" if call.form else "application/json"
    headers = [
        {"name": name, "in": "header", "description": told, "schema": {"type": "string"}}
        for name, told in HEADERS.items()
    ]
    return {
        "summary": call.summary,
        "operationId": path.removeprefix("/v1/").replace("/", "_"),
        "parameters": headers,
        "requestBody": {"required": True, "content": {kind: {"schema": members}}},
        "responses": {"200": {"description": "The answer, or its events", "content": call.made}, **_ERRORS},
    }


def _got(summary: str, kind: str, parameters: list[Schema], guarded: bool) -> Schema:
    content = {kind: {"schema": _ANY if kind == "application/json" else {"type": "string"}}}
    told = {
        "summary": summary,
        "parameters": parameters,
        "responses": {"200": {"description": summary, "content": content}},
    }
    told["responses"] |= _ERRORS
    return told if guarded else told | {"security": []}


_ERRORS = {"default": {"$ref": "#/components/responses/Error"}}


def codes() -> dict[str, int]:
    """Every code that an answer of the gateway's own may have, with its status."""
    found: dict[str, int] = {}

    def collect(kind: type[GatewayError]) -> None:
        for one in kind.__subclasses__():
            if not issubclass(one, VendorError):
                found[one.code] = one.status
                collect(one)

    collect(GatewayError)
    return dict(sorted(found.items()))


def _error() -> Schema:
    told = "; ".join(f"{code} {status}" for code, status in codes().items())
    inside = {
        "type": "object",
        "required": ["message", "type", "param", "code"],
        "properties": {
            "message": {"type": "string", "description": "A sentence that says what to do"},
            "type": {"type": "string"},
            "param": {"type": ["string", "null"], "description": "The member or header that is at fault"},
            "code": {"type": ["string", "null"], "description": f"The gateway's own: {told}; else the vendor's"},
            "limit": {"type": ["string", "null"], "description": "The limit that tripped"},
        },
    }
    return {"type": "object", "required": ["error"], "properties": {"error": inside}}


def _anthropic_error() -> Schema:
    inside = {
        "type": "object",
        "required": ["type", "message", "code"],
        "properties": {name: {"type": "string"} for name in ("type", "message", "code", "param", "limit")},
    }
    return {
        "type": "object",
        "required": ["type", "error", "request_id"],
        "properties": {"type": {"const": "error"}, "error": inside, "request_id": {"type": ["string", "null"]}},
    }


def _refusal() -> Schema:
    either = [{"$ref": f"#/components/schemas/{name}"} for name in ("Error", "AnthropicError")]
    return {
        "description": "What is wrong and what to do; in Anthropic's envelope for clients of its dialect",
        "headers": {
            "Retry-After": {"description": "Seconds; on 429 and 503", "schema": {"type": "integer"}},
            "X-Request-Id": {"schema": {"type": "string"}},
        },
        "content": {
            "application/json": {"schema": {"anyOf": either}},
            "text/html": {"schema": {"type": "string"}},
            "text/plain": {"schema": {"type": "string"}},
        },
    }
