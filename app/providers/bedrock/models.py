"""What families of models on Bedrock want said in their own way, by their model ids.

An inference profile puts a region before the id (`us.anthropic.claude-…`); the ARN of an application inference profile
names no model, so what is said of a family does not hold for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from msgspec import Struct

ANTHROPIC_REASONING = "anthropic-claude-v1"
"""`format` of Claude's reasoning details: its signatures hold at Anthropic and at Bedrock alike."""
BEDROCK_REASONING = "amazon-bedrock-v1"

Fields = dict[str, object]


class Effort(Struct, frozen=True):
    """How a family spells `reasoning_effort`: the member of `additionalModelRequestFields` for a word of OpenAI's."""

    models: re.Pattern[str]
    fields: Callable[[str, int], Fields | None]
    """Of the word and the answer's length in tokens. None for what the family has no equivalent for."""


def _gpt_oss(word: str, max_tokens: int) -> Fields | None:
    return {"reasoning_effort": word} if word in ("low", "medium", "high") else None


def _openai(word: str, max_tokens: int) -> Fields | None:
    return {"reasoning": {"effort": word}}


def _nova(word: str, max_tokens: int) -> Fields | None:
    if word == "none":
        return {}
    if word not in ("low", "medium", "high"):
        return None
    return {"reasoningConfig": {"type": "enabled", "maxReasoningEffort": word}}


def _claude_budget(word: str, max_tokens: int) -> Fields | None:
    """The budget is a part of the answer's length, and less than all of it."""
    if word == "none":
        return {}
    share = BUDGET_SHARES.get(word)
    if share is None or max_tokens <= LEAST_BUDGET_TOKENS:
        return None
    return {"thinking": {"type": "enabled", "budget_tokens": max(int(max_tokens * share), LEAST_BUDGET_TOKENS)}}


def _claude_adaptive(word: str, max_tokens: int) -> Fields | None:
    if word == "none":
        return {}
    if word not in ("low", "medium", "high", "xhigh", "max"):
        return None
    return {"thinking": {"type": "adaptive", "display": "summarized"}, "output_config": {"effort": word}}


BUDGET_SHARES = {"minimal": 0.1, "low": 0.2, "medium": 0.5, "high": 0.8, "xhigh": 0.95}
"""Of the answer's length. OpenRouter's shares, so that all routes to Claude think alike."""
LEAST_BUDGET_TOKENS = 1024
"""Anthropic's least."""
USUAL_TOKENS = 8192
"""The answer's length that budgets are shares of where a request names none; Bedrock then takes the model's most."""

EFFORTS = (
    Effort(re.compile(r"openai\.gpt-oss|moonshot"), _gpt_oss),
    Effort(re.compile(r"openai\."), _openai),
    Effort(re.compile(r"amazon\.nova-2"), _nova),
    # Up to 4.5 a budget; later ones decide by themselves, and some of those refuse a budget.
    Effort(re.compile(r"anthropic\.claude-(?:3-7|(?:opus|sonnet|haiku)-4-(?:\d{8}|[0-5](?!\d)))"), _claude_budget),
    Effort(re.compile(r"anthropic\.claude-(?!3|instant|v)"), _claude_adaptive),
)
"""The first that fits a model id counts; a model without an entry has no effort to choose."""

_NATIVE_SCHEMA = re.compile(
    r"anthropic\.claude-(?!3|instant|v)(?!(?:opus|sonnet|haiku)-4-(?:\d{8}|[0-4](?!\d)))"
    r"|openai\.|qwen\.|deepseek\.v|mistral\.|google\.gemma|nvidia\.|minimax\.|moonshot"
)
"""Models with structured output of their own (user guide, "Get validated JSON results from models")."""


def effort(model: str, word: str, max_tokens: int | None) -> Fields | None:
    """What asks `model` for this `reasoning_effort`; None when it cannot be asked."""
    family = next((family for family in EFFORTS if family.models.search(model)), None)
    return None if family is None else family.fields(word, max_tokens or USUAL_TOKENS)


def has_json_schema(model: str) -> bool:
    """Whether `outputConfig.textFormat` works; elsewhere a tool that must be called carries the schema."""
    return _NATIVE_SCHEMA.search(model) is not None


def is_claude(model: str) -> bool:
    return "anthropic.claude" in model


def reasoning_format(model: str) -> str:
    """`format` of the reasoning details that this model gives, and takes back."""
    return ANTHROPIC_REASONING if is_claude(model) else BEDROCK_REASONING
