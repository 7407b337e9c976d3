"""Names of the GenAI semantic conventions, and of their providers: one table, a column for each version spoken.

The conventions are in development: names still change (github.com/open-telemetry/semantic-conventions-genai). As they
ask for, what is emitted stays the same until OTEL_SEMCONV_STABILITY_OPT_IN holds `gen_ai_latest_experimental`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

LATEST = "gen_ai_latest_experimental"

_NAMES = {
    #                      1.40, the default                            latest, where it differs
    "operation":          ("gen_ai.operation.name",                     None),
    "provider":           ("gen_ai.provider.name",                      None),
    "request_model":      ("gen_ai.request.model",                      None),
    "stream":             ("gen_ai.request.stream",                     None),
    "response_model":     ("gen_ai.response.model",                     None),
    "response_id":        ("gen_ai.response.id",                        None),
    "finish_reasons":     ("gen_ai.response.finish_reasons",            None),
    "first_chunk":        ("gen_ai.response.time_to_first_chunk",       None),
    "input_tokens":       ("gen_ai.usage.input_tokens",                 None),
    "output_tokens":      ("gen_ai.usage.output_tokens",                None),
    "reasoning_tokens":   ("gen_ai.usage.reasoning.output_tokens",      None),
    "cache_read_tokens":  ("gen_ai.usage.cache_read.input_tokens",      None),
    "cache_write_tokens": ("gen_ai.usage.cache_creation.input_tokens",  "gen_ai.usage.cache_write.input_tokens"),
    "cost":               ("gen_ai.usage.cost",                         None),  # not theirs: Langfuse reads it
}  # fmt: skip

PROVIDER_NAMES = {
    "anthropic": "anthropic",
    "azure": "azure.ai.openai",
    "bedrock": "aws.bedrock",
    "gemini": "gcp.gemini",
    "groq": "groq",
    "mistral": "mistral_ai",
    "deepseek": "deepseek",
    "openai": "openai",
    "xai": "x_ai",
    "vertex": "gcp.vertex_ai",
}
"""The conventions' name of a provider by its kind; another is called by its name in the configuration."""


def conventions(opt_in: str | None) -> Mapping[str, str]:
    """The names in use, by what they mean; `opt_in` is what OTEL_SEMCONV_STABILITY_OPT_IN says, comma-separated."""
    latest = LATEST in (word.strip() for word in (opt_in or "").split(","))
    return MappingProxyType({what: (new if latest and new else name) for what, (name, new) in _NAMES.items()})
