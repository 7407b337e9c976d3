"""Answers told again: a folded stream is the whole answer, and a whole answer's stream folds into itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core import Usage
from app.dialects.replay import PIECE_CHARACTERS, REPLAYS
from app.sse import FrameSplitter, data_of
from tests.test_responses_relay import streamed as responses_stream

GOLDEN = Path(__file__).parent / "golden"
USAGE = Usage(input=19, output=7)
STREAMS = {
    "chat": (GOLDEN / "openai/text.sse").read_bytes(),
    "messages": (GOLDEN / "anthropic/text.sse").read_bytes(),
    "responses": responses_stream(),
}
WHOLE = {
    "chat": (GOLDEN / "openai/text.json").read_bytes(),
    "messages": (GOLDEN / "anthropic/text.json").read_bytes(),
    "responses": REPLAYS["responses"].fold(STREAMS["responses"], USAGE),
}
THINKING = (GOLDEN / "anthropic/thinking.sse").read_bytes()


def folded(dialect: str, frames: bytes) -> bytes:
    whole = REPLAYS[dialect].fold(frames, USAGE)
    assert whole is not None
    return whole


def data(frames: bytes) -> list[Any]:
    return [json.loads(d) for one in FrameSplitter().feed(frames) if (d := data_of(one)) != b"[DONE]"]


@pytest.mark.parametrize(("dialect", "text"), [("chat", "Your order left ☂"), ("responses", "One.\ntwo")])
def test_a_folded_stream_has_its_text(dialect: str, text: str) -> None:
    assert REPLAYS[dialect].text(folded(dialect, STREAMS[dialect])) == text


def test_a_folded_stream_of_messages_has_its_blocks_and_figures() -> None:
    whole = json.loads(folded("messages", STREAMS["messages"]))
    told = data(STREAMS["messages"])
    texts = [e["delta"]["text"] for e in told if e["type"] == "content_block_delta"]
    assert "".join(block["text"] for block in whole["content"]) == "".join(texts)
    assert (whole["stop_reason"], whole["usage"]["input_tokens"]) == ("end_turn", 17)


@pytest.mark.parametrize("dialect", WHOLE)
def test_the_stream_of_a_whole_answer_folds_into_it(dialect: str) -> None:
    again = json.loads(folded(dialect, REPLAYS[dialect].stream(WHOLE[dialect], True)))
    whole = json.loads(WHOLE[dialect])
    if dialect == "chat":
        del whole["choices"][0]["message"]["annotations"]  # an empty list is told by nothing
    assert again == whole


def test_thoughts_and_their_seals_are_told_again() -> None:
    whole = folded("messages", THINKING)
    assert folded("messages", REPLAYS["messages"].stream(whole, True)) == whole
    assert "signature" in json.loads(whole)["content"][0]


def test_usage_that_the_stream_withheld_is_in_the_whole_answer() -> None:
    frames = (GOLDEN / "openai/text_without_usage.sse").read_bytes()
    assert json.loads(folded("chat", frames))["usage"]["total_tokens"] == USAGE.total


def test_usage_is_last_and_only_where_it_was_asked_for() -> None:
    with_usage, without = (data(REPLAYS["chat"].stream(WHOLE["chat"], asked)) for asked in (True, False))
    assert with_usage[:-1] == without
    assert with_usage[-1]["usage"] == json.loads(WHOLE["chat"])["usage"]
    assert REPLAYS["chat"].stream(WHOLE["chat"], True).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    "name",
    ["refusal.sse", "tools.sse", "two_choices.sse", "cut.sse", "not_json.sse", "error_after_content.sse", "empty.sse"],
)
def test_a_stream_that_is_not_one_text_to_its_end_is_not_told_again(name: str) -> None:
    whole = REPLAYS["chat"].fold((GOLDEN / "openai" / name).read_bytes(), USAGE)
    assert whole is None or REPLAYS["chat"].text(whole) is None


@pytest.mark.parametrize("name", ["refusal.sse", "tools.sse", "cut.sse", "error_amid.sse", "new_event.sse"])
def test_the_same_goes_for_messages(name: str) -> None:
    whole = REPLAYS["messages"].fold((GOLDEN / "anthropic" / name).read_bytes(), USAGE)
    assert whole is None or REPLAYS["messages"].text(whole) is None


@pytest.mark.parametrize(
    ("dialect", "name"),
    [("chat", f"openai/{name}.json") for name in ("refusal", "tools", "two_choices", "no_choices", "cut")]
    + [("messages", f"anthropic/{name}.json") for name in ("refusal", "tools", "web_search", "cut", "page")],
)
def test_a_whole_answer_that_is_not_one_text_is_not_told_again(dialect: str, name: str) -> None:
    assert REPLAYS[dialect].text((GOLDEN / name).read_bytes()) is None


@pytest.mark.parametrize(
    "change",
    [
        {"status": "incomplete"},
        {"output": [{"type": "function_call"}]},
        {"output": [{"type": "message", "content": [{"type": "refusal", "refusal": "no"}]}]},
        {"output": []},
        {"output": 5},
    ],
)
def test_a_response_that_is_not_one_text_is_not_told_again(change: dict[str, Any]) -> None:
    whole = json.loads(WHOLE["responses"]) | change
    assert REPLAYS["responses"].text(json.dumps(whole).encode()) is None


@given(text=st.text(min_size=1, max_size=5 * PIECE_CHARACTERS))
def test_any_text_is_told_again_as_it_was(text: str) -> None:
    whole = json.loads(WHOLE["chat"])
    whole["choices"][0]["message"]["content"] = text
    written = json.dumps(whole).encode()
    again = REPLAYS["chat"].fold(REPLAYS["chat"].stream(written, False), USAGE)
    assert (REPLAYS["chat"].text(again), REPLAYS["chat"].text(written)) == (text, text)


@given(cut=st.integers(0, len(STREAMS["messages"]) - 1))
def test_a_cut_stream_is_never_told_again(cut: int) -> None:
    """Nor is it a defect, wherever it was cut; the last event of Messages says nothing but that it is the last."""
    if STREAMS["messages"][:cut].find(b"message_delta") < 0:
        whole = REPLAYS["messages"].fold(STREAMS["messages"][:cut], USAGE)
        assert whole is None or REPLAYS["messages"].text(whole) is None
