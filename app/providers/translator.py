"""What a provider is: a frozen row of pure functions. `upstream.py` alone does the I/O.

The internal form is OpenAI's chat completions: a translator takes a `ChatRequest` and gives back bytes in that shape,
whatever its vendor speaks. Where the vendor speaks it too, the bytes are relayed as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum
from types import MappingProxyType

from msgspec import Struct

from app.config import Credential, Target
from app.core import Usage
from app.errors import VendorBroke, VendorCannot, VendorError
from app.sse import DONE, FrameSplitter
from app.wire import ChatRequest, CountRequest, EmbedRequest, PassedRequest, Request

MAX_FRAME_BYTES = 4_194_304
"""One event of a stream beyond this is broken. Images come as one event of a few MB at most."""


NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Outgoing(Struct, frozen=True):
    """One request to a vendor. Headers are built here, never copied from the client."""

    url: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    method: str = "POST"


class Stamp(Struct, frozen=True, gc=False):
    """What an answer needs and a vendor may lack, so that translators read no clock and make no ids.

    `id` is the answer's id in OpenAI's form (`chatcmpl-…`), `created` unix seconds, `model` the target's model. A
    dialect's answer may repeat what its `request` said, and name where it was answered: `target` is the target's name.
    """

    id: str
    created: int
    model: str
    request: Request | None = None
    target: str = ""


class Answer(Struct, frozen=True):
    """A whole answer: `body` in the internal form, and what it tells the ledger.

    `usage` is None where the vendor reported none; `text_bytes` is then the size of the text, for an
    estimate. `service_tier` is the vendor's word for how it answered (`priority`, `flex`, `batch`), which prices tell
    apart. `request_id` is the vendor's own where it stands in the body, not in a header. `content_type` is the body's.
    """

    body: bytes
    model: str | None
    usage: Usage | None
    finish_reason: str | None
    text_bytes: int
    service_tier: str | None = None
    request_id: str | None = None
    content_type: bytes = b"application/json"


class Kind(IntEnum):
    """What a frame of a stream means to the relay."""

    START = 0  # before the first content: held back, so that a failure can still fall back
    CONTENT = 1
    USAGE = 2  # usage alone: withheld from a client that did not ask for it
    DONE = 3  # the last frame


Frame = tuple[Kind, bytes]


class StreamReader:
    """One streamed answer: the vendor's bytes in, frames in the internal form out, and what the ledger needs kept.

    `finished` is True once the vendor has said why it stopped: a stream that ends before was cut. `prompt` is what the
    vendor told of the prompt's tokens before the answer, where it does: true also of a stream that is cut.
    """

    usage: Usage | None = None
    prompt: Usage | None = None
    model: str | None = None
    finish_reason: str | None = None
    service_tier: str | None = None
    request_id: str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def plain(self, chunk: bytes) -> bool:
        """Whether `feed` would give out `chunk` as it is, as content, and note nothing. False where that is unsure."""
        return False

    def feed(self, chunk: bytes) -> Iterator[Frame]:
        """The frames that `chunk` completes. Chunks are cut anywhere; a delta leaves with the chunk that brought it.

        Raises VendorError, after the frames before it, for an error event or bytes that are not the vendor's format.
        """
        raise NotImplementedError

    def end(self) -> Iterator[Frame]:
        """What is still owed where the vendor's bytes end without a terminator; DONE is the last."""
        yield Kind.DONE, DONE

    def text_bytes(self, frame: bytes) -> int:
        """Size of the text that a frame given out carries."""
        raise NotImplementedError


def split(splitter: FrameSplitter, chunk: bytes) -> list[bytes]:
    """The whole server-sent events up to the end of `chunk`. Raises VendorBroke for one without end."""
    frames = splitter.feed(chunk)
    if len(splitter.rest) > MAX_FRAME_BYTES:
        raise VendorBroke("the vendor sent an event without end")
    return frames


PACKED = b"gateway1:"
"""How sealed reasoning begins that the gateway packed for a client: a vendor that relays its own would refuse it."""

EXTRAS = frozenset({"cache_control", "reasoning_content", "reasoning_details"})
"""Members of the internal form that OpenAI's own chat completions have not: see `chat_shape`."""


class Translator(Struct, frozen=True):
    """Pure: no clock, no id, no log, no I/O.

    chat       the vendor's request for a chat call at a target; raises VendorCannot
    sign       the same with the credential on it; the float is the time, unix seconds
    response   reads a whole answer; raises VendorError
    stream     a fresh reader for one streamed answer
    error      what an HTTP status with its headers (lower-case names) and body means
    embed      the vendor's request for embeddings; None where it has none; raises VendorCannot
    embedded   reads the answer to it, whose tokens a vendor may count in a header; raises VendorError
    count      the vendor's request for the number of a prompt's tokens, or the answer where the vendor has none
    counted    reads the answer to it; raises VendorError
    passed     the vendor's request for one of its other routes, or for what it keeps; None where it has none; raises
               VendorCannot
    answered   reads the answer to it; raises VendorError
    request_id_header   where the vendor puts its own request id
    extras     members of `EXTRAS` that the vendor takes; a dialect that wraps this one writes no others
    """

    chat: Callable[[ChatRequest, Target], Outgoing]
    sign: Callable[[Outgoing, Credential, float], Outgoing]
    response: Callable[[bytes, Stamp], Answer]
    stream: Callable[[Stamp], StreamReader]
    error: Callable[[int, Mapping[str, str], bytes], VendorError]
    request_id_header: str
    embed: Callable[[EmbedRequest, Target], Outgoing] | None = None
    embedded: Callable[[bytes, EmbedRequest, Stamp, Mapping[str, str]], Answer] | None = None
    count: Callable[[CountRequest, Target], Outgoing | Answer] | None = None
    counted: Callable[[bytes, Stamp], Answer] | None = None
    passed: Callable[[PassedRequest, Target], Outgoing] | None = None
    answered: Callable[[bytes, PassedRequest, Stamp, Mapping[str, str]], Answer] | None = None
    extras: frozenset[str] = EXTRAS

    def outgoing(self, request: Request, target: Target) -> Outgoing | Answer:
        """The vendor's request for what the client wants, or the answer if no vendor is needed. Raises VendorCannot."""
        if request.operation == "chat":
            return self.chat(request, target)
        if request.operation == "count_tokens":
            return self.count(request, target)
        if request.operation == "embeddings" and self.embed is not None:
            return self.embed(request, target)
        if request.operation != "embeddings" and self.passed is not None:
            return self.passed(request, target)
        raise VendorCannot(f"{target.name} has no {request.serves}; use another model.", param="model")

    def answer(self, body: bytes, request: Request, stamp: Stamp, headers: Mapping[str, str] = NO_HEADERS) -> Answer:
        """Reads a whole answer to `request`. Raises VendorError."""
        if request.operation == "chat":
            return self.response(body, stamp)
        if request.operation == "count_tokens":
            return self.counted(body, stamp)
        if request.operation == "embeddings":
            return self.embedded(body, request, stamp, headers)
        return self.answered(body, request, stamp, headers)
