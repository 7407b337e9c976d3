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

from app.providers import PROVIDERS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "runbooks" / "providers.md"
GOLDEN = ROOT / "tests" / "golden"
TABLE = re.compile(r"(?<=<!-- matrix -->\n).*?(?=<!-- end -->)", re.DOTALL)

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
NO_FEATURES = {
    "plain", "stream", "stream_with_usage", "stream_with_null_options", "stream_with_other_options",
    "not_streamed_with_options", "tools", "unknown_members",
}  # fmt: skip


def _outcomes(kind: str) -> dict[str, Any]:
    return msgspec.json.decode((GOLDEN / f"{kind}.outcomes.json").read_bytes())


def _word(outcome: dict[str, Any]) -> str:
    if "raises" not in outcome:
        return "yes"
    assert outcome["raises"] == "VendorCannot"
    return f"refused or dropped (`{outcome['param']}`)" if outcome["param"].isidentifier() else "refused"


def matrix() -> str:
    """The table in Markdown."""
    found = {kind: _outcomes(kind) for kind in PROVIDERS}
    rows = [["Feature", *(f"`{kind}`" for kind in found)], ["---"] * (len(found) + 1)]
    for feature, case in FEATURES.items():
        rows.append([feature, *(_word(outcomes[f"request {case}"]) for outcomes in found.values())])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def test_the_page_has_the_matrix_of_the_golden_table() -> None:
    page = PAGE.read_text()
    if os.environ.get("RECORD"):
        PAGE.write_text(page := TABLE.sub(lambda _: matrix(), page))
    assert TABLE.findall(page) == [matrix()]


def test_every_request_of_the_golden_table_is_a_feature_or_none() -> None:
    cases = {path.stem for path in (GOLDEN / "requests").glob("*.json")}
    assert cases == set(FEATURES.values()) | NO_FEATURES


@pytest.mark.parametrize("kind", PROVIDERS)
def test_every_kind_of_provider_has_a_section_on_the_page(kind: str) -> None:
    assert f"\n## `{kind}`\n" in PAGE.read_text()
