"""Parts that the translators' tests share: a target, a stream read to its end, a table of outcomes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from msgspec import Struct
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from app.config import Credential, Price, Provider, Secret, Target
from app.core import Usage
from app.errors import VendorError
from app.providers.translator import Frame, Kind, Stamp, StreamReader, Translator
from app.sse import FrameSplitter, data_of
from app.vendors import KINDS
from loadtest.simulator import event_stream as aws_events

STAMP = Stamp("chatcmpl-1", 1_767_225_600, "model-2026-01-01")
PRICE = Price(**dict.fromkeys(Price.__struct_fields__, 1))
CREDENTIALS = {
    "bedrock": Credential(Secret("vendor-key"), access_key_id="AKIDEXAMPLE", region="eu-central-1"),
}
"""Of vendors that want more than a key."""

MODELS = {"anthropic": "claude-sonnet-4-6", "bedrock": "eu.anthropic.claude-sonnet-4-5-20250929-v1:0"}
"""Where the words of a request depend on the model."""
EMBED_MODELS = {"bedrock": "amazon.titan-embed-text-v2:0"}


def target(kind: str, model: str | None = None) -> Target:
    """A target at a vendor of that kind; its credential is `vendor-key`."""
    model = model or MODELS.get(kind, "model-2026-01-01")
    version = "2024-10-21" if KINDS[kind].versioned else None
    credential = CREDENTIALS.get(kind, Credential(Secret("vendor-key")))
    provider = Provider(kind, kind, f"https://{kind.replace('_', '-')}.example/v1", credential, "eu", version)
    return Target(f"{kind}/{model}", provider, model, PRICE, True)


def event_stream(lines: str) -> bytes:
    """AWS's binary event stream of lines that each hold an event's type and payload; `!` before it: an exception."""
    written = []
    for line in lines.removesuffix("\n").split("\n"):
        kind, _, payload = line.partition(" ")
        write = aws_events.exception if kind.startswith("!") else aws_events.event
        written.append(write(kind.removeprefix("!"), payload.encode()))
    return b"".join(written)


class StreamOutcome(Struct, frozen=True):
    """What a relay gets from a stream: frames and their kinds up to the end or the error, and the ledger's facts."""

    kinds: tuple[str, ...]
    frames: bytes
    model: str | None
    finish_reason: str | None
    usage: Usage | None
    finished: bool
    text_bytes: int
    error: VendorError | None


def read_stream(translator: Translator, chunks: Iterable[bytes], stamp: Stamp = STAMP) -> StreamOutcome:
    """Splits and scans as the relay does; stops at the last frame or at the first error, as it does."""
    reader = translator.stream(stamp)
    kinds: list[str] = []
    frames: list[bytes] = []
    text_bytes = 0
    error = None
    try:
        for kind, frame in _frames(reader, chunks):
            kinds.append(kind.name)
            frames.append(frame)
            if kind is Kind.CONTENT:
                text_bytes += reader.text_bytes(frame)
            if kind is Kind.DONE:
                break
    except VendorError as raised:
        error = raised
    return StreamOutcome(
        tuple(kinds),
        b"".join(frames),
        reader.model,
        reader.finish_reason,
        reader.usage,
        reader.finished,
        text_bytes,
        error,
    )


def _frames(reader: StreamReader, chunks: Iterable[bytes]) -> Iterator[Frame]:
    for chunk in chunks:
        yield from reader.feed(chunk)
    if reader.finished:
        yield from reader.end()


def sdk_answer(body: bytes) -> dict[str, Any]:
    """A whole answer as OpenAI's SDK reads it, strictly, without what is null."""
    return _told(ChatCompletion.model_validate_json(body, extra="allow").to_dict())


def sdk_stream(frames: bytes) -> dict[str, Any]:
    """A stream as OpenAI's SDK accumulates it, in the form of `sdk_answer`."""
    state = ChatCompletionStreamState()
    for data in map(data_of, FrameSplitter().feed(frames)):
        if data != b"[DONE]":
            list(state.handle_chunk(ChatCompletionChunk.model_validate_json(data, extra="allow")))
    return _told(state.current_completion_snapshot.to_dict())


def _told(value: Any, within: str = "") -> Any:
    """Without nulls, and without the place that a call has in a stream alone."""
    if isinstance(value, list):
        return [_told(item, within) for item in value]
    if isinstance(value, dict):
        places = ("index",) if within == "tool_calls" else ()
        return {
            name: _told(item, name) for name, item in value.items() if item not in (None, []) and name not in places
        }
    return value
