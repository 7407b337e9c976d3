"""`gateway lint-apps`: direct vendor calls in an app's source. Text, not syntax: apps are written in any language."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

MAX_BYTES = 2_000_000
"""A larger file is data or a bundle."""
SKIPPED = frozenset(
    {".git", ".venv", "venv", "node_modules", "__pycache__", "dist", "build", ".tox", ".mypy_cache", ".ruff_cache"}
)
"""Folders whose content the app's authors did not write."""
PROSE = frozenset({".md", ".rst", ".txt", ".lock", ".svg", ".html", ".css"})
"""Kinds of files from which nothing is called."""

_HOST = re.compile(
    r"api\.openai\.com|[\w-]+\.openai\.azure\.com|api\.anthropic\.com|generativelanguage\.googleapis\.com|"
    r"[\w-]*aiplatform\.googleapis\.com|bedrock(?:-runtime)?\.[\w-]+\.amazonaws\.com|openrouter\.ai/api|"
    r"api\.(?:groq|mistral|deepseek|together|fireworks|cerebras|x|cohere)\.(?:com|ai|xyz)"
)
_KEY_NAME = re.compile(
    r"\b(?:AZURE_OPENAI|OPENAI|ANTHROPIC|GEMINI|GOOGLE|OPENROUTER|GROQ|MISTRAL|DEEPSEEK|TOGETHER|FIREWORKS|CEREBRAS|XAI|"
    r"COHERE)_API_KEY\b"
)
_KEY = re.compile(r"\bsk-(?:proj|ant|or-v1)-[\w-]{16,}")
_CLIENT = re.compile(
    r"\b(?:Async)?(?:OpenAI|AzureOpenAI|Anthropic|AnthropicBedrock|Mistral|Groq)\s*\("
    r"|\bgenai\.Client\s*\(|\bOpenAIOkHttpClient\.fromEnv\s*\("
    r"|\bclient\s*\(\s*[\"']bedrock-runtime[\"']"
)
_ADDRESS = re.compile(r"base_?url|baseURL|azure_endpoint|http_options|endpoint_url", re.IGNORECASE)
_CALL_LINES = 12
"""A client's address is looked for so far behind its name: arguments are written one a line."""


class DirectCall(Struct, frozen=True):
    """`file`:`line`, what stands there (never a key itself), and what to do."""

    file: str
    line: int
    found: str
    advice: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.found}: {self.advice}"


def direct_calls(path: Path) -> list[DirectCall]:
    """Of a file, or of a folder's files in order. A line with `gateway: allow` is passed over."""
    return [call for file in _files(path) for call in _in_text(str(file), file.read_text(errors="replace"))]


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        if _is_source(path):
            yield path
        return
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if name not in SKIPPED)
        for name in sorted(names):
            file = Path(folder, name)
            if file.suffix not in PROSE and file.is_file() and _is_source(file):
                yield file


def _is_source(file: Path) -> bool:
    """Neither too large nor binary: of a file that is named, as a pre-commit hook does, as of one that is found."""
    if file.stat().st_size > MAX_BYTES:
        return False
    with file.open("rb") as opened:
        return b"\0" not in opened.read(1024)


def _in_text(file: str, text: str) -> Iterator[DirectCall]:
    lines = text.splitlines()
    for place, line in enumerate(lines):
        if "gateway: allow" in line:
            continue
        for found, advice in _in_line(line, lines[place : place + _CALL_LINES]):
            yield DirectCall(file, place + 1, found, advice)


def _in_line(line: str, following: list[str]) -> Iterator[tuple[str, str]]:
    if host := _HOST.search(line):
        yield f"the vendor's address {host[0]}", "call the gateway's address instead"
    if name := _KEY_NAME.search(line):
        yield f"the vendor key {name[0]}", "only the gateway holds vendor keys: use a gateway key (sk-gw-...)"
    if _KEY.search(line):
        yield "a vendor's key", "revoke it at the vendor and take it out of the history; use a gateway key (sk-gw-...)"
    if (client := _CLIENT.search(line)) and not any(_ADDRESS.search(one) for one in following):
        yield f"the client {client[0].rstrip('( ')} at its vendor's own address", "give it the gateway's as base_url"
