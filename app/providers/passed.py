"""OpenAI's routes beside chat and embeddings, passed on: only `model` is spliced, and usage read from what comes back.

Where the vendor tells tokens, those count; else what it is paid by: characters spoken, seconds heard, images made.
Source: OpenAI API reference; Azure OpenAI REST API reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import msgspec
from msgspec import Raw, Struct
from msgspec.structs import replace

from app.config import Target
from app.core import Usage
from app.errors import VendorBroke, VendorCannot
from app.providers import azure, openai
from app.providers.openai import MAX_TOKENS, error_in_answer, usage_of
from app.providers.translator import Answer, Frame, Kind, Outgoing, Stamp, StreamReader, Translator, split
from app.sse import FrameSplitter, data_of, event_of
from app.wire import ABSENT, Field, OpenAIUsage, PassedRequest, Units

_encode = msgspec.json.encode
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_NOTHING = (b"", b"null")
_BOUNDARY = "gateway-form"
_TYPES = re.compile(r"(?:audio/[a-z0-9.+-]+|text/plain(?:; ?charset=utf-8)?|application/x-subrip|text/vtt)")
"""Of answers that are not JSON: sound, and transcripts as text. Another is passed as mere bytes."""


class _Details(Struct):
    text_tokens: int | None = None
    audio_tokens: int | None = None
    image_tokens: int | None = None


class _Usage(Struct):
    """All three shapes: chat's, that of images and transcripts by token, and seconds."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: _Details | None = None
    input_token_details: _Details | None = None
    seconds: float | None = None


class _Choice(Struct):
    finish_reason: str | None = None
    text: str | None = None


class _Answered(Struct):
    """An answer, or an event of a stream."""

    model: str | None = None
    usage: _Usage | None = None
    duration: float | None = None
    choices: list[_Choice] | None = None
    data: list[Raw] | None = None
    type: str | None = None
    delta: Raw = ABSENT
    error: Raw = ABSENT


_answered = msgspec.json.Decoder(_Answered)


# --- requests ---------------------------------------------------------------------------------------------------------


def outgoing(request: PassedRequest, target: Target) -> Outgoing:
    """Raises VendorCannot."""
    url = target.provider.base_url + request.path
    return replace(_form(request, target) if request.form else _json(request, target), url=url)


def _azure(request: PassedRequest, target: Target) -> Outgoing:
    if request.operation == "moderations":
        raise VendorCannot(f"{target.name} has no moderations; use another model.", param="model")
    return replace(outgoing(request, target), url=azure.url(target, request.path))


def _json(request: PassedRequest, target: Target) -> Outgoing:
    sent = openai.outgoing(request, request.fields, target, stream_options=request.operation == "completions")
    return replace(sent, headers=(("content-type", "application/json"), ("accept", "*/*")))


def _form(request: PassedRequest, target: Target) -> Outgoing:
    """The form's fields as they came, under a boundary that none of them has."""
    fields = [field for field in request.form if field.name not in target.drop_params]
    boundary = _BOUNDARY
    while any(boundary.encode() in field.value for field in fields):
        boundary += "-"  # each is longer than what any field has of the one before
    written = []
    for field in fields:
        value = target.model.encode() if field.name == "model" else field.value
        written.append(b"--%b\r\n%b\r\n\r\n%b\r\n" % (boundary.encode(), _head(field), value))
    written.append(b"--%b--\r\n" % boundary.encode())
    kind = f"multipart/form-data; boundary={boundary}"
    return Outgoing("", (("content-type", kind), ("accept", "*/*")), b"".join(written))


def _head(field: Field) -> bytes:
    head = b'content-disposition: form-data; name="%b"%b' % (field.name.encode(), field.file_name)
    return head + (b"\r\ncontent-type: " + field.content_type if field.content_type else b"")


# --- answers ----------------------------------------------------------------------------------------------------------


