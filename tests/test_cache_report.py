"""What `gateway cache report` says of right and wrong answers, from figures as they lie in Redis."""

from __future__ import annotations

import re
from datetime import date
from xml.etree import ElementTree

import msgspec
import pytest

from app.reports.cache import CacheReport, Judged, Wrong, as_html, as_json, as_text, interval

DAYS = date(2026, 11, 1), date(2026, 11, 2)
FIGURES = {
    "looks": 500,
    "hits": 200,
    "checks": 50,
    "wrong": 1,
    "shadow_right": 30,
    "shadow_wrong": 10,
    "veto:number": 7,
}
WORST = Wrong("acme", "support", "0123456789abcdef", 3, "Where is <my> card?")


def report(**figures: int) -> CacheReport:
    judged = [Judged(day, "acme", "support", FIGURES | figures) for day in DAYS]
    judged.append(Judged(DAYS[0], "quiet", "support", {"looks": 4}))
    return CacheReport(first=DAYS[0], last=DAYS[1], tenant=None, lines=[], judged=judged, worst=[WORST])


def cells(page: bytes, caption: str) -> list[dict[str, str]]:
    """A table of the page, each row by its heads."""
    text = page.decode()
    root = ElementTree.fromstring(text[text.index("<main") : text.index("</body>")])
    (table,) = [table for table in root.iter("table") if table.findtext("caption") == caption]
    heads = [head.text or "" for head in table.iterfind("thead/tr/th")]
    return [dict(zip(heads, [cell.text or "" for cell in row], strict=True)) for row in table.iterfind("tbody/tr")]


@pytest.mark.parametrize(
    ("part", "of", "low", "high"),
    [(0, 100, 0.0, 0.03699), (2, 100, 0.00550, 0.07001), (50, 100, 0.40383, 0.59617), (10, 10, 0.72247, 1.0)],
)
def test_an_interval_is_wilson_s(part: int, of: int, low: float, high: float) -> None:
    assert interval(part / of, of) == pytest.approx((low, high), abs=1e-4)


def test_nothing_is_known_of_a_share_of_nothing() -> None:
    assert interval(0.0, 0) == (0.0, 1.0)


def test_days_of_a_tenant_and_alias_are_added_and_shown_with_intervals() -> None:
    row, _ = cells(as_html(report()), "By tenant and alias, with 95 % intervals")
    assert row == {
        "Tenant": "acme",
        "Alias": "support",
        "Served": "400 of 1,000",
        "Found wrong": "2 of 100",
        "Right": "98.00 % [93.00, 99.45]",
        "Wrong per hit": "2.00 % [0.55, 7.00]",
        "Wrong per request": "0.80 % [0.22, 2.80]",
        "Wrong, if served": "25.00 % [16.81, 35.48]",
    }


def test_what_was_never_asked_again_is_not_called_right() -> None:
    _, row = cells(as_html(report()), "By tenant and alias, with 95 % intervals")
    assert (row["Tenant"], row["Right"], row["Wrong per hit"], row["Wrong per request"]) == ("quiet", "-", "-", "-")


def test_the_worst_entries_stand_on_the_page_and_in_the_terminal() -> None:
    (row,) = cells(as_html(report()), "Worst entries")
    assert (row["Entry"], row["Wrong"], row["Question"]) == ("0123456789ab", "3", "Where is <my> card?")
    assert "wrong 3 times: acme support 0123456789abcdef Where is <my> card?" in as_text(report())


def test_the_terminal_says_right_and_wrong_per_hit_and_per_request() -> None:
    (line,) = [line for line in as_text(report()).splitlines() if line.startswith("  acme ")]
    assert "right 98.00 % [93.00, 99.45], wrong per hit 2.00 % [0.55, 7.00], per request 0.80 % [0.22, 2.80]" in line


def test_every_series_of_the_charts_has_a_colour() -> None:
    page = as_html(report()).decode()
    assert set(re.findall(r'class="[^"]*\b(s\d)\b', page)) == set(re.findall(r"\.(s\d) {", page))


def test_json_has_what_the_intervals_are_made_of() -> None:
    found = msgspec.json.decode(as_json(report()))
    assert found["judged"][0] == {"day": "2026-11-01", "tenant": "acme", "alias": "support", **FIGURES}
    assert found["worst"][0]["times"] == 3


def test_it_says_why_there_was_no_answer_from_before() -> None:
    row, other = cells(as_html(report(unsure=1200, no_vector=3)), "Why there was none")
    assert (row["No vector"], row["Unsure"], row["Vetoed"]) == ("6", "2,400", "number 14")
    assert (other["Tenant"], other["Unsure"], other["Vetoed"]) == ("quiet", "0", "0")
