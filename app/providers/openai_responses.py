"""Responses relayed to OpenAI and Azure: the client's bytes in, the vendor's bytes out.

Only `model` is spliced into a request, and reasoning that another vendor sealed is taken out of it. Of an answer's
frames those that are mere deltas are told by their bytes; the others are decoded, for the ledger. A stream ends with
the event that has the whole answer. Where the vendor keeps the answer, its id is sealed (`stored`).
Source: OpenAI API reference, Responses and its streaming events.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlencode

import msgspec
from msgspec import Raw, Struct
from msgspec.structs import replace

from app.config import Target
from app.core import Usage
from app.errors import VendorBroke, VendorCannot, VendorError, VendorRefused
from app.providers import azure, openai, stored
from app.providers.chat_shape import cannot
from app.providers.translator import PACKED, Answer, Frame, Kind, Outgoing, Stamp, StreamReader, Translator, split
from app.sse import FrameSplitter, data_of, event_of, frame
from app.wire import ABSENT, ChatRequest, CompletionDetails, KeptRequest, OpenAIUsage, PromptDetails

_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_ENDS = ("response.completed", "response.incomplete", "response.failed")
_STARTS = frozenset(
    f"response.{name}" for name in ("created", "queued", "in_progress", "output_item.added", "content_part.added")
)
_UNDONE = (None, "queued", "in_progress", "cancelled")
_NOTHING = (b"", b"null")
_NULL = Raw(b"null")
_encode = msgspec.json.encode
_decode = msgspec.json.decode
_members = msgspec.json.Decoder(dict[str, Raw])


class _Usage(Struct):
    input_tokens: int | None = None
    output_tokens: int | None = None
    total_tokens: int | None = None
    input_tokens_details: PromptDetails | None = None
    output_tokens_details: CompletionDetails | None = None


class _Incomplete(Struct):
    reason: str | None = None


class _Item(Struct):
    type: str | None = None


class _Response(Struct):
    """A response, as far as the ledger needs it."""

    status: str | None = None
    model: str | None = None
    output: list[_Item] | None = None
    usage: _Usage | None = None
    incomplete_details: _Incomplete | None = None
    service_tier: str | None = None
    error: Raw = ABSENT


class _Event(Struct):
    type: str
    response: _Response | None = None
    delta: Raw = ABSENT
    error: Raw = ABSENT


_response = msgspec.json.Decoder(_Response)
_event = msgspec.json.Decoder(_Event)


def chat(request: ChatRequest, target: Target) -> Outgoing:
    """The client's members as they came; `model` becomes the target's. Raises VendorCannot."""
    return replace(_outgoing(request, target), url=target.provider.base_url + "/responses")


def _azure_chat(request: ChatRequest, target: Target) -> Outgoing:
    """Azure has Responses beside its deployments, not under them: the body names the deployment."""
    version = target.provider.api_version
    path = "/openai/v1/responses" if version is None else f"/openai/responses?api-version={version}"
    return replace(_outgoing(request, target), url=target.provider.base_url + path)


def _outgoing(request: ChatRequest, target: Target) -> Outgoing:
    fields = request.fields
    if request.stored:
        fields = _with_vendor_id(request, target)
    if PACKED in bytes(fields.get("input", ABSENT)):
        fields = fields | {"input": _without_foreign_reasoning(fields["input"])}
    if "store" in target.drop_params:  # left out, it would be kept
        target = replace(target, drop_params=target.drop_params - {"store"})
    return openai.outgoing(request, fields, target, stream_options=False)


def _with_vendor_id(request: ChatRequest, target: Target) -> dict[str, Raw]:
    """What the tenant's name of an answer stands for at this target. Raises VendorCannot."""
    asked = "store" if bytes(request.fields.get("store", ABSENT)) == b"true" else "previous_response_id"
    if target.provider.keys:
        raise cannot(asked, target, "its provider has several keys, and an answer is kept for one")
    written = _decode(request.fields.get("previous_response_id", _NULL))
    if not isinstance(written, str):
        return request.fields
    id = stored.vendor_id(written, request.owner, target.name)
    if id is None:
        raise VendorCannot(
            f"`previous_response_id` names no answer that {target.name} keeps for this tenant: name one that was asked "
            "for with `store: true`, by the same model, or send the turns before as items of `input`.",
            param="previous_response_id",
        )
    return request.fields | {"previous_response_id": Raw(_encode(id))}


