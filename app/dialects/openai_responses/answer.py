"""Chat completions as Responses: whole answers, and the events of a stream.

The order is the same in both: reasoning, text, calls; then what a vendor wants back and has no words for. An item is
done when the next begins, and what the events told of it is what the last event has.
Source: OpenAI API reference, Responses and its streaming events.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Raw, Struct

from app.core import Usage
from app.dialects import completions, thoughts
from app.dialects.completions import Completion, Said, ToolCall, WrappedStream, add, is_same_thought, joined, sealed
from app.dialects.thoughts import Detail
from app.providers.openai_responses import text_bytes
from app.providers.translator import Answer, Frame, Kind, Stamp, StreamReader, Translator
from app.sse import frame

Item = dict[str, Any]
_encode = msgspec.json.encode
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""Why an answer has no end, by the reason in chat completions. Every other reason is an end."""
_TIERS = ("flex", "priority", "scale")
"""Service tiers that OpenAI has too. What vendors call their usual one is its `default`."""
_ECHOED: dict[str, Raw] = {
    "instructions": Raw(b"null"),
    "max_output_tokens": Raw(b"null"),
    "metadata": Raw(b"{}"),
    "parallel_tool_calls": Raw(b"true"),
    "prompt_cache_key": Raw(b"null"),
    "reasoning": Raw(b'{"effort":null,"summary":null}'),
    "safety_identifier": Raw(b"null"),
    "temperature": Raw(b"1.0"),
    "text": Raw(b'{"format":{"type":"text"}}'),
    "tool_choice": Raw(b'"auto"'),
    "tools": Raw(b"[]"),
    "top_logprobs": Raw(b"0"),
    "top_p": Raw(b"1.0"),
    "user": Raw(b"null"),
}
"""What a response says of its request, and what it says where the request is silent."""


# --- the response -----------------------------------------------------------------------------------------------------


def _response(stamp: Stamp, status: str, model: str | None, tier: str | None, **members: object) -> Item:
    request = stamp.request
    fields = {} if request is None else request.fields
    said = {name: value for name in _ECHOED if bytes(value := fields.get(name, _ECHOED[name])) != b"null"}
    return {
        "id": "resp_" + _own(stamp),
        "object": "response",
        "created_at": stamp.created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": model or stamp.model,
        "output": [],
        "previous_response_id": None,
        "service_tier": tier if tier in _TIERS else "default",
        "store": False,
        "truncation": "disabled",
        "usage": None,
        **_ECHOED,
        **said,
        **members,
    }


def _ended(
    stamp: Stamp, model: str | None, tier: str | None, reason: str | None, items: list[Item], usage: Any
) -> Item:
    """The response at its end."""
    why = _INCOMPLETE.get(reason or "")
    details = {"reason": why} if why else None
    status = "incomplete" if why else "completed"
    told = None if usage is None else usage_of(usage)
    return _response(stamp, status, model, tier, output=items, usage=told, incomplete_details=details)


def _own(stamp: Stamp) -> str:
    """The part of ids that is the answer's own."""
    return stamp.id.removeprefix("chatcmpl-").replace("-", "")


def usage_of(usage: Usage) -> Item:
    given, made = usage.total_input, usage.total_output
    written = usage.cache_write + usage.cache_write_1h
    return {
        "input_tokens": given,
        "input_tokens_details": {"cached_tokens": usage.cache_read, "cache_write_tokens": written},
        "output_tokens": made,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": given + made,
    }


# --- its items --------------------------------------------------------------------------------------------------------


def _reasoning(id: str, detail: Detail, status: str) -> Item:
    text = thoughts.text_of(detail)
    told = thoughts.packed({name: value for name, value in sealed(detail).items() if name not in ("text", "summary")})
    return {
        "id": id,
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": text}] if text else [],
        "encrypted_content": told if thoughts.unpacked(told) else None,
        "status": status,
    }


def _message(id: str, content: list[Item], status: str) -> Item:
    return {"id": id, "type": "message", "status": status, "role": "assistant", "content": content}


def _call(id: str, call: ToolCall, arguments: str, status: str) -> Item:
    """A vendor that gives its calls no id gets one of ours."""
    return {
        "id": id,
        "type": "function_call",
        "status": status,
        "call_id": call.id or id.replace("fc_", "call_"),
        "name": call.function.name or "",
        "arguments": arguments,
    }


def _text(text: str, annotations: list[Item], logprobs: list[Raw]) -> Item:
    return {"type": "output_text", "text": text, "annotations": annotations, "logprobs": logprobs}


def _refusal(text: str) -> Item:
    return {"type": "refusal", "refusal": text}


def _annotation(written: Item) -> Item:
    """Chat completions put what an annotation says into a member named like its type."""
    kind = written.get("type")
    inside = written.get(kind) if isinstance(kind, str) else None
    return {"type": kind, **inside} if isinstance(inside, dict) else written


def _arguments(written: str | None) -> str:
    """A call without arguments is one with an empty object."""
    return written if written and written.strip() not in ("", "null") else "{}"


