"""Vendors as data: what a provider of each kind needs in the configuration, and how vendors that speak OpenAI's chat
completions differ from OpenAI.

A row says what the vendor's documentation or recorded traffic shows; what it does not say is as OpenAI does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct


class Vendor(Struct, frozen=True, kw_only=True):
    """One vendor, or one kind of provider.

    base_url            where it is, `{region}` standing for the provider's; None where every installation has its own
    keyless             works without a key
    account             whose accounts sign in to it with credentials that are fetched, and expire
    versioned           its models go by deployment, its API by `api_version`
    renamed             members of a request that it knows by another name, which means the same
    uncarried           members that it refuses, or, which is worse, ignores in silence
    stream_options      False: it refuses them, and tells a stream's usage unasked
    typed_content       writes content as a list of typed parts where it reasons
    bad_key             how the message begins by which alone it tells a bad key from a bad request
    request_id_header   where it puts its own request id
    extras              members of a request beyond OpenAI's own that it takes: cache hints, reasoning sent back
    """

    base_url: str | None = None
    keyless: bool = False
    account: Literal["google", "aws"] | None = None
    versioned: bool = False
    renamed: Mapping[str, str] = {}
    uncarried: frozenset[str] = frozenset()
    stream_options: bool = True
    typed_content: bool = False
    bad_key: str | None = None
    request_id_header: str = "x-request-id"
    extras: frozenset[str] = frozenset()


KINDS = {
    "openai": Vendor(base_url="https://api.openai.com/v1"),
    "anthropic": Vendor(base_url="https://api.anthropic.com/v1"),
    "azure": Vendor(versioned=True),
    "openai_compatible": Vendor(keyless=True),
    "bedrock": Vendor(base_url="https://bedrock-runtime.{region}.amazonaws.com", account="aws"),
    "gemini": Vendor(base_url="https://generativelanguage.googleapis.com/v1beta"),
    "vertex": Vendor(account="google"),
}
"""By the `kind` of a provider."""
COMPATIBLE_KIND = "openai_compatible"

_MAX_TOKENS = {"max_completion_tokens": "max_tokens"}

COMPATIBLE = {
    # https://inference-docs.cerebras.ai/resources/openai: these are answered with 400.
    "cerebras": Vendor(
        base_url="https://api.cerebras.ai/v1",
        uncarried=frozenset(
            {"frequency_penalty", "logit_bias", "presence_penalty", "parallel_tool_calls", "service_tier"}
        ),
    ),
    # https://api-docs.deepseek.com/api/create-chat-completion: what it does not list has no effect. A thinking model
    # wants its reasoning back with the results of its calls (guides/thinking_mode).
    "deepseek": Vendor(
        base_url="https://api.deepseek.com/v1",
        renamed=_MAX_TOKENS,
        uncarried=frozenset({"n", "seed", "logit_bias", "parallel_tool_calls", "service_tier", "modalities"}),
        extras=frozenset({"reasoning_content"}),
    ),
    # https://docs.fireworks.ai/tools-sdks/openai-compatibility
    "fireworks": Vendor(
        base_url="https://api.fireworks.ai/inference/v1",
        renamed=_MAX_TOKENS,
        uncarried=frozenset({"service_tier", "modalities"}),
    ),
    # https://console.groq.com/docs/openai: these are answered with 400, and `n` may be 1 only.
    "groq": Vendor(
        base_url="https://api.groq.com/openai/v1",
        uncarried=frozenset({"n", "logprobs", "top_logprobs", "logit_bias", "modalities"}),
    ),
    # https://docs.mistral.ai/api: a member that it does not know is answered with 422, max_completion_tokens and
    # stream_options.include_usage among them.
    "mistral": Vendor(
        base_url="https://api.mistral.ai/v1",
        renamed=_MAX_TOKENS | {"seed": "random_seed"},
        uncarried=frozenset(
            {"logprobs", "top_logprobs", "logit_bias", "user", "store", "service_tier", "modalities", "verbosity"}
        ),
        stream_options=False,
        typed_content=True,
        request_id_header="mistral-correlation-id",
    ),
    # https://docs.ollama.com/api/openai-compatibility: what it does not list has no effect.
    "ollama": Vendor(
        base_url="http://127.0.0.1:11434/v1",
        keyless=True,
        renamed=_MAX_TOKENS,
        uncarried=frozenset(
            {"n", "tool_choice", "logit_bias", "parallel_tool_calls", "store", "service_tier", "modalities"}
        ),
    ),
    # https://openrouter.ai/docs/api-reference/overview
    "openrouter": Vendor(
        base_url="https://openrouter.ai/api/v1",
        request_id_header="x-generation-id",
        extras=frozenset({"cache_control", "reasoning_details"}),
    ),
    # https://docs.together.ai/docs/openai-api-compatibility
    "together": Vendor(
        base_url="https://api.together.xyz/v1",
        renamed=_MAX_TOKENS,
        uncarried=frozenset({"parallel_tool_calls", "service_tier", "store", "modalities"}),
    ),
    # https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html
    "vllm": Vendor(
        base_url="http://127.0.0.1:8000/v1",
        keyless=True,
        uncarried=frozenset({"service_tier", "store", "modalities"}),
    ),
    # https://docs.x.ai/docs/api-reference: a bad key is a 400 under the code of any invalid argument.
    "xai": Vendor(
        base_url="https://api.x.ai/v1",
        uncarried=frozenset({"logit_bias"}),
        bad_key="Incorrect API key provided",
    ),
}
"""By the `vendor` of a provider of kind `openai_compatible`."""
