"""Server-sent events: bytes <-> frames. Incremental, pure, byte-exact: the frames joined are the bytes fed.

Source: WHATWG HTML, section "Server-sent events". A frame here is everything up to and including a blank line.
"""

from __future__ import annotations

import re

DONE = b"data: [DONE]\n\n"
"""The frame that ends a stream at OpenAI."""
_BLANK_LINE = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r(?!\n))")


class FrameSplitter:
    """Cuts a byte stream into frames, wherever the network cut it.

    `feed` returns the frames that are complete; `rest` holds the bytes after the last of them. The caller bounds it.
    """

    __slots__ = ("rest",)

    def __init__(self) -> None:
        self.rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        data = self.rest + chunk if self.rest else chunk
        if data.find(b"\r") != -1:
            return self._feed_any(data)
        *frames, self.rest = data.split(b"\n\n")
        return [frame + b"\n\n" for frame in frames]

    def _feed_any(self, data: bytes) -> list[bytes]:
        frames = []
        start = 0
        for match in _BLANK_LINE.finditer(data):
            end = match.end()
            if end == len(data) and data.endswith(b"\r"):
                break  # the next byte may be the LF that belongs to this CR
            frames.append(data[start:end])
            start = end
        self.rest = data[start:]
        return frames


def data_of(frame: bytes) -> bytes:
    """The frame's data: its `data:` lines joined by newlines; empty for comments and keep-alives."""
    if frame.startswith(b"data: ") and frame.find(b"\n") == len(frame) - 2 and frame.find(b"\r") == -1:
        return frame[6:-2]
    parts = []
    for line in frame.splitlines():
        if line.startswith(b"data:"):
            parts.append(line[6:] if line[5:6] == b" " else line[5:])
    return b"\n".join(parts)


def event_of(frame: bytes) -> str:
    """The frame's event name; empty where it has none."""
    for line in frame.splitlines():
        if line.startswith(b"event:"):
            return line[6:].strip().decode("utf-8", "replace")
    return ""


def frame(data: bytes, event: str | None = None) -> bytes:
    """One frame. `data` holds no line break."""
    if event is None:
        return b"data: " + data + b"\n\n"
    return b"event: " + event.encode() + b"\ndata: " + data + b"\n\n"
