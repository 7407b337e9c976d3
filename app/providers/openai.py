"""OpenAI chat completions, and everything that speaks its shape: the body is relayed, not rewritten.

Source: OpenAI API reference; behaviours that differ from it are noted where they are read.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime

import msgspec
from msgspec import Raw

from app.config import Credential, Target
from app.core import Usage
from app.errors import (
    VendorBroke,
    VendorError,
    VendorFailed,
    VendorMisconfigured,
    VendorRefused,
    VendorThrottled,
)
from app.providers import embed_shape
from app.providers.translator import Answer, Frame, Kind, Outgoing, Stamp, StreamReader, Translator, split
from app.sse import FrameSplitter, data_of, event_of
from app.wire import (
    ChatRequest,
    EmbedRequest,
    OpenAIChunk,
    OpenAICompletion,
    OpenAIEmbeddings,
    OpenAIErrorBody,
    OpenAIUsage,
)

_completion = msgspec.json.Decoder(OpenAICompletion)
_chunk = msgspec.json.Decoder(OpenAIChunk)
_embeddings = msgspec.json.Decoder(OpenAIEmbeddings)
_items = msgspec.json.Decoder(list[dict[str, Raw]])
_error = msgspec.json.Decoder(OpenAIErrorBody)
_text = msgspec.json.Decoder(str)
_members = msgspec.json.Decoder(dict[str, Raw])
_encode = msgspec.json.encode
_EMPTY = (b"", b"null", b'""', b"[]")
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises on bytes that are not the JSON it was told to expect."""
MAX_TOKENS = 1_000_000_000
"""A count beyond this is no count; taken at its word it would not fit the ledger."""
_WHOLE = (("content-type", "application/json"), ("accept", "application/json"))
_STREAMED = (("content-type", "application/json"), ("accept", "text/event-stream"))
_INCLUDE_USAGE = b'{"include_usage":true}'


def chat(request: ChatRequest, target: Target) -> Outgoing:
    """The client's members as they came; `model` becomes the target's, and a stream is asked for its usage."""
    return outgoing(request, request.fields, target)


def outgoing(
    request: ChatRequest, fields: Mapping[str, Raw], target: Target, *, stream_options: bool = True
) -> Outgoing:
    """The same with `fields` in place of the client's, and no `stream_options` for a vendor that takes none."""
    if target.drop_params or not stream_options:
        left_out = target.drop_params if stream_options else target.drop_params | {"stream_options"}
        fields = {name: value for name, value in fields.items() if name not in left_out}
    written: dict[str, object] = {**fields, "model": target.model}
    if request.stream and stream_options and not request.include_usage:
        written["stream_options"] = Raw(_stream_options(fields.get("stream_options")))
    url = target.provider.base_url + "/chat/completions"
    return Outgoing(url, _STREAMED if request.stream else _WHOLE, _encode(written))


def sign(outgoing: Outgoing, credential: Credential, at: float) -> Outgoing:
    bearer = ("authorization", "Bearer " + credential.secret.reveal())
    return Outgoing(outgoing.url, (*outgoing.headers, bearer), outgoing.body, outgoing.method)


def _stream_options(written: Raw | None) -> bytes:
    """The client's own options with `include_usage` switched on."""
    if written is None or bytes(written).strip() == b"null":
        return _INCLUDE_USAGE
    return _encode(_members.decode(written) | {"include_usage": Raw(b"true")})


