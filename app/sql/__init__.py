"""The SQL of the ledger, in `.sql` files: each statement has a name, and a sentence that says what it does."""

from __future__ import annotations

import re
from importlib.resources import files

_HEAD = re.compile(r"^-- name: ([a-z_]+)\n(?:-- .*\n)*-- .*\.\n", re.MULTILINE)


def statements(file: str) -> dict[str, str]:
    """The statements of `file` (such as `ledger.sql`) by name, without their comments."""
    return parse(files(__name__).joinpath(file).read_text(encoding="utf-8"))


def parse(text: str) -> dict[str, str]:
    """A statement begins with `-- name: its_name` and at least one comment line, the last of them with a full stop.

    Raises `ValueError` where a name lacks its sentence, or stands twice.
    """
    heads = list(_HEAD.finditer(text))
    ends = [*(head.start() for head in heads[1:]), len(text)]
    found = {head[1]: text[head.end() : end].strip().removesuffix(";") for head, end in zip(heads, ends, strict=True)}
    if len(found) != len(re.findall(r"^-- name:", text, re.MULTILINE)):
        raise ValueError("every `-- name:` is followed by a sentence, and stands once")
    return found