def _without_foreign_reasoning(written: Raw) -> Raw:
    items = _decode(written)
    if not isinstance(items, list):
        return written
    return Raw(_encode([item for item in items if not _is_foreign(item)]))


def _is_foreign(item: Any) -> bool:
    if not isinstance(item, dict) or item.get("type") != "reasoning":
        return False
    sealed = item.get("encrypted_content")
    return isinstance(sealed, str) and sealed.startswith(PACKED.decode())


def response(body: bytes, stamp: Stamp) -> Answer:
    try:
        answer = _response.decode(body)
    except _UNREADABLE as error:
        raise VendorBroke("the vendor's answer is not a response") from error
    reason = _finish_reason(answer)
    usage = _usage_of(answer.usage)
    return Answer(
        body=_sealed(body, stamp) if _is_stored(stamp) else body,
        model=answer.model,
        usage=usage,
        finish_reason=reason,
        text_bytes=0 if usage else len(body),
        service_tier=answer.service_tier,
    )


def _finish_reason(answer: _Response) -> str:
    """In the words of chat completions. Raises VendorError for an answer that failed, or that has no end."""
    if answer.status == "failed" or bytes(answer.error) not in _NOTHING:
        raise openai.error_in_answer(answer.error)
    if answer.status == "incomplete":
        reason = answer.incomplete_details.reason if answer.incomplete_details else None
        return "content_filter" if reason == "content_filter" else "length"
    if answer.status in _UNDONE:
        raise VendorBroke("the vendor's response is not complete")
    called = any(item.type in ("function_call", "custom_tool_call") for item in answer.output or ())
    return "tool_calls" if called else "stop"


def _usage_of(usage: _Usage | None) -> Usage | None:
    if usage is None:
        return None
    return openai.usage_of(
        OpenAIUsage(
            prompt_tokens=usage.input_tokens,
            completion_tokens=usage.output_tokens,
            total_tokens=usage.total_tokens,
            prompt_tokens_details=usage.input_tokens_details,
            completion_tokens_details=usage.output_tokens_details,
        )
    )


def _is_stored(stamp: Stamp) -> bool:
    return stamp.request is not None and stamp.request.stored


def _sealed(body: bytes | Raw, stamp: Stamp) -> bytes:
    """A response under the names that its tenant may use: its own where it is kept, and that of the one before."""
    members = _members.decode(body)
    kept = bytes(stamp.request.fields.get("store", ABSENT)) == b"true"
    for name in ("id", "previous_response_id") if kept else ("previous_response_id",):
        id = _decode(members.get(name, _NULL))
        if isinstance(id, str):
            members[name] = Raw(_encode(stored.named(id, stamp.request.owner, stamp.target)))
    return _encode(members)


class ResponsesStream(StreamReader):
    """Frames as they came."""

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
            yield Kind.CONTENT, chunk
            return
        for one in split(self._splitter, chunk):
            yield self._scan(one), one

    def _scan(self, one: bytes) -> Kind:
        if not (self.started and _is_plain(one)) and (data := data_of(one)):
            try:
                event = _event.decode(data)
            except _UNREADABLE as fault:
                raise VendorBroke("the vendor sent an event that cannot be decoded") from fault
            if event.type == "error":
                raise openai.error_in_answer(Raw(data) if bytes(event.error) in _NOTHING else event.error)
            if event.response is not None:
                self._note(event.response)
            if event.type in _ENDS:
                self.finish_reason = _finish_reason(event.response or _Response())
                return Kind.DONE
            self.started = self.started or event.type not in _STARTS
        return Kind.CONTENT if self.started else Kind.START

    def _note(self, answer: _Response) -> None:
        self.model = answer.model or self.model
        self.service_tier = answer.service_tier or self.service_tier
        self.usage = _usage_of(answer.usage) or self.usage

    def end(self) -> Iterator[Frame]:
        yield Kind.DONE, b""

    def text_bytes(self, frame: bytes) -> int:
        return text_bytes(frame)


class StoredStream(ResponsesStream):
    """The same for an answer that is kept: events that have it say its sealed name."""

    __slots__ = ("_stamp",)

    def __init__(self, stamp: Stamp) -> None:
        super().__init__(stamp)
        self._stamp = stamp

    def feed(self, chunk: bytes) -> Iterator[Frame]:
        for kind, frames in super().feed(chunk):
            yield kind, frames if _is_plain(frames) else self._renamed(frames)

    def _renamed(self, one: bytes) -> bytes:
        members = _members.decode(data_of(one) or b"{}")
        if "response" not in members:
            return one
        members["response"] = Raw(_sealed(members["response"], self._stamp))
        return frame(_encode(members), event_of(one))


