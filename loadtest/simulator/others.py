"""What OpenAI has beside chat: legacy completions, moderations, speech, transcripts, images. Content is of the request.

    POST /v1/completions   /v1/moderations   /v1/images/generations, /v1/images/edits
    POST /v1/audio/speech  /v1/audio/transcriptions  /v1/audio/translations

Models with `gpt` in their name tell tokens; the older ones tell seconds (whisper), or nothing (tts, dall-e). An audio
file is as many seconds long as it has thousands of bytes.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from msgspec import Struct

from loadtest.simulator.content import Ask, Message, StreamOptions, content_of, text_tokens
from loadtest.simulator.http import Request
from loadtest.simulator.identity import letters

Members = dict[str, Any]
_PART = re.compile(rb'\r\ncontent-disposition: form-data; name="([^"]+)"[^\r]*\r\n(?:[^\r]+\r\n)*\r\n(.*)', re.S | re.I)
IMAGE_TOKENS = 1056
"""A square image of medium quality, as the vendor counts it."""


class Other(Struct, frozen=True):
    """An answer: JSON or other bytes, or the events of a stream."""

    body: Members | bytes | None = None
    content_type: str = "application/json"
    events: Iterator[bytes] | None = None
    tokens: int = 0
    latency_ms: float = 0
    chunk_ms: float = 0


class Unreadable(Exception):
    """What of the request is missing or wrong."""


def answer(request: Request, model: str, snapshot: str, created: int) -> Other | None:
    """None for a path that there is not. Raises Unreadable."""
    made = _PATHS.get(request.path)
    if made is None:
        return None
    asked = form(request) if "multipart" in request.headers.get("content-type", "") else _json(request.body)
    return made(asked, snapshot, created)


def form(request: Request) -> Members:
    """The fields of a multipart body; files as bytes, all else as text."""
    found = re.search(r"boundary=([^;]+)", request.headers.get("content-type", ""))
    if found is None:
        raise Unreadable("boundary")
    fields: Members = {}
    for part in request.body.split(b"--" + found[1].strip('"').encode()):
        if match := _PART.match(part):
            value = match[2].removesuffix(b"\r\n")
            name = match[1].decode()
            fields[name] = value if name.startswith(("file", "image", "mask")) else value.decode()
    return fields


def model_of(request: Request) -> str:
    """The model that a multipart body names."""
    try:
        return str(form(request).get("model", ""))
    except (Unreadable, UnicodeDecodeError):
        return ""


def _json(body: bytes) -> Members:
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.DecodeError:
        raise Unreadable("body") from None


def _needed(asked: Members, name: str) -> Any:
    if name not in asked:
        raise Unreadable(name)
    return asked[name]


def _completions(asked: Members, model: str, created: int) -> Other:
    prompt = _needed(asked, "prompt")
    options = asked.get("stream_options") or {}
    content = content_of(
        Ask(
            model=asked["model"],
            messages=[Message("user", prompt if isinstance(prompt, str) else str(prompt))],
            n=asked.get("n"),
            max_tokens=asked.get("max_tokens"),
            stream_options=StreamOptions(options.get("include_usage")),
        )
    )
    usage = {
        "prompt_tokens": content.prompt_tokens,
        "completion_tokens": content.completion_tokens,
        "total_tokens": content.prompt_tokens + content.completion_tokens,
    }
    head = {"id": "cmpl-" + letters(29), "object": "text_completion", "created": created, "model": model}

    def choice(index: int, text: str, reason: str | None) -> Members:
        return {"text": text, "index": index, "logprobs": None, "finish_reason": reason}

    def events() -> Iterator[bytes]:
        for index, one in enumerate(content.choices):
            for piece in one.refusal or one.pieces:
                yield _sse(head | {"choices": [choice(index, piece, None)]})
            yield _sse(head | {"choices": [choice(index, "", one.finish_reason)]})
        if options.get("include_usage"):
            yield _sse(head | {"choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    timing = {"tokens": usage["total_tokens"], "latency_ms": content.latency_ms, "chunk_ms": content.chunk_ms}
    if asked.get("stream"):
        return Other(events=events(), **timing)
    choices = [
        choice(index, "".join(one.refusal or one.pieces), one.finish_reason)
        for index, one in enumerate(content.choices)
    ]
    return Other(head | {"choices": choices, "usage": usage}, **timing)


def _moderations(asked: Members, model: str, created: int) -> Other:
    inputs = _needed(asked, "input")
    texts = inputs if isinstance(inputs, list) else [inputs]
    results = [
        {
            "flagged": "attack" in str(text),
            "categories": {"violence": "attack" in str(text), "hate": False},
            "category_scores": {"violence": 0.9 if "attack" in str(text) else 0.01, "hate": 0.01},
        }
        for text in texts
    ]
    return Other({"id": "modr-" + letters(29), "model": model, "results": results})


def _speech(asked: Members, model: str, created: int) -> Other:
    spoken = _needed(asked, "input").encode()
    sound = b"ID3" + spoken * 8
    usage = {"input_tokens": text_tokens(spoken.decode()), "output_tokens": len(spoken) // 2}
    usage["total_tokens"] = sum(usage.values())
    if asked.get("stream_format") == "sse":
        cut = [sound[at : at + 64] for at in range(0, len(sound), 64)]
        written = [{"type": "speech.audio.delta", "audio": base64.b64encode(part).decode()} for part in cut]
        return Other(events=map(_sse, [*written, {"type": "speech.audio.done", "usage": usage}]))
    kind = {"wav": "audio/wav", "opus": "audio/opus"}.get(asked.get("response_format", "mp3"), "audio/mpeg")
    return Other(sound, kind)


def _transcript(asked: Members, model: str, created: int) -> Other:
    seconds = max(1, len(_needed(asked, "file")) // 1_000)
    words = [f"Word{place}" if place == 0 else f" word{place}" for place in range(min(seconds, 40))]
    text = "".join(words)
    form_of = asked.get("response_format", "json")
    if form_of in ("text", "srt", "vtt"):
        return Other(text.encode() + b"\n", "text/plain; charset=utf-8")
    if "gpt" in asked["model"]:
        details = {"text_tokens": 0, "audio_tokens": 10 * seconds}
        usage: Members = {
            "type": "tokens", "input_tokens": 10 * seconds, "input_token_details": details,
            "output_tokens": len(words), "total_tokens": 10 * seconds + len(words),
        }  # fmt: skip
    else:
        usage = {"type": "duration", "seconds": seconds}
    if asked.get("stream") == "true":
        deltas = [{"type": "transcript.text.delta", "delta": word} for word in words]
        return Other(events=map(_sse, [*deltas, {"type": "transcript.text.done", "text": text, "usage": usage}]))
    extra = {"language": "english", "duration": float(seconds)} if form_of == "verbose_json" else {}
    return Other({"text": text, **extra, "usage": usage})


def _images(asked: Members, model: str, created: int) -> Other:
    prompt, count = _needed(asked, "prompt"), int(asked.get("n") or 1)
    drawn = base64.b64encode(b"\x89PNG" + prompt.encode()).decode()
    if "gpt" not in asked["model"]:
        return Other({"created": created, "data": [{"url": "https://images.example/1.png"}] * count})
    seen = 300 if any(name.startswith("image") for name in asked) else 0
    said = text_tokens(prompt)
    usage = {
        "input_tokens": said + seen, "input_tokens_details": {"text_tokens": said, "image_tokens": seen},
        "output_tokens": IMAGE_TOKENS * count, "total_tokens": said + seen + IMAGE_TOKENS * count,
    }  # fmt: skip
    if asked.get("stream") in (True, "true"):
        partial = {"type": "image_generation.partial_image", "b64_json": drawn, "partial_image_index": 0}
        return Other(
            events=map(_sse, [partial, {"type": "image_generation.completed", "b64_json": drawn, "usage": usage}])
        )
    return Other({"created": created, "data": [{"b64_json": drawn}] * count, "usage": usage})


def _sse(value: Members) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


_PATHS: dict[str, Callable[[Members, str, int], Other]] = {
    "/v1/completions": _completions,
    "/v1/moderations": _moderations,
    "/v1/audio/speech": _speech,
    "/v1/audio/transcriptions": _transcript,
    "/v1/audio/translations": _transcript,
    "/v1/images/generations": _images,
    "/v1/images/edits": _images,
}
PATHS = frozenset(_PATHS)