def response(inner: Translator, body: bytes, stamp: Stamp) -> Answer:
    answer = inner.response(body, stamp)
    completion = completions.whole(answer.body)
    choice = completion.choices[0] if completion.choices else completions.Choice()
    said, ids = choice.message, _Ids(stamp)
    items = [_reasoning(ids.next("rs"), detail, "completed") for detail in joined(said.details)]
    parts = [_text(said.text, list(map(_annotation, said.annotations or ())), choice.tokens)] if said.text else []
    refusal = [_refusal(said.refusal)] if said.refusal else []
    calls = said.tool_calls or []
    if not calls or parts:
        items.append(_message(ids.next("msg"), parts + ([] if calls else refusal), "completed"))
    items += [_call(ids.next("fc"), call, _arguments(call.function.arguments), "completed") for call in calls]
    if calls and refusal:  # a stream tells it last
        items.append(_message(ids.next("msg"), refusal, "completed"))
    if (answer.finish_reason or "") in _INCOMPLETE:
        items[-1]["status"] = "incomplete"
    items += [_reasoning(ids.next("rs"), detail, "completed") for detail in said.late]
    whole = _ended(stamp, answer.model, answer.service_tier, answer.finish_reason, items, answer.usage)
    return msgspec.structs.replace(answer, body=_encode(whole))


class _Ids:
    """Ids of one answer's items, each with the prefix of its type."""

    def __init__(self, stamp: Stamp) -> None:
        self._own = _own(stamp)
        self.count = 0

    def next(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}_{self._own}{self.count - 1:02d}"


# --- streams ----------------------------------------------------------------------------------------------------------


class _Delta(Struct, omit_defaults=True):
    """The event of which a stream has the most."""

    type: str
    sequence_number: int
    item_id: str
    output_index: int
    delta: str
    content_index: int | msgspec.UnsetType = msgspec.UNSET
    summary_index: int | msgspec.UnsetType = msgspec.UNSET
    logprobs: list[Raw] | msgspec.UnsetType = msgspec.UNSET


