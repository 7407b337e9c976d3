"""Vendors as pure translators. A vendor is a row here until it needs behaviour of its own; then it earns a file."""

from __future__ import annotations

from app.providers.anthropic import ANTHROPIC, RELAYED
from app.providers.azure import AZURE
from app.providers.bedrock import BEDROCK
from app.providers.gemini import GEMINI, VERTEX
from app.providers.openai import OPENAI
from app.providers.openai_compatible import compatible
from app.providers.openai_responses import KEEPERS, RESPONSES
from app.providers.passed import passing
from app.providers.translator import Translator
from app.vendors import COMPATIBLE, KINDS

PROVIDERS: dict[str, Translator] = {
    "openai": OPENAI,
    "anthropic": ANTHROPIC,
    "azure": AZURE,
    "openai_compatible": compatible(KINDS["openai_compatible"]),
    **{name: compatible(vendor) for name, vendor in COMPATIBLE.items()},
    "bedrock": BEDROCK,
    "gemini": GEMINI,
    "vertex": VERTEX,
}
"""By `Provider.kind`."""

NATIVE: dict[tuple[str, str], Translator] = {
    ("messages", "anthropic"): RELAYED,
    **RESPONSES,
    **KEEPERS,
    **{
        ("passed", kind): passing(kind, PROVIDERS[kind])
        for kind in ("openai", "azure", "openai_compatible", *COMPATIBLE)
    },
}
"""By dialect and kind, for vendors that speak a dialect other than the internal form themselves: requests and answers
are relayed as they are.
"""