def usage_of(usage: OpenAIUsage | None) -> Usage | None:
    """Disjoint classes: cached, written and audio tokens are inside the prompt's count, reasoning inside the answer's.

    They sum to the vendor's totals, so a part never exceeds what is left of its whole: xAI has reported 161 cached
    tokens of a prompt of 7, OpenRouter 11 reasoning tokens of an answer of 10. xAI's own API counts reasoning beside
    the answer, which its total tells.
    """
    if usage is None or usage.prompt_tokens is None:
        return None
    prompt, completion = usage.prompt_tokens, usage.completion_tokens or 0
    if not (0 <= prompt <= MAX_TOKENS and 0 <= completion <= MAX_TOKENS):
        return None
    given, made = usage.prompt_tokens_details, usage.completion_tokens_details
    if not (given and (given.cached_tokens or given.cache_write_tokens or given.audio_tokens)):
        given = None
    if not (made and (made.reasoning_tokens or made.audio_tokens)):
        made = None
    if given is made is None:
        return Usage(input=prompt, output=completion)
    cached = written = audio_input = reasoning = audio_output = 0
    if given is not None:
        cached, prompt = _part(given.cached_tokens, prompt)
        written, prompt = _part(given.cache_write_tokens, prompt)
        audio_input, prompt = _part(given.audio_tokens, prompt)
    if made is not None:
        if usage.total_tokens == usage.prompt_tokens + completion + (made.reasoning_tokens or 0):
            completion += min(max(made.reasoning_tokens or 0, 0), MAX_TOKENS)
        reasoning, completion = _part(made.reasoning_tokens, completion)
        audio_output, completion = _part(made.audio_tokens, completion)
    return Usage(
        input=prompt,
        cache_read=cached,
        cache_write=written,
        audio_input=audio_input,
        output=completion,
        reasoning=reasoning,
        audio_output=audio_output,
    )


def _part(tokens: int | None, whole: int) -> tuple[int, int]:
    """The part, and what is left of the whole."""
    if not tokens:
        return 0, whole
    part = min(max(tokens, 0), whole)
    return part, whole - part


def response(body: bytes, stamp: Stamp) -> Answer:
    try:
        answer = _completion.decode(body)
    except _UNREADABLE as error:
        raise VendorBroke("the vendor's answer is not a chat completion") from error
    if bytes(answer.error) not in _EMPTY:
        raise error_in_answer(answer.error)
    if not answer.choices:
        raise VendorBroke("the vendor's answer has no choices")
    usage = usage_of(answer.usage)
    return Answer(
        body=body,
        model=answer.model,
        usage=usage,
        finish_reason=answer.choices[0].finish_reason,
        text_bytes=0 if usage else sum(len(bytes(choice.message)) for choice in answer.choices),
        service_tier=_tier(answer.service_tier),
    )


def embed(request: EmbedRequest, target: Target) -> Outgoing:
    """The client's members as they came; `model` becomes the target's."""
    fields = {name: value for name, value in request.fields.items() if name not in target.drop_params}
    return Outgoing(
        url=target.provider.base_url + "/embeddings",
        headers=_WHOLE,
        body=_encode(fields | {"model": target.model}),
    )


def embedded(body: bytes, request: EmbedRequest, stamp: Stamp, headers: Mapping[str, str]) -> Answer:
    """Relays the body; a vendor that writes numbers whatever it is asked for has them turned into base64."""
    try:
        answer = _embeddings.decode(body)
    except _UNREADABLE as error:
        raise VendorBroke("the vendor's answer is not a list of embeddings") from error
    if bytes(answer.error) not in _EMPTY:
        raise error_in_answer(answer.error)
    if not answer.data:
        raise VendorBroke("the vendor's answer has no embeddings")
    if request.encoding == "base64" and any(bytes(one.embedding)[:1] == b"[" for one in answer.data):
        body = _with_base64(body)
    usage = answer.usage
    tokens = None if usage is None else usage.total_tokens if usage.prompt_tokens is None else usage.prompt_tokens
    return Answer(
        body=body,
        model=answer.model,
        usage=None if tokens is None or not 0 <= tokens <= MAX_TOKENS else Usage(embedding=tokens),
        finish_reason=None,
        text_bytes=0,
    )


def _with_base64(body: bytes) -> bytes:
    members = _members.decode(body)
    items = _items.decode(members["data"])
    for item in items:
        if bytes(item["embedding"])[:1] == b"[":
            item["embedding"] = Raw(embed_shape.in_base64(item["embedding"]))
    return _encode(members | {"data": items})


def _tier(written: Raw) -> str | None:
    """A service tier that is text: vendors that copy the shape need not copy the type."""
    try:
        return _text.decode(written) if bytes(written)[:1] == b'"' else None
    except _UNREADABLE:
        return None


