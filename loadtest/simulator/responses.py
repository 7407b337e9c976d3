"""OpenAI's Responses: the same content as chat completions, in items, and in events that are numbered.

An answer that is kept (`store`, which is true unless it is said) can be gone on from: any id of the right form is one.
The last of them can be asked for, and deleted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from msgspec import Struct

from loadtest.simulator.content import Ask, Choice, Content, Function, Message, Tool, content_of
from loadtest.simulator.identity import hexadecimal

Item = dict[str, Any]
_ID = re.compile(r"resp_[0-9a-f]{48}")
_PADDING = "0123456789abcdef"
KEPT: dict[tuple[str, str], tuple[Item, list[Item]]] = {}
"""Answers that can be asked for, by vendor and id, each with the items that it was given to."""
MOST_KEPT = 1_000
KEPT_TOKENS = 50
"""What the turns before count that the vendor has kept."""


class ResponsesAsk(Struct):
    """The part of a request that steers the answer; the rest is repeated in it."""

    model: str
    input: str | list[Item] = ""
    instructions: str | None = None
    stream: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    tools: list[Item] | None = None
    tool_choice: str | Item | None = None
    parallel_tool_calls: bool | None = None
    text: Item | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None


read = msgspec.json.Decoder(ResponsesAsk).decode


def in_chat(ask: ResponsesAsk) -> Ask:
    """The same question in chat completions."""
    written = (ask.text or {}).get("format") or {}
    schema = {"type": "json_schema", "json_schema": written} if written.get("type") == "json_schema" else written
    choice = ask.tool_choice
    return Ask(
        model=ask.model,
        messages=list(_messages(ask)),
        stream=ask.stream,
        max_completion_tokens=ask.max_output_tokens,
        tools=[
            Tool(Function(tool["name"], tool.get("parameters") or {})) for tool in ask.tools or () if "name" in tool
        ],
        tool_choice={"function": {"name": choice["name"]}} if isinstance(choice, dict) and "name" in choice else choice,
        parallel_tool_calls=ask.parallel_tool_calls,
        response_format=schema or None,
        logprobs="message.output_text.logprobs" in (ask.include or ()),
        top_logprobs=ask.top_logprobs,
    )


def _messages(ask: ResponsesAsk) -> Iterator[Message]:
    if ask.instructions:
        yield Message("system", ask.instructions)
    if isinstance(ask.input, str):
        yield Message("user", ask.input)
        return
    for item in ask.input:
        if item.get("type") == "function_call_output":
            yield Message("tool", str(item["output"]))
        elif "role" in item:
            yield Message(item["role"], item["content"])


def unknown_answer(ask: ResponsesAsk) -> str | None:
    """The id that names no answer."""
    id = ask.previous_response_id
    return id if id is not None and not _ID.fullmatch(id) else None


class Said(Struct):
    """What a response says, before it is written whole or in events."""

    head: Item
    items: list[Item]
    pieces: list[list[str]]
    """Of each item: what its deltas say."""
    usage: Item
    incomplete: bool


def said(
    ask: ResponsesAsk, model: str, created: int, echo: Item, logprob: Callable[[str], Item]
) -> tuple[Said, Content]:
    """`echo` are the members of the request, `model` what the vendor calls the model in its answer."""
    asked = in_chat(ask)
    content = content_of(asked)
    choice = content.choices[0]
    items: list[Item] = []
    pieces: list[list[str]] = []
    if content.reasoning:
        text = "".join(content.reasoning)
        summary = [{"type": "summary_text", "text": text}]
        items.append({"id": "rs_" + hexadecimal(48), "type": "reasoning", "summary": summary})
        pieces.append(list(content.reasoning))
    if choice.pieces or not choice.calls:
        items.append(_message(choice, [logprob(piece) for piece in choice.pieces] if asked.logprobs else []))
        pieces.append(list(choice.refusal or choice.pieces))
    for call in choice.calls:
        items.append(
            {"id": "fc_" + hexadecimal(48), "type": "function_call", "status": "completed",
             "arguments": "".join(call.fragments), "call_id": "call_" + hexadecimal(24), "name": call.name}
        )  # fmt: skip
        pieces.append(call.fragments)
    before = KEPT_TOKENS if ask.previous_response_id else 0
    prompt, made = content.prompt_tokens + before, content.completion_tokens
    usage = {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": content.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": made,
        "output_tokens_details": {"reasoning_tokens": content.reasoning_tokens},
        "total_tokens": prompt + made,
    }
    head = {
        "id": "resp_" + hexadecimal(48), "object": "response", "created_at": created, "status": "in_progress",
        "background": False, "error": None, "incomplete_details": None, "instructions": None,
        "max_output_tokens": None, "model": model, "output": [], "parallel_tool_calls": True,
        "previous_response_id": None, "reasoning": {"effort": None, "summary": None}, "service_tier": "default",
        "store": True, "temperature": 1.0, "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto", "tools": [], "top_p": 1.0, "truncation": "disabled", "usage": None, "user": None,
        "metadata": {},
    }  # fmt: skip
    head |= {name: value for name, value in echo.items() if name in head and name not in ("model", "output")}
    return Said(head, items, pieces, usage, choice.finish_reason == "length"), content


def _message(choice: Choice, logprobs: list[Item]) -> Item:
    part: Item = {"type": "output_text", "annotations": [], "logprobs": logprobs, "text": "".join(choice.pieces)}
    if choice.refusal:
        part = {"type": "refusal", "refusal": "".join(choice.refusal)}
    return {
        "id": "msg_" + hexadecimal(48),
        "type": "message",
        "status": "completed",
        "content": [part],
        "role": "assistant",
    }


def keep(vendor: str, ask: ResponsesAsk, said: Said) -> None:
    if ask.store is not False:
        items = [{"role": "user", "content": ask.input}] if isinstance(ask.input, str) else ask.input
        written = [{"id": "msg_" + hexadecimal(48), "type": "message", **item} for item in items]
        KEPT[vendor, said.head["id"]] = whole(said), written
        if len(KEPT) > MOST_KEPT:
            del KEPT[next(iter(KEPT))]


def kept(vendor: str, method: str, path: str) -> Item | None:
    """What is answered to a request below the route that makes answers; None where there is no such answer."""
    id, _, part = path.partition("/")
    if (vendor, id) not in KEPT or part not in ("", "input_items") or method not in ("GET", "DELETE"):
        return None
    if method == "DELETE":
        del KEPT[vendor, id]
        return {"id": id, "object": "response", "deleted": True}
    answer, items = KEPT[vendor, id]
    if not part:
        return answer
    ends = {"first_id": items[0]["id"], "last_id": items[-1]["id"]}
    return {"object": "list", "data": items, **ends, "has_more": False}


def whole(said: Said) -> Item:
    details = {"reason": "max_output_tokens"} if said.incomplete else None
    status = "incomplete" if said.incomplete else "completed"
    return said.head | {
        "status": status, "incomplete_details": details, "output": said.items, "usage": said.usage,
    }  # fmt: skip


def events(said: Said) -> Iterator[bytes]:
    """The events in order, numbered."""
    for number, event in enumerate(_events(said)):
        written = msgspec.json.encode({"type": event["type"], "sequence_number": number} | event)
        yield b"event: " + event["type"].encode() + b"\ndata: " + written + b"\n\n"


def _events(said: Said) -> Iterator[Item]:
    yield {"type": "response.created", "response": said.head}
    yield {"type": "response.in_progress", "response": said.head}
    for place, (item, pieces) in enumerate(zip(said.items, said.pieces, strict=True)):
        empty = {"message": {"content": [], "status": "in_progress"}, "reasoning": {"summary": []}}
        started = item | empty.get(item["type"], {"arguments": "", "status": "in_progress"})
        yield {"type": "response.output_item.added", "output_index": place, "item": started}
        here = {"item_id": item["id"], "output_index": place}
        if item["type"] == "function_call":
            for piece in pieces:
                yield _delta("response.function_call_arguments.delta", here, piece)
            yield {"type": "response.function_call_arguments.done", **here, "arguments": item["arguments"]}
        elif item["type"] == "reasoning":
            yield from _summary(item["summary"][0], here | {"summary_index": 0}, pieces)
        elif item["content"][0]["type"] == "refusal":
            yield from _refusal(item["content"][0], here | {"content_index": 0}, pieces)
        else:
            yield from _text(item["content"][0], here | {"content_index": 0}, pieces)
        yield {"type": "response.output_item.done", "output_index": place, "item": item}
    last = whole(said)
    yield {"type": f"response.{last['status']}", "response": last}


def _summary(part: Item, here: Item, pieces: list[str]) -> Iterator[Item]:
    yield {"type": "response.reasoning_summary_part.added", **here, "part": part | {"text": ""}}
    for piece in pieces:
        yield _delta("response.reasoning_summary_text.delta", here, piece)
    yield {"type": "response.reasoning_summary_text.done", **here, "text": part["text"]}
    yield {"type": "response.reasoning_summary_part.done", **here, "part": part}


def _text(part: Item, here: Item, pieces: list[str]) -> Iterator[Item]:
    yield {"type": "response.content_part.added", **here, "part": part | {"text": "", "logprobs": []}}
    for place, piece in enumerate(pieces):
        yield _delta("response.output_text.delta", here, piece) | {"logprobs": part["logprobs"][place : place + 1]}
    yield {"type": "response.output_text.done", **here, "text": part["text"], "logprobs": part["logprobs"]}
    yield {"type": "response.content_part.done", **here, "part": part}


def _refusal(part: Item, here: Item, pieces: list[str]) -> Iterator[Item]:
    yield {"type": "response.content_part.added", **here, "part": part | {"refusal": ""}}
    for piece in pieces:
        yield _delta("response.refusal.delta", here, piece)
    yield {"type": "response.refusal.done", **here, "refusal": part["refusal"]}
    yield {"type": "response.content_part.done", **here, "part": part}


def _delta(type: str, here: Item, piece: str) -> Item:
    return {"type": type, **here, "delta": piece, "obfuscation": _PADDING[len(piece) % 16 :]}


def error_event(message: str, code: str | None) -> bytes:
    written = {"type": "error", "code": code or "server_error", "message": message, "param": None, "sequence_number": 9}
    return b"event: error\ndata: " + msgspec.json.encode(written) + b"\n\n"
