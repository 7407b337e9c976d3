"""Frames are the bytes, however the network cut them; their data and event follow the WHATWG's rules."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.sse import FrameSplitter, data_of, event_of, frame

LINE_ENDS = [b"\n", b"\r\n", b"\r"]
LINES = st.sampled_from(
    [b"data: {}", b"data:x", b": ping", b"event: done", b"id: 7", b"data", b"", "data: é€😀".encode()]
)
STREAMS = st.lists(st.one_of(LINES, st.sampled_from(LINE_ENDS)), max_size=30).map(b"".join)
PLAIN = st.binary().filter(lambda data: not set(data) & {10, 13})


@st.composite
def cut_streams(draw: st.DrawFn) -> list[bytes]:
    """A stream of lines and line ends of every kind, cut anywhere."""
    stream = draw(STREAMS)
    places = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    return [stream[start:end] for start, end in zip([0, *places], [*places, len(stream)], strict=True)]


def split(*chunks: bytes) -> tuple[list[bytes], bytes]:
    splitter = FrameSplitter()
    frames = [frame for chunk in chunks for frame in splitter.feed(chunk)]
    return frames, splitter.rest


def slowly(stream: bytes) -> list[bytes]:
    """The same frames by another way: line by line, a frame ends with the second line end in a row."""
    frames, current, ends = [], b"", 0
    for piece in re.findall(rb"\r\n|\r|\n|[^\r\n]+", stream):
        current += piece
        ends = ends + 1 if piece in LINE_ENDS else 0
        if ends == 2:
            frames.append(current)
            current, ends = b"", 0
    return frames


@given(cut_streams())
def test_any_split_gives_the_same_frames(chunks: list[bytes]) -> None:
    assert split(*chunks) == split(b"".join(chunks))


@given(cut_streams())
def test_the_frames_and_the_rest_are_the_bytes(chunks: list[bytes]) -> None:
    frames, rest = split(*chunks)
    assert b"".join(frames) + rest == b"".join(chunks)


@given(STREAMS)
def test_the_frames_are_those_of_a_reading_line_by_line(stream: bytes) -> None:
    frames, rest = split(stream)
    expected = slowly(stream)
    if rest.endswith(b"\r") and len(expected) == len(frames) + 1:
        expected.pop()  # whether that CR stands alone is known with the next byte
    assert frames == expected


@given(st.binary(max_size=200), st.integers(1, 7))
def test_bytes_of_any_kind_are_kept(stream: bytes, size: int) -> None:
    frames, rest = split(*[stream[start : start + size] for start in range(0, len(stream), size)])
    assert b"".join(frames) + rest == stream


@pytest.mark.parametrize("end", LINE_ENDS)
def test_every_kind_of_line_end_ends_a_frame(end: bytes) -> None:
    first, second = b"data: 1" + end + end, b"event: x" + end + b"data: 2" + end + end
    assert split(first + second + b"d")[0] == [first, second]


def test_a_frame_is_released_with_its_blank_line() -> None:
    splitter = FrameSplitter()
    assert splitter.feed(b"data: 1\n") == []
    assert splitter.feed(b"\ndata: 2") == [b"data: 1\n\n"]
    assert splitter.rest == b"data: 2"


def test_a_frame_that_ends_with_crlf_is_released_at_once() -> None:
    assert split(b"data: 1\r\n\r\n") == ([b"data: 1\r\n\r\n"], b"")


@pytest.mark.parametrize(
    ("written", "data"),
    [
        (b"data: {}\n\n", b"{}"),
        (b"data:{}\n\n", b"{}"),
        (b"data:  {}\n\n", b" {}"),
        (b"data: {}\r\n\r\n", b"{}"),
        (b"data: {}\r\r", b"{}"),
        (b"data: {}\r\n\n", b"{}"),
        (b"data: a\rdata: b\n\n", b"a\nb"),
        (b"data: a\ndata: b\n\n", b"a\nb"),
        (b"data:\ndata: b\n\n", b"\nb"),
        (b"event: error\ndata: {}\n\n", b"{}"),
        (b"data: {}\nevent: error\n\n", b"{}"),
        (b"\ndata: {}\n\n", b"{}"),
        (b": OPENROUTER PROCESSING\n\n", b""),
        (b"id: 1\nretry: 5\n\n", b""),
        (b"\n\n", b""),
        (b"data\n\n", b""),
        (b"datax: 1\n\n", b""),
        (b" data: 1\n\n", b""),
    ],
)
def test_data_of_a_frame(written: bytes, data: bytes) -> None:
    assert data_of(written) == data


@pytest.mark.parametrize(
    ("written", "event"),
    [
        (b"event: error\ndata: {}\n\n", "error"),
        (b"data: {}\nevent:error\r\n\r\n", "error"),
        (b"data: event: error\n\n", ""),
        (b": event: error\n\n", ""),
        (b"event: \xff\n\n", "\N{REPLACEMENT CHARACTER}"),
        (b"\n\n", ""),
    ],
)
def test_event_of_a_frame(written: bytes, event: str) -> None:
    assert event_of(written) == event


@given(PLAIN, st.none() | st.from_regex(r"[a-z_.]+", fullmatch=True))
def test_a_written_frame_is_read_back(data: bytes, event: str | None) -> None:
    frames, rest = split(frame(data, event))
    assert ([data_of(one) for one in frames], [event_of(one) for one in frames]) == ([data], [event or ""])
    assert rest == b""
