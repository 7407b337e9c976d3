"""What each dialect's requests become at each kind of provider, as `runbooks/dialects.md` shows it.

`tests/golden/dialects/<dialect>/*.json` are clients' requests in the dialect's own words. What becomes of each at each
kind, the vendor's request or the refusal, stands in `tests/golden/dialects/<dialect>.outcomes.json`, and the tables of
the page are read from there. `RECORD=1` rewrites both, and the difference is reviewed.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import Struct

from app.dialects import ROUTES, translator
from app.errors import VendorCannot
from app.vendors import KINDS
from tests.translation import target

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "runbooks" / "dialects.md"
GOLDEN = ROOT / "tests" / "golden" / "dialects"
TABLE = re.compile(r"(<!-- matrix ([a-z]+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
Outcome = dict[str, Any]


class Rows(Struct, frozen=True):
    """A dialect's table: its route, its features with the request that shows each, requests that show none, and, where
    a vendor may leave something out, what must be found in its request for a `yes`.
    """

    path: str
    features: dict[str, str]
    no_features: frozenset[str]
    marks: dict[str, str]


MESSAGES = Rows(
    "/v1/messages",
    {
        "System prompt": "system",
        "System prompt in blocks": "system_blocks",
        "System message amid the conversation": "system_amid",
        "Answer begun by the client": "begun_answer",
        "Tools": "tools",
        "Tools, strict": "tools_strict",
        "Tools, `input_examples`": "tool_examples",
        "Tools that Anthropic runs": "vendor_tools",
        "Tools of MCP servers": "mcp_servers",
        "Tool choice: auto": "tool_choice_auto",
        "Tool choice: any": "tool_choice_any",
        "Tool choice: none": "tool_choice_none",
        "Tool choice: one tool": "tool_choice_named",
        "Tools, one call at a time": "tools_one_at_a_time",
        "Results of parallel calls": "parallel_results",
        "Result, `is_error`": "result_failed",
        "Result with an image": "result_with_image",
        "Image in base64": "image_base64",
        "Image by URL": "image_url",
        "PDF in base64": "pdf_base64",
        "PDF by URL": "pdf_url",
        "Document of text": "text_document",
        "File by Anthropic's id": "file_id",
        "Citations": "citations",
        "Search results": "search_result",
        "Thinking, with a budget": "thinking_budget",
        "Thinking, adaptive": "thinking_adaptive",
        "Thinking disabled": "thinking_disabled",
        "Thinking, `display`": "thinking_display",
        "Effort": "effort",
        "Thinking sent back": "thinking_returned",
        "Thinking of another vendor sent back": "thinking_of_another_vendor",
        "JSON by schema": "schema",
        "JSON by schema, `output_format`": "schema_older",
        "Stop sequences": "stop_sequences",
        "Temperature": "temperature",
        "Top p": "top_p",
        "Top k": "top_k",
        "User": "user_id",
        "Service tier: standard only": "service_tier",
        "Prompt-cache hints": "cache_hints",
        "Prompt-cache hint of the whole request": "cache_automatic",
        "Container": "container",
        "Context management": "context_management",
    },
    frozenset({"plain", "stream"}),
    {
        "tools_strict": "strict",
        "result_failed": "error",
        "thinking_disabled": "disabled",
        "thinking_display": "omitted",
        "thinking_returned": "c2lnbmVk",
        "thinking_of_another_vendor": "b3RoZXI=",
        "user_id": "u-1",
        "service_tier": "tier",
        "cache_hints": "cache",
        "cache_automatic": "cache",
    },
)
RESPONSES = Rows(
    "/v1/responses",
    {
        "Input as a text": "text",
        "Instructions": "instructions",
        "Developer message": "developer_message",
        "Answer begun by the client": "begun_answer",
        "Refusal sent back": "refusal_returned",
        "Tools": "tools",
        "Tools, strict": "tools_strict",
        "Tools that OpenAI runs": "vendor_tools",
        "Tools of MCP servers": "mcp_servers",
        "Custom tools": "custom_tools",
        "Tools, a most of calls": "max_tool_calls",
        "Tool choice: auto": "tool_choice_auto",
        "Tool choice: required": "tool_choice_required",
        "Tool choice: none": "tool_choice_none",
        "Tool choice: one function": "tool_choice_named",
        "Tool choice: some of the tools": "tool_choice_among",
        "Tools, one call at a time": "tools_one_at_a_time",
        "Results of parallel calls": "parallel_results",
        "Result with an image": "result_with_image",
        "Image in base64": "image_base64",
        "Image by URL": "image_url",
        "Image by OpenAI's id": "image_id",
        "PDF in base64": "pdf_base64",
        "PDF by URL": "pdf_url",
        "File by OpenAI's id": "file_id",
        "Audio in": "audio_in",
        "JSON by schema": "schema",
        "JSON without schema": "json_object",
        "Verbosity": "verbosity",
        "Reasoning effort": "effort",
        "Reasoning, summary": "reasoning_summary",
        "Reasoning of Anthropic's sent back": "reasoning_returned",
        "Reasoning of Gemini's sent back": "reasoning_of_gemini",
        "Reasoning of OpenAI's sent back": "reasoning_of_openai",
        "Length": "length",
        "Temperature": "temperature",
        "Top p": "top_p",
        "Log probabilities": "logprobs",
        "User": "user",
        "Safety identifier": "safety_identifier",
        "Metadata": "metadata",
        "Prompt-cache key": "prompt_cache_key",
        "Service tier: flex": "service_tier_flex",
        "Truncation: auto": "truncation",
        "Answer kept at the vendor": "stored",
        "Neutral values of all of these": "neutral_values",
    },
    frozenset({"plain", "stream", "parts"}),
    {
        "tools_strict": "strict",
        "reasoning_summary": "detailed",
        "reasoning_returned": "c2lnbmVk",
        "reasoning_of_gemini": "b3RoZXI=",
        "reasoning_of_openai": "gAAAAABsealed",
        "user": "u-1",
        "metadata": "support",
        "prompt_cache_key": "handbook",
    },
)
DIALECTS = {"messages": MESSAGES, "responses": RESPONSES}
"""By the name of the dialect."""


def _outcome(path: str, kind: str, body: bytes) -> Outcome:
    dialect = ROUTES[path]
    try:
        sent = translator(dialect, kind).outgoing(dialect.read(body), target(kind))
    except VendorCannot as refusal:
        return {"refused": refusal.param}
    return {"url": sent.url, "body": sent.body.decode()}


@cache
def outcomes(name: str) -> dict[str, dict[str, Outcome]]:
    """By request and kind; kinds whose outcome is the same stand together."""
    found: dict[str, dict[str, Outcome]] = {}
    for path in sorted((GOLDEN / name).glob("*.json")):
        body = path.read_bytes()
        found[path.stem] = {kind: _outcome(DIALECTS[name].path, kind, body) for kind in KINDS}
    return found


@cache
def _recorded(name: str) -> dict[str, dict[str, Outcome]]:
    path = GOLDEN / f"{name}.outcomes.json"
    if os.environ.get("RECORD"):
        path.write_bytes(msgspec.json.format(msgspec.json.encode(outcomes(name)), indent=2) + b"\n")
    return msgspec.json.decode(path.read_bytes())


def _word(case: str, outcome: Outcome, marks: dict[str, str]) -> str:
    if "refused" not in outcome:
        return "yes" if marks.get(case, "") in outcome["body"] else "dropped"
    param = outcome["refused"]
    return (
        f"refused or dropped (`{param}`)" if param.isidentifier() and param not in ("messages", "input") else "refused"
    )


def matrix(name: str) -> str:
    """A dialect's table in Markdown."""
    rows, found = DIALECTS[name], _recorded(name)
    lines = [["Feature", *(f"`{kind}`" for kind in KINDS)], ["---"] * (len(KINDS) + 1)]
    for feature, case in rows.features.items():
        lines.append([feature, *(_word(case, found[case][kind], rows.marks) for kind in KINDS)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@pytest.mark.parametrize("name", DIALECTS)
def test_every_request_becomes_what_is_recorded(name: str) -> None:
    assert outcomes(name) == _recorded(name)


@pytest.mark.parametrize("name", DIALECTS)
def test_every_request_is_a_feature_or_none(name: str) -> None:
    rows = DIALECTS[name]
    assert set(outcomes(name)) == set(rows.features.values()) | rows.no_features
    assert set(rows.marks) <= set(rows.features.values())


def test_the_page_has_the_tables_as_they_are() -> None:
    page = PAGE.read_text()
    made = TABLE.sub(lambda found: found[1] + matrix(found[2]), page)
    if os.environ.get("RECORD"):
        PAGE.write_text(page := made)
    assert [found[2] for found in TABLE.finditer(page)] == list(DIALECTS)
    assert page == made