def error_in_answer(written: Raw) -> VendorError:
    """An error object inside a 200: OpenRouter and Groq report a failure that way, `code` often being a status."""
    error = _decoded_error(written)
    code = "429" if error.code == "rate_limit_exceeded" else str(error.code)
    if code in _STATUSES:
        return _error_by_status(int(code), error, None)
    return VendorFailed(
        "the vendor reported an error inside its answer",
        vendor_code=None if error.code is None else str(error.code),
    )


class OpenAIStream(StreamReader):
    """Relays the frames as they are. Every one before the first content is decoded; after it, those only that a byte
    scan picks out.
    """

    __slots__ = ("_splitter", "finish_reason", "model", "service_tier", "started", "usage")

    def __init__(self, stamp: Stamp) -> None:
        self.usage = None
        self.model = None
        self.finish_reason = None
        self.service_tier = None
        self.started = False
        self._splitter = FrameSplitter()

    def plain(self, chunk: bytes) -> bool:
        return self.started and not self._splitter.rest and _is_plain(chunk)

    def feed(self, chunk: bytes) -> Iterator[Frame]:
        if self.plain(chunk):
            yield Kind.CONTENT, chunk  # whole frames of mere content: most chunks of most streams
            return
        for frame in split(self._splitter, chunk):
            yield self.scan(frame), frame

    def scan(self, frame: bytes) -> Kind:
        """What one frame means."""
        return Kind.CONTENT if self.started and _is_plain(frame) else self._decode(frame)

    def _decode(self, frame: bytes) -> Kind:
        data = data_of(frame)
        if data == b"[DONE]":
            return Kind.DONE
        if event_of(frame) == "error":  # Groq: an error event inside a 200 stream
            raise self._event_error(data)
        if not data:  # a comment: OpenRouter's keep-alive
            return Kind.CONTENT if self.started else Kind.START
        try:
            chunk = _chunk.decode(data)
        except _UNREADABLE as error:
            raise VendorBroke("the vendor sent an event that cannot be decoded") from error
        if chunk.model:
            self.model = chunk.model
        self.service_tier = _tier(chunk.service_tier) or self.service_tier
        usage = usage_of(chunk.usage)
        if usage is not None:
            self.usage = usage
        if bytes(chunk.error) not in _EMPTY:  # OpenRouter reports the usage of a failed answer beside its error
            raise error_in_answer(chunk.error)
        for choice in chunk.choices or ():
            if choice.finish_reason:
                self.finish_reason = choice.finish_reason
                self.started = True
            elif not self.started and choice.delta is not None and _has_content(choice.delta):
                self.started = True
        if usage is not None and not chunk.choices:
            return Kind.USAGE
        return Kind.CONTENT if self.started else Kind.START

    def _event_error(self, data: bytes) -> VendorError:
        try:
            return error_in_answer(_members.decode(data).get("error", Raw(data)))
        except _UNREADABLE:
            return VendorFailed("the vendor sent an error event")

    def text_bytes(self, frame: bytes) -> int:
        return text_bytes(frame)


def _is_plain(frames: bytes) -> bool:
    """Whether these are whole frames with nothing in them but content; the bytes alone tell."""
    return (
        frames.startswith(b"data: {")
        and frames.endswith(b"}\n\n")
        and frames.count(b"\n\n") == frames.count(b"}\n\ndata: {") + 1
        and frames.count(b'"usage"') == frames.count(b'"usage":null')
        and frames.count(b'"finish_reason"') == frames.count(b'"finish_reason":null')
        and frames.find(b'"error"') == -1  # `in` takes what it looks for for a number first: an exception each time
        and frames.find(b"\r") == -1
    )


def text_bytes(frames: bytes) -> int:
    """Size of the text that frames in OpenAI's shape carry."""
    size = 0
    for frame in FrameSplitter().feed(frames):
        try:
            chunk = _chunk.decode(data_of(frame))
        except _UNREADABLE:
            continue
        size += sum(
            len(bytes(part)) - 2
            for choice in chunk.choices or ()
            if choice.delta is not None
            for part in msgspec.structs.astuple(choice.delta)
            if bytes(part) not in _EMPTY
        )
    return size


