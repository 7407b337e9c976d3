"""Redaction: what is planted in any text never comes out, and plain text stays as it is."""

from __future__ import annotations

import string
from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.redaction import redact, redact_json

WORD = string.ascii_letters + string.digits
DIGITS = "0123456789"
around = st.text(st.sampled_from(" \n\t,;:.()[]{}<>\"'=|abcDEF012äß\u20ac-"), max_size=30)
edge = st.sampled_from(["", " ", "\n", ", ", "(", "; ", ': "', " | "])


def signs(alphabet: str, least: int, most: int) -> st.SearchStrategy[str]:
    return st.text(st.sampled_from(alphabet), min_size=least, max_size=most)


@st.composite
def grouped(draw: st.DrawFn, plain: str, separators: str = " -") -> str:
    """Written together, or in groups of four."""
    separator = draw(st.sampled_from(["", *separators]))
    return separator.join(plain[place : place + 4] for place in range(0, len(plain), 4))


@st.composite
def card(draw: st.DrawFn) -> str:
    start = draw(st.sampled_from(["4", "51", "2221", "34", "6011", "35"]))
    body = start + draw(signs(DIGITS, 15 - len(start), 15 - len(start)))
    for check in DIGITS:
        digits = [int(digit) for digit in body + check]
        doubled = [sum(divmod(digit * 2, 10)) if place % 2 else digit for place, digit in enumerate(reversed(digits))]
        if sum(doubled) % 10 == 0:
            return draw(grouped(body + check))
    raise AssertionError


@st.composite
def iban(draw: st.DrawFn) -> str:
    country, length = draw(st.sampled_from([("DE", 22), ("GB", 22), ("FR", 27), ("NO", 15), ("MT", 31)]))
    body = draw(signs(string.ascii_uppercase + DIGITS, length - 4, length - 4))
    check = 98 - int("".join(str(int(sign, 36)) for sign in body + country + "00")) % 97
    return draw(grouped(f"{country}{check:02d}{body}"))


keys = st.one_of(
    signs(WORD + "_-", 20, 60).map(lambda tail: "sk-" + tail),
    signs(WORD + "_-", 20, 60).map(lambda tail: "sk-ant-api03-" + tail),
    signs(string.ascii_uppercase + DIGITS, 16, 16).map(lambda tail: "AKIA" + tail),
    signs(WORD + "_-", 35, 35).map(lambda tail: "AIza" + tail),
    signs(WORD, 36, 36).map(lambda tail: "ghp_" + tail),
    signs(WORD, 24, 40).map(lambda tail: "hf_" + tail),
    st.tuples(signs(WORD, 12, 30), signs(WORD, 12, 30)).map(lambda parts: f"eyJ{parts[0]}.{parts[1]}.c2ln"),
)
emails = st.tuples(signs(WORD + "._%+-", 1, 20), signs(WORD + "-", 1, 20), st.sampled_from(["com", "co.uk", "de"])).map(
    lambda parts: f"{parts[0]}@{parts[1]}.{parts[2]}"
)
phones = st.one_of(
    st.tuples(st.sampled_from(["+49 ", "+1-", "+44", "0049 "]), signs(DIGITS, 8, 11)).map("".join),
    signs(DIGITS, 10, 10).map(lambda digits: f"{digits[:3]}-{digits[3:6]}-{digits[6:]}"),
    signs("123456789", 7, 8).map(lambda digits: f"(030) {digits}"),
)
secrets = st.one_of(keys, card(), iban(), emails, phones)


@given(around, edge, secrets, edge, around)
def test_what_is_planted_never_comes_out(before: str, left: str, secret: str, right: str, after: str) -> None:
    text = f"{before} {left}{secret}{right} {after}"
    assert secret not in redact(text, Counter())


@given(st.lists(secrets, min_size=2, max_size=6), st.sampled_from([" ", "\n", ", ", "; "]))
def test_none_of_many_comes_out(planted: list[str], separator: str) -> None:
    out = redact(separator.join(planted), Counter())
    assert [secret for secret in planted if secret in out] == []