def _stream(stamp: Stamp) -> StreamReader:
    return StoredStream(stamp) if _is_stored(stamp) else ResponsesStream(stamp)


def _is_plain(frames: bytes) -> bool:
    """Whether these are whole frames of deltas; the bytes alone tell, as JSON has no bare line breaks in texts."""
    count = frames.count(b"\n\n")
    return (
        frames.startswith(b"event: response.")
        and frames.endswith(b"}\n\n")
        and frames.count(b"}\n\nevent: response.") == count - 1
        and frames.count(b".delta\ndata: {") == count
        and frames.find(b"\r") == -1
    )


def text_bytes(frames: bytes) -> int:
    """Size of the text, reasoning and arguments that frames of a stream of Responses carry."""
    size = 0
    for one in FrameSplitter().feed(frames):
        try:
            delta = bytes(_event.decode(data_of(one)).delta)
        except _UNREADABLE:
            continue
        size += max(len(delta) - 2, 0)
    return size


# --- answers that are kept --------------------------------------------------------------------------------------------


def _kept(request: KeptRequest, target: Target) -> Outgoing:
    """Raises VendorCannot."""
    return _of_kept(request, target, target.provider.base_url + "/responses/", {})


def _azure_kept(request: KeptRequest, target: Target) -> Outgoing:
    version = target.provider.api_version
    base = target.provider.base_url + ("/openai/v1/responses/" if version is None else "/openai/responses/")
    return _of_kept(request, target, base, {} if version is None else {"api-version": version})


def _of_kept(request: KeptRequest, target: Target, base: str, query: dict[str, str]) -> Outgoing:
    if target.provider.keys:
        raise cannot("id", target, "its provider has several keys by now, and an answer is kept for one")
    id = stored.vendor_id(request.name, request.owner, target.name)
    if id is None:
        raise VendorCannot(f"{target.name} keeps no answer of this name for this tenant.", param="id")
    url = base + quote(id, safe="") + ("/input_items" if request.items else "")
    asked = urlencode([*query.items(), *request.query])
    method = "DELETE" if request.operation == "delete" else "GET"
    return Outgoing(f"{url}?{asked}" if asked else url, (("accept", "application/json"),), b"", method)


def _told(body: bytes, request: KeptRequest, stamp: Stamp, headers: Mapping[str, str]) -> Answer:
    """What the vendor says, under the tenant's names; nothing, where it was deleted before. Nothing is charged.

    Raises VendorBroke.
    """
    if request.operation == "delete" and not body:
        return Answer(_encode({"id": request.name, "object": "response", "deleted": True}), None, Usage(), None, 0)
    try:
        members = _members.decode(body or b"{}")
        model = _response.decode(body).model if request.operation == "retrieve" and not request.items else None
        for name in () if request.items else ("id", "previous_response_id"):
            id = _decode(members.get(name, _NULL))
            if isinstance(id, str):
                members[name] = Raw(_encode(stored.named(id, request.owner, stamp.target)))
    except _UNREADABLE as fault:
        raise VendorBroke("the vendor's answer is not a response") from fault
    return Answer(_encode(members), model, Usage(), None, 0)


def _kept_error(status: int, headers: Mapping[str, str], body: bytes) -> VendorError:
    """An answer that is gone is no fault of the target's."""
    if status != 404:
        return openai.error(status, headers, body)
    message = "The vendor has no answer of this name any more: it was deleted, or kept for as long as it is kept there."
    return VendorRefused(message, kind="invalid_request_error", vendor_status=404, vendor_code="not_found", param="id")


KEEPERS: dict[tuple[str, str], Translator] = {
    ("kept", "openai"): replace(openai.OPENAI, passed=_kept, answered=_told, error=_kept_error),
    ("kept", "azure"): replace(azure.AZURE, passed=_azure_kept, answered=_told, error=_kept_error),
}
"""The same, of who is asked for an answer that it keeps."""
RESPONSES: dict[tuple[str, str], Translator] = {
    ("responses", "openai"): replace(openai.OPENAI, chat=chat, response=response, stream=_stream),
    ("responses", "azure"): replace(azure.AZURE, chat=_azure_chat, response=response, stream=_stream),
}
"""By dialect and kind."""