def _has_content(delta: msgspec.Struct) -> bool:
    return any(bytes(part) not in _EMPTY for part in msgspec.structs.astuple(delta))


def error(status: int, headers: Mapping[str, str], body: bytes) -> VendorError:
    """Status decides first, then the vendor's exact code."""
    return _error_by_status(status, _error_body(body), retry_after(headers))


_STATUSES = frozenset(map(str, range(400, 600)))


def _error_by_status(status: int, written: OpenAIErrorBody, wait_seconds: float | None) -> VendorError:
    code = None if written.code is None else str(written.code)
    facts = {"vendor_status": status, "vendor_code": code}
    if status == 403 and b'"flagged_input"' in bytes(written.metadata):  # OpenRouter: this prompt, not our key
        facts["vendor_code"] = "content_filter"
        return VendorRefused(written.message or "The vendor's moderation flagged the request.", **facts)
    if status in (401, 402, 403, 404) or code == "insufficient_quota":  # the latter: OpenAI's 429 of an unpaid account
        return VendorMisconfigured(f"the vendor answered {status}", **facts)
    if status == 429:
        return VendorThrottled("the vendor throttled", retry_after_seconds=wait_seconds, **facts)
    if status in (408, 409) or status >= 500 or status < 400:
        return VendorFailed(f"the vendor answered {status}", retry_after_seconds=wait_seconds, **facts)
    return VendorRefused(
        written.message or f"The vendor refused the request with status {status}.",
        kind=written.type,
        param=written.param,
        **facts,
    )


def _error_body(body: bytes) -> OpenAIErrorBody:
    """The envelope as OpenAI writes it, or flat, or `error` as a plain string beside a `code` (xAI), or not JSON."""
    try:
        members = _members.decode(body)
    except _UNREADABLE:
        return OpenAIErrorBody()
    inner = members.get("error", Raw(body))
    if bytes(inner)[:1] == b'"':
        members["message"] = inner
        inner = Raw(_encode(members))
    return _decoded_error(inner)


def _decoded_error(written: Raw) -> OpenAIErrorBody:
    try:
        return _error.decode(written)
    except _UNREADABLE:
        return OpenAIErrorBody()


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds the vendor asks for. Azure sends `Retry-After: 1` with `Retry-After-Ms: 0`: the longer one stands.

    A date (RFC 9110, 10.2.3) is measured by the `Date` of the same answer, the vendor's own clock. Without either, the
    reset of what is used up counts: `x-ratelimit-reset-tokens: 6m0s` beside `x-ratelimit-remaining-tokens: 0`.
    """
    waits = []
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            waits.append(float(headers[name]) * scale)
        except (KeyError, ValueError):
            continue
    if not waits and "retry-after" in headers and "date" in headers:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            until, now = (parsedate_to_datetime(headers[name]) for name in ("retry-after", "date"))
            waits.append((until - now).total_seconds())
    if not waits:
        waits = [
            _seconds(headers.get(f"x-ratelimit-reset-{what}", ""))
            for what in ("requests", "tokens")
            if headers.get(f"x-ratelimit-remaining-{what}") == "0"
        ]
    return max((w for w in waits if 0 <= w < 86_400), default=None)


_DURATION = re.compile(r"(?:(\d{1,4})h)?(?:(\d{1,4})m(?!s))?(?:(\d{1,6}(?:\.\d{1,9})?)s)?(?:(\d{1,9})ms)?")


def _seconds(duration: str) -> float:
    """OpenAI's form, `1h2m3.5s` or `120ms`; what is not one is taken for no time at all."""
    match = _DURATION.fullmatch(duration)
    hours, minutes, seconds, ms = match.groups("0") if match else ("0",) * 4
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds) + int(ms) / 1000


OPENAI = Translator(
    chat=chat,
    sign=sign,
    response=response,
    stream=OpenAIStream,
    error=error,
    request_id_header="x-request-id",
    embed=embed,
    embedded=embedded,
    extras=frozenset(),
)
