"""The published shape of a ledger event, `cost-ledger-v1.json`: JSON schema, draft 2020-12, made from `LedgerEvent`."""

from __future__ import annotations

import types
import typing
from functools import cache
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct

from app.core import LedgerEvent

_USD = Annotated[float, Meta(description="USD, with at most nine decimals.")]
_UUID = {"type": "string", "pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"}
_MEMBERS: dict[str, dict[str, Any]] = {
    "$schema": {"const": "cost-ledger-v1"},
    "event_id": _UUID,
    "timestamp": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$"},
    "trace_id": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
    "adjusts": {"anyOf": [{"type": "null"}, _UUID], "default": None},
}
"""What the types do not tell."""


def ledger_schema() -> str:
    """The schema as indented JSON. Members may be added, none is renamed or taken away; one that has a default may be
    left out, and has it then.
    """
    _, parts = msgspec.json.schema_components([_written(LedgerEvent)], ref_template="#/$defs/{name}")
    event = parts.pop("LedgerEvent")
    event["properties"] |= _MEMBERS
    published = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "cost-ledger-v1.json",
        **event,
        "title": "An event of the LLM gateway's ledger",
        "$defs": dict(sorted(parts.items())),
    }
    return msgspec.json.format(msgspec.json.encode(published), indent=2).decode() + "\n"


@cache  # one class for each, or the schema has two of a name
def _written(shape: Any) -> Any:
    """A type as it is written: what is carried as `Raw` is an amount."""
    if shape is Raw:
        return _USD
    if isinstance(shape, type) and issubclass(shape, Struct):
        members = [(member.name, _written(member.type), _default(member)) for member in msgspec.structs.fields(shape)]
        tag = {"tag_field": shape.__struct_config__.tag_field, "tag": shape.__struct_config__.tag}
        return msgspec.defstruct(shape.__name__, members, namespace={"__doc__": shape.__doc__}, kw_only=True, **tag)
    origin = typing.get_origin(shape)
    if origin is tuple:
        return tuple[_written(typing.get_args(shape)[0]), ...]
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(map(_written, typing.get_args(shape)))]  # noqa: UP007
    return shape


def _default(member: msgspec.structs.FieldInfo) -> Any:
    if isinstance(member.default, Raw):
        return msgspec.json.decode(member.default)
    return msgspec.field() if member.required else member.default