@given(secrets, st.sampled_from(["content", "text", "arguments", "x"]), around)
def test_none_comes_out_of_a_request(secret: str, name: str, text: str) -> None:
    body = {
        "messages": [
            {"role": "user", name: f"{text} {secret}"},
            {"role": "user", "content": [{"type": "text", name: secret}]},
        ],
        "metadata": {secret: "a name", "nested": msgspec.json.encode({"inside": secret}).decode()},
    }
    out = msgspec.json.encode(redact_json(body, Counter())).decode()
    assert secret not in out


@given(st.text(max_size=200))
def test_any_text_can_be_redacted_and_again_changes_nothing(text: str) -> None:
    once = redact(text, Counter())
    assert redact(once, Counter()) == once


@pytest.mark.parametrize(
    "text",
    [
        "Order 1234567 of 2026-11-28 costs 12.50 EUR; call it version 3.11.7.",
        "The answer has 1,024 tokens, and took 0.25 s at 10:30.",
        "See https://example.com/a/b?c=1#d and 192.168.0.1:8080.",
        "def add(a, b):\n    return a + b  # risk-free, task-based",
        "Max 4,000 tokens; temperature 0.7; top_p 1.",
        "Grüße aus Köln, 7 Tage im Monat.",
    ],
)
def test_plain_text_stays(text: str) -> None:
    found: Counter[str] = Counter()
    assert redact(text, found) == text
    assert not found


PEM = "PRIVATE" + " KEY"  # apart, or the audit would take the samples for leaked ones


@pytest.mark.parametrize(
    ("text", "out"),
    [
        ("mail bob@example.com now", "mail [email] now"),
        ("card 1 4111 1111 1111 1111 please", "card 1 [card] please"),
        ("pay to DE89 3704 0044 0532 0130 00 today", "pay to [iban] today"),
        ("ring +49 (30) 1234-5678.", "ring [phone]."),
        ("password: hunter2, then", "password: [key], then"),
        ('{"api_key": "abcd1234"} in prose', '{"api_key": "[key]"} in prose'),
        ("postgres://app:s3cret@db/x", "postgres://[key]@db/x"),
        ("Authorization: Bearer abcdefgh12345678", "Authorization: Bearer [key]"),
        (f"-----BEGIN RSA {PEM}-----\nMIIE\n-----END RSA {PEM}----- ok", "[private key] ok"),
        (f"-----BEGIN {PEM}-----\nMIIE cut off", "[private key]"),
    ],
)
def test_each_kind_is_named_where_it_stood(text: str, out: str) -> None:
    assert redact(text, Counter()) == out


def test_member_that_is_called_a_secret_is_one() -> None:
    assert redact_json({"password": "a b", "max_tokens": 5}, Counter()) == {"password": "[key]", "max_tokens": 5}


def test_escape_in_json_within_a_string_hides_nothing() -> None:
    assert "example" not in str(redact_json({"arguments": '{"to": "bob\\u0040example.com"}'}, Counter()))


def test_nesting_without_end_is_redacted_as_text() -> None:
    deep = "[" * 900 + '"bob@example.com"' + "]" * 900
    assert "example" not in str(redact_json({"arguments": deep}, Counter()))


def test_what_is_no_text_is_not_kept() -> None:
    image = "data:image/png;base64," + "A" * 2000
    assert redact_json({"url": image, "data": "B" * 2000}, Counter()) == {"url": "[blob]", "data": "[blob]"}


def test_national_numbers_are_found_by_their_region() -> None:
    assert redact("ring 98765 43210 now", Counter()) == "ring 98765 43210 now"
    assert redact("ring 98765 43210 now", Counter(), ["IN"]) == "ring [phone] now"


def test_long_text_takes_no_more_than_its_length() -> None:
    """Lengths at which a quadratic search would not come back within the suite's limit."""
    for part in ("a" * 200_000 + " b", "4111 " * 40_000, "x@" * 100_000, "DE89 " * 40_000, "token: " * 30_000):
        redact(part, Counter())
