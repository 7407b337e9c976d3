"""Parts that the translators' tests share: a target, a stream read to its end, a table of outcomes."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from app.config import Credential, Price, Provider, Secret, Target
from app.core import Usage
from app.errors import VendorError
from app.providers.translator import Kind, Stamp, Translator
from app.vendors import KINDS

STAMP = Stamp("chatcmpl-1", 1_767_225_600, "model-2026-01-01")
PRICE = Price(**dict.fromkeys(Price.__struct_fields__, 1))


def target(kind: str, model: str = "model-2026-01-01") -> Target:
    """A target at a vendor of that kind; its credential is `vendor-key`."""
    version = "2024-10-21" if KINDS[kind].versioned else None
    provider = Provider(
        kind, kind, f"https://{kind.replace('_', '-')}.example/v1", Credential(Secret("vendor-key")), "eu", version
    )
    return Target(f"{kind}/{model}", provider, model, PRICE, True)


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


def read_stream(translator: Translator, chunks: Iterable[bytes]) -> StreamOutcome:
    """Splits and scans as the relay does; stops at the first error, as it does."""
    reader = translator.stream(STAMP)
    kinds: list[str] = []
    frames: list[bytes] = []
    text_bytes = 0
    error = None
    try:
        for chunk in chunks:
            for kind, frame in reader.feed(chunk):
                kinds.append(kind.name)
                frames.append(frame)
                if kind is Kind.CONTENT:
                    text_bytes += reader.text_bytes(frame)
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
