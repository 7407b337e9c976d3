"""How large a prompt is taken to be: base64 is no text, wherever it stands."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.prompt_size import BLOB_TOKENS, HOPS, LONG_BYTES, MOST_BLOBS, marks_cache, size, tokens

BLOB = "iVBORw0KGgo/" * 100
PARTS = {
    "OpenAI's image": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BLOB}"}},
    "OpenAI's audio": {"type": "input_audio", "input_audio": {"data": BLOB, "format": "wav"}},
    "Anthropic's image": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BLOB}},
    "the same, its data first": {"type": "image", "source": {"data": BLOB, "type": "base64"}},
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("times", [1, 3])
def test_base64_counts_by_its_parts_and_not_by_its_length(part: str, times: int) -> None:
    body = json.dumps([PARTS[part]] * times).encode()
    assert size(body) == (len(body) - times * len(BLOB), times)
    assert tokens(body) < times * (BLOB_TOKENS + 40)


@pytest.mark.parametrize("before", [0, HOPS - 9, 3 * HOPS])
@pytest.mark.parametrize("part", PARTS)
def test_base64_is_found_in_a_long_text_whatever_stands_before_it(part: str, before: int) -> None:
    body = json.dumps([";" * before, ":" * before, {"data": "_"}, "x" * LONG_BYTES, PARTS[part]]).encode()
    spaced = body.replace(b'"data":', b'"data" :')
    assert size(body) == (len(body) - len(BLOB), 1)
    assert size(spaced) == (len(spaced) - len(BLOB), 1)


@pytest.mark.parametrize("before", ["", "_" * HOPS, '"_control"'])
@pytest.mark.parametrize("long", ["", "x" * LONG_BYTES])
def test_a_cache_mark_is_seen_wherever_it_stands(before: str, long: str) -> None:
    text = [before, long, {"text": "x"}]
    assert not marks_cache(json.dumps([*text, {"_control": 1}]).encode())
    assert marks_cache(json.dumps([*text, {"cache_control": {"type": "ephemeral"}}]).encode())


@pytest.mark.parametrize("text", ["word " * 100, "short", BLOB[:100]])
def test_data_that_is_text_counts_as_text(text: str) -> None:
    body = json.dumps({"data": text}).encode()
    assert size(body) == (len(body), 0)


@given(st.lists(st.sampled_from([b'"data"', b": ", b'"', b";base64,", BLOB.encode(), b"x "])).map(b"".join))
def test_any_bytes_have_a_size_that_is_not_negative(body: bytes) -> None:
    text_bytes, blobs = size(body)
    assert 0 <= text_bytes <= len(body)
    assert blobs >= 0


def test_beginnings_of_images_without_end_are_looked_at_so_many_times_and_no_more() -> None:
    text_bytes, blobs = size(b';base64,"' * (MOST_BLOBS + 5))
    assert (text_bytes, blobs) == (9 * (MOST_BLOBS + 5), MOST_BLOBS)
