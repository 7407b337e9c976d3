"""Vendors as pure translators. A vendor is a row here until it needs behaviour of its own; then it earns a file."""

from __future__ import annotations

from app.providers.openai import OPENAI
from app.providers.translator import Translator

PROVIDERS: dict[str, Translator] = {
    "openai": OPENAI,
    "openai_compatible": OPENAI,
}
