"""What each kind of provider can carry, as `runbooks/providers.md` shows it: read from the golden table, so it is true.

`RECORD=1` rewrites the table in the page.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.vendors import COMPATIBLE, KINDS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "runbooks" / "providers.md"
GOLDEN = ROOT / "tests" / "golden"
TABLE = re.compile(r"(<!-- (matrix|vendors) -->\n).*?(?=<!-- end -->)", re.DOTALL)

FEATURES = {
    "System message": "system_message",
    "Developer message": "developer_message",
    "System message amid the conversation": "system_message_amid",
    "Name of a participant": "participant_name",
    "Answer begun by the client": "begun_answer",
    "Tools": "tools_offered",
    "Tools, strict": "tools_strict",
    "Tools, one call at a time": "tools_one_at_a_time",
    "Results of parallel calls": "tools_parallel_results",
    "Call without arguments": "tool_arguments_empty",
    "Result with an image": "tool_result_with_image",
    "Tool choice: auto": "tool_choice_auto",
    "Tool choice: none": "tool_choice_none",
    "Tool choice: required": "tool_choice_required",
    "Tool choice: one function": "tool_choice_named",
    "Tool choice: some of the tools": "tool_choice_among",
    "JSON by schema": "json_schema",
    "JSON without schema": "json_object",
    "Image by URL": "image_url",
    "Image in base64": "image_base64",
    "Image, low detail": "image_low_detail",
    "PDF in base64": "file_base64",
    "PDF by URL": "file_url",
    "Text file in base64": "file_plain_text",
    "File by OpenAI's id": "file_id",
    "Audio in": "audio_in",
    "Audio out": "audio_out",
    "Reasoning effort": "reasoning_effort",
    "Reasoning effort: minimal": "reasoning_effort_minimal",
    "Reasoning off": "reasoning_off",
    "Reasoning sent back": "reasoning_returned",
    "Reasoning of another vendor sent back": "reasoning_of_another_vendor",
    "Log probabilities": "logprobs",
    "Several answers": "two_choices",
    "One stop word": "stop_word",
    "Stop words": "stop_words",
    "Seed": "seed",
    "Temperature": "temperature",
    "Temperature above 1": "temperature_above_one",
    "Top p": "top_p",
    "Presence penalty": "presence_penalty",
    "Frequency penalty": "frequency_penalty",
    "Logit bias": "logit_bias",
    "Length, `max_tokens`": "max_tokens",
    "Length, `max_completion_tokens`": "max_completion_tokens",
    "Prompt-cache hints": "cache_hints",
    "Prompt-cache key": "prompt_cache_key",
    "User": "user",
    "Metadata": "metadata",
    "Store": "store",
    "Service tier: default": "service_tier_default",
    "Service tier: flex": "service_tier_flex",
    "Verbosity": "verbosity",
    "Prediction": "prediction",
    "Web search": "web_search",
    "Neutral values of all of these": "neutral_values",
}
"""Row of the table -> request of the golden table."""
EMBEDDINGS = {
    "Embeddings": "text",
    "Embeddings of several texts": "texts",
    "Embeddings of token numbers": "tokens",
    "Embeddings, dimensions": "dimensions",
    "Embeddings, user": "user",
}
MARKS = {
    "request participant_name": "ada",
    "request reasoning_returned": "c2lnbmVk",
    "request reasoning_of_another_vendor": "eA==",
    "request cache_hints": "ephemeral|cachePoint",
    "request prompt_cache_key": "handbook",
    "request user": "u-1",
    "request metadata": "support",
    "request image_low_detail": "low",
    "request tools_strict": "strict",
}
"""Where a vendor may leave something out: what must then be found in its request for a `yes`, `|` between spellings."""
NO_FEATURES = {
    "plain", "stream", "stream_with_usage", "stream_with_null_options", "stream_with_other_options",
    "not_streamed_with_options", "tools", "unknown_members",
}  # fmt: skip


def _outcomes(kind: str) -> dict[str, Any]:
    return msgspec.json.decode((GOLDEN / f"{kind}.outcomes.json").read_bytes())


def _word(case: str, outcome: dict[str, Any]) -> str:
    if "raises" not in outcome:
        marks = MARKS.get(case, "").split("|")
        return "yes" if any(mark in outcome["body"] for mark in marks) else "dropped"
    assert outcome["raises"] == "VendorCannot"
    droppable = outcome["param"].isidentifier() and outcome["param"] not in ("model", "input")
    return f"refused or dropped (`{outcome['param']}`)" if droppable else "refused"


def matrix() -> str:
    """The table in Markdown."""
    found = {kind: _outcomes(kind) for kind in KINDS}
    rows = [["Feature", *(f"`{kind}`" for kind in found)], ["---"] * (len(found) + 1)]
    cases = {name: f"request {case}" for name, case in FEATURES.items()}
    cases |= {name: f"embed request {case}" for name, case in EMBEDDINGS.items()}
    for feature, case in cases.items():
        rows.append([feature, *(_word(case, outcomes[case]) for outcomes in found.values())])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def vendors() -> str:
    """What vendors of OpenAI's shape do not carry, in Markdown."""
    rows = [["`vendor`", "Refused or dropped"], ["---", "---"]]
    for name, vendor in COMPATIBLE.items():
        rows.append([f"`{name}`", ", ".join(f"`{param}`" for param in sorted(vendor.uncarried)) or "nothing"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def test_the_page_has_the_tables_as_they_are() -> None:
    tables = {"matrix": matrix(), "vendors": vendors()}
    page = PAGE.read_text()
    made = TABLE.sub(lambda found: found[1] + tables[found[2]], page)
    if os.environ.get("RECORD"):
        PAGE.write_text(page := made)
    assert [found[2] for found in TABLE.finditer(page)] == list(tables)
    assert page == made


def test_every_request_of_the_golden_table_is_a_feature_or_none() -> None:
    cases = {path.stem for path in (GOLDEN / "requests").glob("*.json")}
    assert cases == set(FEATURES.values()) | NO_FEATURES
    assert {path.stem for path in (GOLDEN / "embed_requests").glob("*.json")} == set(EMBEDDINGS.values())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_provider_has_a_section_on_the_page(kind: str) -> None:
    assert f"\n## `{kind}`\n" in PAGE.read_text()
