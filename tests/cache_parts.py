"""What the tests of the cache share: calls that ask it, under an alias that has one."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from app.cache.partition import Ask, ask
from app.config import Alias, AliasCache, Config, Price, Tenant
from app.core import Call, Wishes
from app.dialects import ROUTES
from tests import gateway_parts
from tests.redis_parts import AMBIENT

ALIAS = gateway_parts.ALIAS
POLICY = AliasCache("exact", 3600.0, 0.0, None, b"models")
PRICE = Price(**dict.fromkeys(Price.__struct_fields__, 1_000_000_000))
"""A dollar for a million tokens of any kind."""
QUESTION = [{"role": "user", "content": "What is your refund policy?"}]


def alias(mode: str = "exact", name: str = ALIAS, **policy: Any) -> Alias:
    kept = msgspec.structs.replace(POLICY, mode=mode, **policy)
    plain = gateway_parts.config().aliases[ALIAS]
    priced = msgspec.structs.replace(plain.targets[0], price=PRICE, priced=True)
    return msgspec.structs.replace(plain, name=name, targets=(priced,), cache=kept)


def tenant(name: str = "acme-corp", **cache: Any) -> Tenant:
    plain = Tenant(name, "standard", "standard", None)
    return msgspec.structs.replace(plain, cache=msgspec.structs.replace(plain.cache, **cache))


def config(mode: str = "exact", **policy: Any) -> Config:
    return msgspec.structs.replace(gateway_parts.config(), aliases={ALIAS: alias(mode, **policy)})


def body(**fields: Any) -> bytes:
    """A chat request whose answer may be kept."""
    return json.dumps({"model": ALIAS, "messages": QUESTION, "temperature": 0, **fields}).encode()


def call(written: bytes | None = None, *, path: str = "/v1/chat/completions", **fields: Any) -> Call:
    return gateway_parts.call(body() if written is None else written, AMBIENT, dialect=ROUTES[path], **fields)


def asked(
    written: bytes | None = None, *, by: Tenant | None = None, of: Alias | None = None, epoch: str = "",
    wishes: Wishes | None = None, rule: str | None = None, path: str = "/v1/chat/completions", **fields: Any,
) -> Ask:  # fmt: skip
    """What a call asks of the cache."""
    made = call(written, path=path, wishes=wishes, **fields)
    return ask(made, made.dialect.read(made.body), by or tenant(), of or alias(), rule, epoch)