class ResponsesEvents(WrappedStream):
    """Every chunk becomes events as it comes. What is true of the whole answer is told with the last ones."""

    keep_alive = b": \n\n"

    def __init__(self, inner: StreamReader, stamp: Stamp) -> None:
        super().__init__(inner, stamp)
        self._ids = _Ids(stamp)
        self._number = 0
        self._items: list[Item] = []
        """Those that are done, as the last event has them."""
        self._open = ""
        """Type of the item that is open, and its id."""
        self._id = ""
        self._written: list[str] = []
        """Of the open part: text, refusal, summary or arguments."""
        self._part = ""
        """Type of the open part of a message: text or refusal."""
        self._parts: list[Item] = []
        self._annotations: list[Item] = []
        self._logprobs: list[Raw] = []
        self._thought: Detail = {}
        self._call = ToolCall()
        self._late: list[Detail] = []

    def text_bytes(self, frame: bytes) -> int:
        return text_bytes(frame)

    def _told(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        for kind, data in frames:
            if kind is Kind.DONE:
                if ending := b"".join(self._ending()):
                    yield Kind.CONTENT, ending
                yield Kind.DONE, self._end()
                return
            events = b"".join(self._events(data))
            if events:
                yield Kind.CONTENT if self._open else Kind.START, events

    def _opening(self, chunk: Completion) -> Iterator[bytes]:
        begun = _response(self._stamp, "in_progress", chunk.model or self.model, self.service_tier)
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)

    def _grow(self, choice: completions.Choice) -> Iterator[bytes]:
        said = choice.delta or Said()
        for detail in said.details:
            yield from self._think(detail)
        if said.text:
            yield from self._write("output_text", said.text, choice.tokens)
        for annotation in said.annotations or ():
            yield from self._annotate(_annotation(annotation))
        if said.refusal:
            yield from self._write("refusal", said.refusal, [])
        for call in said.tool_calls or ():
            yield from self._grow_call(call)
        self._late += said.late

    # --- reasoning ----------------------------------------------------------------------------------------------------

    def _think(self, detail: Detail) -> Iterator[bytes]:
        """A thought is open until another begins: what is sealed of it is told with its end."""
        if self._open == "reasoning" and is_same_thought(self._thought, detail):
            add(self._thought, detail)
        else:
            yield from self._start("reasoning", "rs")
            self._thought = dict(detail)
            yield self._added(_reasoning(self._id, {}, "in_progress"))
        text = thoughts.text_of(detail)
        if text:
            if not self._written:
                part = {"type": "summary_text", "text": ""}
                yield self._of_item("response.reasoning_summary_part.added", summary_index=0, part=part)
            self._written.append(text)
            yield self._delta("response.reasoning_summary_text.delta", text, summary_index=0)

    def _thought_through(self) -> Iterator[bytes]:
        if self._written:
            text = "".join(self._written)
            yield self._of_item("response.reasoning_summary_text.done", summary_index=0, text=text)
            part = {"type": "summary_text", "text": text}
            yield self._of_item("response.reasoning_summary_part.done", summary_index=0, part=part)
        yield self._done(_reasoning(self._id, self._thought, "completed"))

    # --- a message ----------------------------------------------------------------------------------------------------

    def _write(self, kind: str, text: str, logprobs: list[Raw]) -> Iterator[bytes]:
        yield from self._in_part(kind)
        self._written.append(text)
        self._logprobs += logprobs
        if kind == "refusal":
            yield self._delta("response.refusal.delta", text, content_index=len(self._parts))
        else:
            yield self._delta("response.output_text.delta", text, content_index=len(self._parts), logprobs=logprobs)

    def _in_part(self, kind: str) -> Iterator[bytes]:
        """A message that is open at a part of this type."""
        if self._open != "message":
            yield from self._start("message", "msg")
            self._parts = []
            yield self._added(_message(self._id, [], "in_progress"))
        if self._part != kind:
            yield from self._part_done()
            self._part = kind
            part = _refusal("") if kind == "refusal" else _text("", [], [])
            yield self._of_item("response.content_part.added", content_index=len(self._parts), part=part)

    def _annotate(self, annotation: Item) -> Iterator[bytes]:
        yield from self._in_part("output_text")
        place = {"content_index": len(self._parts), "annotation_index": len(self._annotations)}
        self._annotations.append(annotation)
        yield self._of_item("response.output_text.annotation.added", **place, annotation=annotation)

    def _part_done(self) -> Iterator[bytes]:
        kind, self._part = self._part, ""
        if not kind:
            return
        text, place = "".join(self._written), len(self._parts)
        if kind == "refusal":
            part = _refusal(text)
            yield self._of_item("response.refusal.done", content_index=place, refusal=text)
        else:
            part = _text(text, self._annotations, self._logprobs)
            yield self._of_item("response.output_text.done", content_index=place, text=text, logprobs=self._logprobs)
        yield self._of_item("response.content_part.done", content_index=place, part=part)
        self._parts.append(part)
        self._written, self._annotations, self._logprobs = [], [], []

    # --- a call -------------------------------------------------------------------------------------------------------

    def _grow_call(self, call: ToolCall) -> Iterator[bytes]:
        if completions.begins(self._call if self._open == "function_call" else None, call):
            yield from self._start("function_call", "fc")
            self._call = call
            yield self._added(_call(self._id, call, "", "in_progress"))
        if call.function.arguments:
            self._written.append(call.function.arguments)
            yield self._delta("response.function_call_arguments.delta", call.function.arguments)

    # --- items --------------------------------------------------------------------------------------------------------

    def _start(self, kind: str, prefix: str) -> Iterator[bytes]:
        yield from self._stop()
        self._open, self._id, self._written = kind, self._ids.next(prefix), []

    def _stop(self, status: str = "completed") -> Iterator[bytes]:
        """Ends the item that is open, if one is."""
        kind = self._open
        if kind == "reasoning":
            yield from self._thought_through()
        elif kind == "message":
            yield from self._part_done()
            yield self._done(_message(self._id, self._parts, status))
        elif kind == "function_call":
            arguments = _arguments("".join(self._written))
            if not self._written:
                yield self._delta("response.function_call_arguments.delta", arguments)
            name = self._call.function.name or ""
            yield self._of_item("response.function_call_arguments.done", name=name, arguments=arguments)
            yield self._done(_call(self._id, self._call, arguments, status))

    def _ending(self) -> Iterator[bytes]:
        yield from self._begin(Completion())
        silent = not any(item["type"] in ("message", "function_call") for item in self._items)
        if silent and self._open in ("", "reasoning"):  # an answer has a message, if an empty one
            yield from self._start("message", "msg")
            self._parts = []
            yield self._added(_message(self._id, [], "in_progress"))
        yield from self._stop("incomplete" if (self.finish_reason or "") in _INCOMPLETE else "completed")
        self._open = ""
        for detail in self._late:
            yield from self._think(detail)
            yield from self._stop()
            self._open = ""

    def _end(self) -> bytes:
        whole = _ended(self._stamp, self.model, self.service_tier, self.finish_reason, self._items, self.usage)
        return self._event(f"response.{whole['status']}", response=whole)

    # --- events -------------------------------------------------------------------------------------------------------

    def _added(self, item: Item) -> bytes:
        return self._event("response.output_item.added", output_index=len(self._items), item=item)

    def _done(self, item: Item) -> bytes:
        self._items.append(item)
        return self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _of_item(self, type: str, **members: object) -> bytes:
        return self._event(type, item_id=self._id, output_index=len(self._items), **members)

    def _delta(self, type: str, delta: str, **members: Any) -> bytes:
        event = _Delta(type, self._number, self._id, len(self._items), delta, **members)
        self._number += 1
        return frame(_encode(event), type)

    def _event(self, type: str, **members: object) -> bytes:
        event = {"type": type, "sequence_number": self._number, **members}
        self._number += 1
        return frame(_encode(event), type)
