"""Answers told again: a stream folded into the whole answer, and a whole answer as a stream, in each dialect.

Only answers that are text to their end are: what holds anything else (calls, refusals, audio), was cut, or has a shape
that is not known here is None.
Source: OpenAI API reference, chat completions and Responses with their streaming events; Anthropic API reference,
Messages and Streaming Messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from msgspec import Struct

from app.core import Usage
from app.providers.chat_shape import usage_of
from app.sse import DONE, FrameSplitter, data_of, frame

PIECE_CHARACTERS = 24
"""Of a text in one event: about what vendors send at a time."""
_decode = msgspec.json.decode
_encode = msgspec.json.encode
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_NOTHING: tuple[Any, ...] = (None, "", [], {})
Json = dict[str, Any]


class Replay(Struct, frozen=True):
    """One dialect's.

    fold    a whole stream's frames, as the client got them, into the whole answer; the usage is for a stream that told
            the client none
    stream  a whole answer's frames; `True`: the usage among them, where the client may choose
    text    the answer's text; None: not an answer that is told again
    """

    fold: Callable[[bytes, Usage], bytes | None]
    stream: Callable[[bytes, bool], bytes]
    text: Callable[[bytes], str | None]


def _pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), PIECE_CHARACTERS):
        yield text[start : start + PIECE_CHARACTERS]


def _events(frames: bytes) -> Iterator[Json]:
    """Raises ValueError for what is no event of a good stream."""
    splitter = FrameSplitter()
    for one in splitter.feed(frames):
        data = data_of(one)
        if not data or data == b"[DONE]":
            continue
        event = _decode(data)
        if not isinstance(event, dict) or event.get("error") is not None:
            raise ValueError("not an event")
        yield event
    if splitter.rest:
        raise ValueError("cut")


def _guarded(fold: Callable[[bytes, Usage], Json | None]) -> Callable[[bytes, Usage], bytes | None]:
    """Shapes that are not the dialect's are None: no vendor's answer may be a defect here."""

    def folded(frames: bytes, usage: Usage) -> bytes | None:
        try:
            whole = fold(frames, usage)
        except (*_UNREADABLE, ValueError, TypeError, KeyError, IndexError, AttributeError):
            return None
        return None if whole is None else _encode(whole)

    return folded


def _read(text: Callable[[Json], str | None]) -> Callable[[bytes], str | None]:
    def read(body: bytes) -> str | None:
        try:
            found = text(_decode(body))
        except (*_UNREADABLE, ValueError, TypeError, KeyError, IndexError, AttributeError):
            return None
        return found if isinstance(found, str) else None

    return read


# --- chat completions -------------------------------------------------------------------------------------------------

_SAID = ("content", "reasoning_content", "reasoning")
"""Members of a message that are text; vendors call reasoning by either name."""


def _fold_chat(frames: bytes, usage: Usage) -> Json | None:
    top: Json = {}
    beside: Json = {}
    said: dict[str, str] = {}
    for event in _events(frames):
        top |= {name: value for name, value in event.items() if name not in ("choices", "obfuscation") and value}
        for choice in event.get("choices") or ():
            if choice.get("index", 0) != 0:
                return None
            for name, value in (choice.get("delta") or {}).items():
                if name in _SAID and (value is None or isinstance(value, str)):
                    said[name] = said.get(name, "") + (value or "")
                elif name != "role" and value not in _NOTHING:
                    return None
            beside |= {name: value for name, value in choice.items() if name not in ("delta", "index") and value}
    message = {"role": "assistant", "content": said.pop("content", ""), "refusal": None}
    message |= {name: text for name, text in said.items() if text}
    return top | {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "logprobs": None, **beside}],
        "usage": top.get("usage") or usage_of(usage),
    }


def _chat_text(whole: Json) -> str | None:
    (choice,) = whole["choices"]
    message = choice["message"]
    if choice["finish_reason"] != "stop" or choice.get("logprobs") is not None:
        return None
    if any(value not in _NOTHING for name, value in message.items() if name not in ("role", *_SAID)):
        return None
    return message["content"] or None


def _stream_chat(body: bytes, include_usage: bool) -> bytes:
    whole = _decode(body)
    choice, usage = whole["choices"][0], whole.get("usage")
    top = {name: value for name, value in whole.items() if name not in ("choices", "usage")}
    top["object"] = "chat.completion.chunk"

    def chunk(delta: Json, **end: Any) -> bytes:
        return frame(_encode(top | {"choices": [{"index": 0, "delta": delta, "finish_reason": None, **end}]}))

    frames = [chunk({"role": "assistant", "content": ""})]
    for name in reversed(_SAID):
        frames += [chunk({name: piece}) for piece in _pieces(choice["message"].get(name) or "")]
    end = {name: value for name, value in choice.items() if name not in ("index", "message")}
    frames.append(chunk({}, **end))
    if include_usage and usage is not None:
        frames.append(frame(_encode(top | {"choices": [], "usage": usage})))
    return b"".join([*frames, DONE])


# --- Messages ---------------------------------------------------------------------------------------------------------

_GROWS = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}
_BLOCKS = {"text": ("text",), "thinking": ("thinking", "signature"), "redacted_thinking": ()}
"""Types of blocks that are told again, with their members that a stream tells in deltas."""


def _fold_messages(frames: bytes, _: Usage) -> Json | None:
    message: Json = {}
    blocks: list[Json] = []
    for event in _events(frames):
        match event["type"]:
            case "message_start":
                message = dict(event["message"])
            case "content_block_start":
                blocks.append(dict(event["content_block"]))
            case "content_block_delta":
                delta = event["delta"]
                name = _GROWS[delta["type"]]
                blocks[event["index"]][name] = blocks[event["index"]].get(name, "") + delta[name]
            case "message_delta":
                message |= event["delta"]
                told = {name: value for name, value in (event.get("usage") or {}).items() if value is not None}
                message["usage"] = (message.get("usage") or {}) | told
            case "content_block_stop" | "message_stop" | "ping":
                pass
            case _:
                return None
    return message | {"content": blocks}


def _messages_text(whole: Json) -> str | None:
    if whole["stop_reason"] not in ("end_turn", "stop_sequence"):
        return None
    for block in whole["content"]:
        if block["type"] not in _BLOCKS or block.get("citations") not in _NOTHING:
            return None
    return "".join(block["text"] for block in whole["content"] if block["type"] == "text") or None


def _stream_messages(body: bytes, _: bool) -> bytes:
    whole = _decode(body)
    usage = whole.get("usage") or {}
    ends = {name: whole.get(name) for name in ("stop_reason", "stop_sequence", "stop_details") if name in whole}
    begun = whole | dict.fromkeys(ends) | {"content": [], "usage": usage | {"output_tokens": 0}}
    frames = [_event("message_start", message=begun)]
    for index, block in enumerate(whole["content"]):
        grows = _BLOCKS[block["type"]]
        frames.append(_event("content_block_start", index=index, content_block=block | dict.fromkeys(grows, "")))
        for kind, name in _GROWS.items():
            if name not in grows:
                continue
            text = block.get(name) or ""
            for piece in [text] if name == "signature" else _pieces(text):
                frames.append(_event("content_block_delta", index=index, delta={"type": kind, name: piece}))
        frames.append(_event("content_block_stop", index=index))
    frames += [_event("message_delta", delta=ends, usage=usage), _event("message_stop")]
    return b"".join(frames)


def _event(type: str, **members: Any) -> bytes:
    return frame(_encode({"type": type, **members}), type)


# --- Responses --------------------------------------------------------------------------------------------------------


def _fold_responses(frames: bytes, _: Usage) -> Json | None:
    """The last event has the whole answer."""
    whole = None
    for event in _events(frames):
        if event["type"] == "response.completed":
            whole = event["response"]
    return whole


def _responses_text(whole: Json) -> str | None:
    if whole["status"] != "completed":
        return None
    texts = []
    for item in whole["output"]:
        if item["type"] == "reasoning":
            continue
        if item["type"] != "message":
            return None
        for part in item["content"]:
            if part["type"] != "output_text" or part.get("annotations") not in _NOTHING or part.get("logprobs"):
                return None
            texts.append(part["text"])
    return "".join(texts) or None


def _stream_responses(body: bytes, _: bool) -> bytes:
    whole = _decode(body)
    frames: list[bytes] = []

    def tell(type: str, **members: Any) -> None:
        frames.append(_event("response." + type, sequence_number=len(frames), **members))

    begun = whole | {"status": "in_progress", "output": [], "usage": None}
    tell("created", response=begun)
    tell("in_progress", response=begun)
    for index, item in enumerate(whole["output"]):
        at = {"item_id": item.get("id"), "output_index": index}
        if item["type"] != "message":
            tell("output_item.added", output_index=index, item=item)
            tell("output_item.done", output_index=index, item=item)
            continue
        tell("output_item.added", output_index=index, item=item | {"status": "in_progress", "content": []})
        for place, part in enumerate(item["content"]):
            here = at | {"content_index": place}
            tell("content_part.added", **here, part=part | {"text": ""})
            for piece in _pieces(part["text"]):
                tell("output_text.delta", **here, delta=piece, logprobs=[])
            tell("output_text.done", **here, text=part["text"], logprobs=[])
            tell("content_part.done", **here, part=part)
        tell("output_item.done", output_index=index, item=item)
    tell("completed", response=whole)
    return b"".join(frames)


REPLAYS = {
    "chat": Replay(_guarded(_fold_chat), _stream_chat, _read(_chat_text)),
    "messages": Replay(_guarded(_fold_messages), _stream_messages, _read(_messages_text)),
    "responses": Replay(_guarded(_fold_responses), _stream_responses, _read(_responses_text)),
    "embeddings": Replay(lambda *_: None, lambda body, _: body, lambda body: ""),
}
"""By dialect. Of embeddings every answer is told again, and it has no text."""
