"""What may be kept, and who shares it: keys, partitions, and the calls of which nothing is kept."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from app.cache.entry import Entry, opened, sealed
from app.core import Usage, Wishes
from tests.cache_parts import QUESTION, alias, asked, body, tenant

SYSTEM = {"role": "system", "content": "Answer in one sentence."}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
EMBEDDINGS = "/v1/embeddings"

OTHERS: dict[str, Any] = {
    "tenant": asked(by=tenant("acme")),
    "alias": asked(of=alias(name="support-quality")),
    "rule": asked(rule="night"),
    "variant": asked(of=msgspec.structs.replace(alias(), weights=(1,))),
    "models": asked(of=alias(answers_by=b"others")),
    "system prompt": asked(body(messages=[SYSTEM, *QUESTION])),
    "tools": asked(body(tools=[TOOL])),
    "format": asked(body(response_format={"type": "json_object"})),
    "sampling": asked(body(top_p=0.5)),
    "length": asked(body(max_tokens=5)),
    "user": asked(body(user="u-1")),
    "a member that nobody knows yet": asked(body(effort="high")),
    "prompt version": asked(prompt_version="v2"),
    "revision by header": asked(wishes=Wishes(kb_revision="7")),
    "revision by alias": asked(of=alias(kb_revision="8")),
    "invalidated": asked(epoch="1"),
    "headers that are relayed": asked(relayed=(("anthropic-beta", "x-2026-01-01"),)),
}
"""A call that differs from the plain one in one thing; the question is the same in all."""


@pytest.mark.parametrize("name", OTHERS)
def test_calls_that_differ_in_anything_share_no_entry(name: str) -> None:
    assert OTHERS[name].key != asked().key


def test_no_two_of_these_calls_share_an_entry() -> None:
    assert len({asked().key, *(ask.key for ask in OTHERS.values())}) == 1 + len(OTHERS)


@pytest.mark.parametrize("fields", [{"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}])
def test_streamed_and_whole_answers_share_an_entry(fields: dict[str, Any]) -> None:
    assert asked(body(**fields)).key == asked().key


def test_the_order_of_members_does_not_matter() -> None:
    written = dict(reversed(json.loads(body()).items()))
    assert asked(json.dumps(written).encode()).key == asked().key


def test_another_spelling_of_the_same_json_is_the_same_request() -> None:
    spaced = json.dumps(json.loads(body()), indent=2, ensure_ascii=False).encode()
    assert asked(spaced).key == asked(json.dumps(json.loads(body()), separators=(",", ":")).encode()).key


def test_a_large_request_counts_as_it_was_written() -> None:
    large = {"messages": [{"role": "user", "content": "x" * 70_000}]}
    one, two = (asked(json.dumps(json.loads(body(**large)), indent=spaces).encode()).key for spaces in (None, 1))
    assert (asked(body(**large)).key, one == two) == (one, False)


def test_a_request_that_is_nested_deeply_is_one() -> None:
    deep = b"[" * 900 + b"]" * 900
    written = body()[:-1] + b', "metadata": ' + deep + b"}"
    assert asked(written).key != asked().key


def test_parts_cannot_be_moved_from_one_place_to_the_next() -> None:
    assert asked(body(a="b", c="d")).key != asked(body(a='b","c":"d')).key
    assert asked(prompt_version="").key != asked().key


def test_a_key_names_tenant_and_alias_in_plain_words() -> None:
    assert asked().key.startswith("sc:{acme-corp}:support-fast:x:")


NOT_KEPT: list[tuple[str, Any]] = [
    ("off", asked(by=tenant(mode="off"))),
    ("off", asked(by=tenant(store=False))),
    ("no_store", asked(wishes=Wishes(store=False))),
    ("choices", asked(body(n=2))),
    ("sampling", asked(body(temperature=0.1))),
    ("sampling", asked(json.dumps({"model": "support-fast", "messages": QUESTION}).encode())),
    ("sampling", asked(body(temperature=None))),
    ("sampling", asked(body(temperature="hot"))),
    ("not_replayable", asked(body(logprobs=True))),
    ("stored", asked(body(input="x", store=True), path=RESPONSES)),
    ("not_replayable", asked(body(audio={"voice": "alloy"}))),
    ("tool_turn", asked(body(messages=[*QUESTION, {"role": "tool", "tool_call_id": "1", "content": "x"}]))),
    ("tool_turn", asked(body(messages=[{"role": "assistant", "tool_calls": []}, *QUESTION]))),
    ("tool_turn", asked(body(input=[{"type": "function_call_output", "call_id": "1", "output": ""}]), path=RESPONSES)),
]  # fmt: skip


@pytest.mark.parametrize(("why", "ask"), NOT_KEPT, ids=[f"{n}-{why}" for n, (why, _) in enumerate(NOT_KEPT)])
def test_nothing_is_kept_of_what_cannot_or_must_not_be_replayed(why: str, ask: Any) -> None:
    assert (ask.why_not, ask.key, ask.look, ask.keep) == (why, "", False, False)


def test_sampling_is_kept_where_the_alias_allows_it() -> None:
    warm = alias(max_temperature=1.0)
    plain = json.dumps({"model": "support-fast", "messages": QUESTION}).encode()
    assert [asked(written, of=warm).why_not for written in (plain, body(temperature=1))] == [None, None]
    assert asked(body(temperature=1.1), of=warm).why_not == "sampling"


def test_a_tool_that_a_user_writes_about_is_no_tool_turn() -> None:
    assert asked(body(messages=[{"role": "user", "content": 'What does "tool_calls" mean?'}])).why_not is None


def test_no_cache_asks_again_and_keeps_the_answer() -> None:
    ask = asked(wishes=Wishes(fresh=True))
    assert (ask.look, ask.keep, ask.key) == (False, True, asked().key)


def test_embeddings_are_kept_whatever_the_temperature() -> None:
    ask = asked(json.dumps({"model": "support-fast", "input": "x"}).encode(), path=EMBEDDINGS)
    assert ask.why_not is None


def test_a_tenant_s_word_counts_where_the_alias_has_a_cache() -> None:
    assert asked(by=tenant(mode="verified")).mode == "verified"
    assert asked(of=alias("verified"), by=tenant(mode="exact")).mode == "exact"


# --- partitions -------------------------------------------------------------------------------------------------------


def partition(*messages: Any, **fields: Any) -> tuple[str, str | None]:
    ask = asked(body(messages=list(messages), **fields), of=alias("verified"))
    return ask.partition, ask.turn.text if ask.turn else None


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def test_questions_under_the_same_words_share_a_partition() -> None:
    one, two = partition(SYSTEM, said("user", "a")), partition(SYSTEM, said("user", "b"))
    assert (one[0], one[1], two[1]) == (two[0], "a", "b")


@pytest.mark.parametrize("name", [name for name in OTHERS if name not in ("tenant", "alias")])
def test_what_differs_in_anything_else_shares_no_partition(name: str) -> None:
    assert OTHERS[name].digest != asked().digest


@pytest.mark.parametrize(
    "messages",
    [
        [said("user", "a", name="Ann")],
        [said("user", "x"), said("assistant", "y"), said("user", "a")],
        [said("system", "s"), said("user", "a")],
        [said("developer", "s"), said("user", "a")],
    ],
)
def test_history_and_names_are_part_of_the_partition(messages: list[Any]) -> None:
    assert partition(*messages)[0] not in ("", partition(said("user", "a"))[0])


def test_a_history_cannot_look_like_another() -> None:
    split = partition(said("user", "1"), said("assistant", "2"), said("user", "a"))
    assert split[0] != partition(said("user", "1", x="2"), said("user", "a"))[0]


@pytest.mark.parametrize(
    "last",
    [
        said("assistant", "a"),
        said("user", None),
        said("user", ""),
        said("user", [{"type": "image_url", "image_url": {"url": "https://x.example/1.png"}}]),
        said("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
        said("user", [{"type": "text", "text": "a", "citations": {"enabled": True}}]),
        said("user", 5),
    ],
)
def test_a_last_word_that_is_not_a_user_s_text_has_no_partition(last: Any) -> None:
    assert partition(last) == ("", None)


def test_an_image_before_the_question_leaves_it_without_a_partition() -> None:
    image = said("user", [{"type": "image_url", "image_url": {"url": "https://x.example/1.png"}}])
    assert partition(image, said("assistant", "y"), said("user", "a")) == ("", None)


def test_text_in_a_part_is_a_question() -> None:
    assert partition(said("user", [{"type": "text", "text": "a"}])) == partition(said("user", "a"))


def test_turns_are_those_of_the_user() -> None:
    talk = [SYSTEM, said("user", "x"), said("assistant", "y"), said("user", "a")]
    assert asked(body(messages=talk), of=alias("static")).turn.turns == 2


@pytest.mark.parametrize("written", ['"a"', '[{"role":"user","content":[{"type":"input_text","text":"a"}]}]'])
def test_responses_have_questions_too(written: str) -> None:
    raw = b'{"model":"support-fast","temperature":0,"input":%b}' % written.encode()
    assert asked(raw, of=alias("static"), path=RESPONSES).turn.text == "a"


def test_messages_have_questions_too() -> None:
    raw = body(max_tokens=5, system="s", messages=[said("user", [{"type": "text", "text": "a", "cache_control": {}}])])
    assert asked(raw, of=alias("static"), path=MESSAGES).turn.text == "a"


def test_exact_modes_look_for_no_question() -> None:
    assert (asked().partition, asked().turn) == ("", None)


# --- entries ----------------------------------------------------------------------------------------------------------

ENTRY = Entry(b"{}", "openai", "gpt", Usage(input=1, output=2), 5.0, "q", {"doc": ""})


def test_an_entry_comes_back_as_it_went() -> None:
    assert opened("sc:{a}:b:x:c", sealed("sc:{a}:b:x:c", ENTRY)) == ENTRY


def test_an_entry_under_another_key_is_none() -> None:
    assert opened("sc:{b}:b:x:c", sealed("sc:{a}:b:x:c", ENTRY)) is None


def test_a_damaged_entry_is_none() -> None:
    whole = sealed("k", ENTRY)
    damaged = [whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :] for n in range(len(whole))]
    assert [opened("k", data) for data in (*damaged, whole[:-1], b"", whole + b"x")] == [None] * (len(whole) + 3)