def answer(body: bytes, request: PassedRequest, stamp: Stamp, headers: Mapping[str, str]) -> Answer:
    """Raises VendorError."""
    kind = headers.get("content-type", "").lower()
    if not body:
        raise VendorBroke("the vendor's answer is empty")
    if not kind.startswith("application/json") and request.operation in ("speech", "transcriptions", "translations"):
        known = kind if _TYPES.fullmatch(kind) else "application/octet-stream"
        spoken = _in_units(request.units) if request.operation == "speech" else None
        return Answer(body, stamp.model, spoken, None, 0, content_type=known.encode())
    try:
        told = _answered.decode(body)
    except _UNREADABLE as fault:
        raise VendorBroke("the vendor's answer cannot be read") from fault
    if bytes(told.error) not in _NOTHING:
        raise error_in_answer(told.error)
    reason = told.choices[0].finish_reason if told.choices else None
    usage = _told(told, request)
    text = sum(len((choice.text or "").encode()) for choice in told.choices or ())
    return Answer(body, told.model, usage, reason, 0 if usage else text)


def _told(told: _Answered, request: PassedRequest) -> Usage | None:
    """What the answer says of what it is paid by; None where that has to be estimated."""
    if told.usage is not None and (usage := _in_tokens(told.usage, request)) is not None:
        return usage
    seconds = told.usage.seconds if told.usage and told.usage.seconds is not None else told.duration
    if seconds is not None and 0 <= seconds <= MAX_TOKENS:
        return Usage(seconds=-int(-seconds // 1))
    if request.operation in ("images", "image_edits"):
        return Usage(images=len(told.data)) if told.data else None
    return Usage() if request.operation == "moderations" else None


def _in_tokens(usage: _Usage, request: PassedRequest) -> Usage | None:
    if usage.prompt_tokens is not None:
        return usage_of(OpenAIUsage(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens))
    given, made = usage.input_tokens, usage.output_tokens or 0
    if given is None or not (0 <= given <= MAX_TOKENS and 0 <= made <= MAX_TOKENS):
        return None
    details = usage.input_tokens_details or usage.input_token_details or _Details()
    heard = min(max(details.audio_tokens or 0, 0), given)
    seen = min(max(details.image_tokens or 0, 0), given - heard)
    classes = {"input": given - heard - seen, "audio_input": heard, "image_input": seen}
    return Usage(**classes, **({"audio_output": made} if request.operation == "speech" else {"output": made}))


def _in_units(units: Units | None) -> Usage | None:
    return None if units is None else Usage(images=units.images, seconds=units.seconds, characters=units.characters)


class PassedStream(StreamReader):
    """Events as they came. Each is decoded: they are few, but for legacy completions."""

    def __init__(self, stamp: Stamp) -> None:
        self._request: PassedRequest = stamp.request  # type: ignore[assignment]
        self._splitter = FrameSplitter()
        self._over = False

    @property
    def finished(self) -> bool:
        """These streams end with an event that says so, or with usage; legacy completions with a reason."""
        return self._over or self.finish_reason is not None

    def feed(self, chunk: bytes) -> Iterator[Frame]:
        for one in split(self._splitter, chunk):
            yield self._scan(one), one

    def _scan(self, one: bytes) -> Kind:
        data = data_of(one)
        if data == b"[DONE]":
            return Kind.DONE
        if not data:
            return Kind.CONTENT
        try:
            told = _answered.decode(data)
        except _UNREADABLE as fault:
            raise VendorBroke("the vendor sent an event that cannot be decoded") from fault
        if bytes(told.error) not in _NOTHING or event_of(one) == "error":
            raise error_in_answer(told.error if bytes(told.error) not in _NOTHING else Raw(data))
        self.model = told.model or self.model
        usage = None if told.usage is None else _told(told, self._request)
        self.usage = usage or self.usage
        for choice in told.choices or ():
            self.finish_reason = choice.finish_reason or self.finish_reason
        self._over = self._over or (told.type or "").endswith((".done", ".completed"))
        return Kind.USAGE if usage is not None and told.choices == [] else Kind.CONTENT

    def text_bytes(self, frame: bytes) -> int:
        size = 0
        for one in FrameSplitter().feed(frame):
            try:
                told = _answered.decode(data_of(one))
            except _UNREADABLE:
                continue
            size += sum(len((choice.text or "").encode()) for choice in told.choices or ())
            size += max(0, len(bytes(told.delta)) - 2)
        return size


def passing(kind: str, spoken: Translator) -> Translator:
    """The translator of a vendor that has these routes."""
    return replace(spoken, passed=_azure if kind == "azure" else outgoing, answered=answer, stream=PassedStream)
