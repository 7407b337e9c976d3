"""The fastest vendor that Python can be: canned OpenAI chat answers, nothing parsed that need not be.

The benchmark's far end. The simulator plays a vendor with all its moods; this one only has to cost so little that
what is measured is the gateway. `python -m loadtest.mock_vendor` prints `{"url": ..., "pid": ...}` once it listens.

A request whose body holds `"stream":true` gets an event stream of 50 chunks, one event per HTTP chunk and per write,
`--chunk-interval-ms` apart; one whose body also holds the word `at-once` gets the same bytes in a single write, and
with `one-a-second` they are a second apart. The chunk with the usage comes on top where the request asks for it.
Anything else gets a unary answer of about 1 KB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import sys
from typing import Any, cast

import uvloop

MODEL = "gpt-4o-mini-2024-07-18"
STREAM_CHUNKS = 50
AT_ONCE, SLOWLY = b"at-once", b"one-a-second"
_WORDS = "A parcel without a scan for two days mostly waits at a sorting hub and moves on by itself.".split()  # noqa: SIM905
_USAGE = {
    "prompt_tokens": 212,
    "completion_tokens": 96,
    "total_tokens": 308,
    "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
    "completion_tokens_details": {
        "reasoning_tokens": 0,
        "audio_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    },
}


def unary_body() -> bytes:
    """A whole chat completion, about 1 KB of JSON."""
    answer = {
        "id": "chatcmpl-BenchmarkMockAnswer0000001",
        "object": "chat.completion",
        "created": 1767225600,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": " ".join(_WORDS * 5), "refusal": None, "annotations": []},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": _USAGE,
        "service_tier": "default",
        "system_fingerprint": "fp_benchmark",
    }
    return json.dumps(answer, separators=(",", ":")).encode()


def stream_events(*, with_usage: bool) -> list[bytes]:
    """The server-sent events of one streamed answer: STREAM_CHUNKS chunks, the usage chunk if asked for, `[DONE]`."""
    deltas: list[tuple[dict[str, Any], str | None]] = [({"role": "assistant", "content": "", "refusal": None}, None)]
    deltas += [({"content": f"{_WORDS[i % len(_WORDS)]} "}, None) for i in range(STREAM_CHUNKS - 2)]
    deltas += [({}, "stop")]
    base = {
        "id": "chatcmpl-BenchmarkMockAnswer0000001",
        "object": "chat.completion.chunk",
        "created": 1767225600,
        "model": MODEL,
        "service_tier": "default",
        "system_fingerprint": "fp_benchmark",
    }
    chunks = [
        base
        | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}
        | ({"usage": None} if with_usage else {})
        for delta, reason in deltas
    ]
    if with_usage:
        chunks.append(base | {"choices": [], "usage": _USAGE})
    events = [b"data: %s\n\n" % json.dumps(chunk, separators=(",", ":")).encode() for chunk in chunks]
    return [*events, b"data: [DONE]\n\n"]


def _head(content_type: str, length: int | None) -> bytes:
    framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    return (
        f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\n{framing}\r\n"
        "x-request-id: req_benchmark\r\nopenai-processing-ms: 1\r\n\r\n"
    ).encode()


def _http_chunks(events: list[bytes]) -> list[bytes]:
    """Writes of a streamed answer: headers with the first event, one event each, the last-chunk with `[DONE]`."""
    writes = [b"%x\r\n%s\r\n" % (len(event), event) for event in events]
    writes[0] = _head("text/event-stream; charset=utf-8", None) + writes[0]
    writes[-1] += b"0\r\n\r\n"
    return writes


UNARY = _head("application/json", len(unary_body())) + unary_body()
PACED = {usage: _http_chunks(stream_events(with_usage=usage)) for usage in (False, True)}
_AT_ONCE = {usage: b"".join(writes) for usage, writes in PACED.items()}


class MockVendor(asyncio.Protocol):
    """One connection. Requests come one after the other (no pipelining), with a Content-Length."""

    def __init__(self, loop: asyncio.AbstractEventLoop, chunk_interval_seconds: float) -> None:
        self._loop = loop
        self._interval_seconds = chunk_interval_seconds
        self._received = b""
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        if self._received:
            data = self._received + data
        head_end = data.find(b"\r\n\r\n")
        if head_end < 0:
            self._received = data
            return
        head = data[:head_end].lower()
        at = head.find(b"\r\ncontent-length:")
        length = int(head[at + 17 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(data) < head_end + 4 + length:
            self._received = data
            return
        self._received = b""
        body = data[head_end + 4 :]
        if b'"stream":true' not in body and b'"stream": true' not in body:
            self._transport.write(UNARY)
            return
        with_usage = b"include_usage" in body
        if AT_ONCE in body:
            self._transport.write(_AT_ONCE[with_usage])
        else:
            self._write_paced(PACED[with_usage], 0, 1.0 if SLOWLY in body else self._interval_seconds)

    def _write_paced(self, writes: list[bytes], index: int, interval_seconds: float) -> None:
        self._transport.write(writes[index])
        if index + 1 < len(writes):
            self._timer = self._loop.call_later(
                interval_seconds, self._write_paced, writes, index + 1, interval_seconds
            )
        else:
            self._timer = None


async def serve(port: int, chunk_interval_seconds: float) -> None:
    """Listens on 127.0.0.1 until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    server = await loop.create_server(
        lambda: MockVendor(loop, chunk_interval_seconds), "127.0.0.1", port, family=socket.AF_INET, backlog=1024
    )
    listening_port = server.sockets[0].getsockname()[1]
    print(json.dumps({"url": f"http://127.0.0.1:{listening_port}", "pid": os.getpid()}), flush=True)
    await stopped.wait()
    server.close()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.mock_vendor", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one (default)")
    parser.add_argument(
        "--chunk-interval-ms", type=float, default=1.0, help="between the chunks of a stream (default 1)"
    )
    options = parser.parse_args(arguments)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(options.port, options.chunk_interval_ms / 1000))
    return 0


if __name__ == "__main__":
    sys.exit(main())
