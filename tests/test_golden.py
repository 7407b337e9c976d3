"""The golden table of the translators: case x provider.

`tests/golden/requests/*.json` are clients' requests for chat, `tests/golden/embed_requests/*.json` for embeddings;
`tests/golden/<kind>/` holds what a vendor of that kind sends: `*.json` whole answers, `*.sse` streams, `*.events`
streams in AWS's binary form (a line is an event's type and payload, `!` marks an exception), `*.embedded`
embeddings, `*.http` errors (status, headers, empty line, body). The fixtures are ours, in the shapes of recorded
traffic. `tests/golden/<kind>.outcomes.json` is what becomes of each: the request or its refusal, what the ledger learns
of an answer and, where it is not relayed as it came, the answer as the client gets it. `RECORD=1` rewrites it, and the
difference is reviewed. A case of `openai_compatible` that begins with the name of a known vendor is that vendor's, and
requests stand there once more for each vendor that is sent something else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.config import Target
from app.dialects import openai_chat, openai_embeddings
from app.errors import VendorCannot, VendorError, VendorRefused
from app.providers import PROVIDERS
from app.providers.translator import Translator
from app.vendors import COMPATIBLE, COMPATIBLE_KIND
from app.wire import Request
from tests.translation import EMBED_MODELS, STAMP, event_stream, read_stream, target

GOLDEN = Path(__file__).parent / "golden"
Outcome = dict[str, Any]


def _request(kind: str, request: Request, at: Target) -> Outcome:
    translator = PROVIDERS[kind]
    try:
        unsigned = translator.outgoing(request, at)
    except VendorCannot as error:
        return {"raises": "VendorCannot", "param": error.param}
    outgoing = translator.sign(unsigned, at.provider.credential, STAMP.created)
    headers = [f"{name}: {value}" for name, value in outgoing.headers]
    return {"url": outgoing.url, "headers": headers, "body": outgoing.body.decode()}


def _answer(translator: Translator, content: bytes) -> Outcome:
    try:
        answer = translator.response(content, STAMP)
    except VendorError as error:
        return _error(error)
    facts = _facts(answer, "model", "finish_reason", "usage", "text_bytes")
    return facts if answer.body == content else facts | {"body": msgspec.json.decode(answer.body)}


def _stream(translator: Translator, content: bytes) -> Outcome:
    outcome = read_stream(translator, [content])
    facts = _facts(outcome, "model", "finish_reason", "usage", "text_bytes")
    facts |= _error(outcome.error) if outcome.error else {}
    if content.startswith(outcome.frames):
        return {"kinds": " ".join(outcome.kinds)} | facts
    frames = outcome.frames.decode().split("\n\n")
    return facts | {"frames": [f"{kind} {frame}" for kind, frame in zip(outcome.kinds, frames, strict=False)]}


def _events(translator: Translator, content: bytes) -> Outcome:
    return _stream(translator, event_stream(content.decode()))


def _embedded(translator: Translator, content: bytes) -> Outcome:
    """What a client gets that asked for numbers, and one that asked for base64, where it differs."""
    request = openai_embeddings.read(b'{"model":"embed-small","input":["a","b"]}')
    try:
        floats = translator.answer(content, request, STAMP)
        base64 = translator.answer(content, msgspec.structs.replace(request, encoding="base64"), STAMP)
    except VendorError as error:
        return _error(error)
    facts = _facts(floats, "model", "usage")
    if floats.body != content:
        facts |= {"body": floats.body.decode()}
    return facts if base64.body == floats.body else facts | {"in_base64": base64.body.decode()}


def _http(translator: Translator, content: bytes) -> Outcome:
    head, _, body = content.partition(b"\n\n")
    status, *lines = head.decode().splitlines()
    return _error(translator.error(int(status), dict(line.split(": ", 1) for line in lines), body))


def _error(error: VendorError) -> Outcome:
    facts = _facts(error, "retry", "vendor_status", "vendor_code", "param", "retry_after_seconds")
    said = _facts(error, "kind", "message") if isinstance(error, VendorRefused) else {}
    return {"raises": type(error).__name__} | facts | said


def _facts(of: object, *names: str) -> Outcome:
    """Those that say something, as JSON has them."""
    facts = {name: getattr(of, name) for name in names}
    if facts.get("usage") is not None:
        facts["usage"] = {name: tokens for name, tokens in msgspec.structs.asdict(facts["usage"]).items() if tokens}
    return {name: fact for name, fact in facts.items() if fact is not None}


READERS: dict[str, Callable[[Translator, bytes], Outcome]] = {
    ".json": _answer,
    ".sse": _stream,
    ".events": _events,
    ".embedded": _embedded,
    ".http": _http,
}


@cache
def outcomes(kind: str) -> dict[str, Outcome]:
    chats = sorted((GOLDEN / "requests").glob("*.json"))
    embeds = sorted((GOLDEN / "embed_requests").glob("*.json"))
    answers = sorted(path for path in (GOLDEN / kind).iterdir() if path.suffix in READERS)
    requests = {f"request {path.stem}": openai_chat.read(path.read_bytes()) for path in chats} | {
        f"embed request {path.stem}": openai_embeddings.read(path.read_bytes()) for path in embeds
    }
    at, embeds_at = target(kind), target(kind, EMBED_MODELS.get(kind))
    asked = {
        name: _request(kind, request, at if request.operation == "chat" else embeds_at)
        for name, request in requests.items()
    }
    spelled = {
        f"{vendor} {name}": outcome
        for vendor in (COMPATIBLE if kind == COMPATIBLE_KIND else ())
        for name, request in requests.items()
        if (outcome := _request(vendor, request, at)) != asked[name]
    }
    return (
        asked
        | spelled
        | {path.name: READERS[path.suffix](_translator(kind, path.stem), path.read_bytes()) for path in answers}
    )


def _translator(kind: str, case: str) -> Translator:
    """Of a compatible vendor where the case begins with the name of one."""
    vendor = case.partition("_")[0]
    return PROVIDERS[vendor if kind == COMPATIBLE_KIND and vendor in COMPATIBLE else kind]


@cache
def _recorded(kind: str) -> dict[str, Outcome]:
    path = GOLDEN / f"{kind}.outcomes.json"
    if os.environ.get("RECORD"):
        path.write_bytes(msgspec.json.format(msgspec.json.encode(outcomes(kind)), indent=2) + b"\n")
    return msgspec.json.decode(path.read_bytes())


KINDS = [kind for kind in PROVIDERS if kind not in COMPATIBLE]


@pytest.mark.parametrize("kind", KINDS)
def test_every_case_has_a_recorded_outcome_and_every_outcome_a_case(kind: str) -> None:
    assert list(_recorded(kind)) == list(outcomes(kind))


CASES = [(kind, case) for kind in KINDS for case in _recorded(kind)]


@pytest.mark.parametrize(("kind", "case"), CASES, ids=[f"{kind}-{case}" for kind, case in CASES])
def test_the_outcome_is_the_recorded_one(kind: str, case: str) -> None:
    assert outcomes(kind)[case] == _recorded(kind)[case]
