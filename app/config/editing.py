"""Small changes to a configuration file that people write too: comments and the form of everything else stay."""

from __future__ import annotations

import json
from collections.abc import Mapping

import yaml

from app.config.reading import ConfigError, Loader


class NoEntry(ConfigError):
    """The section has no entry `name`."""

    def __init__(self, section: str, name: str) -> None:
        super().__init__([f"{section}.{name}: there is no such entry"])
        self.name = name


def add_entry(text: str, section: str, name: str, members: Mapping[str, str], comment: str) -> str:
    """`text` with the entry `name` put first in `section`, which is made where it is missing. Values are YAML already.

    Raises ConfigError.
    """
    if section not in _members(_document(text)):
        text = f"{text.rstrip()}\n{section}:\n".lstrip()
    key, entries = _members(_document(text))[section]
    indent = "  "
    if isinstance(entries, yaml.MappingNode) and entries.value:
        if entries.flow_style:
            raise ConfigError([f"{section}: stands on one line; give each of its entries a line of its own first"])
        start = end = _offset(text, entries.start_mark.line, 0)
        indent = " " * entries.start_mark.column
        before, after = "", "\n"
    else:
        start = _offset(text, key.end_mark.line, key.end_mark.column) + 1
        end = max(start, _offset(text, entries.end_mark.line, entries.end_mark.column))
        before, after = "\n", ""
    lines = [f"{indent}{name}:  # {comment}", *(f"{indent}  {key}: {value}" for key, value in members.items())]
    return text[:start] + before + "\n".join(lines) + after + text[end:]


def set_member(text: str, section: str, name: str, key: str, value: str) -> str:
    """`text` with `key: value` in the entry `name` of `section`. The value is YAML already. Raises ConfigError."""
    _, entries = _members(_document(text)).get(section, (None, None))
    _, entry = (_members(entries) if entries is not None else {}).get(name, (None, None))
    if not isinstance(entry, yaml.MappingNode) or not entry.value:
        raise NoEntry(section, name)
    old = _members(entry).get(key)
    if old is not None:
        marks = old[1].start_mark, old[1].end_mark
        new = value
    elif entry.flow_style:
        first = entry.value[0][0].start_mark
        marks, new = (first, first), f"{key}: {value}, "
    else:
        first = entry.value[0][0].start_mark
        marks, new = (first, first), f"{key}: {value}\n{' ' * first.column}"
    start, end = (_offset(text, mark.line, mark.column) for mark in marks)
    return text[:start] + new + text[end:]


def members(text: str, section: str, name: str) -> dict[str, str]:
    """The members of an entry, their values as JSON, which is YAML too. Raises ConfigError."""
    _document(text)
    entry = ((yaml.load(text, Loader=Loader) or {}).get(section) or {}).get(name)
    if not isinstance(entry, dict):
        raise NoEntry(section, name)
    return {key: json.dumps(value, default=str) for key, value in entry.items()}


def _document(text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ConfigError([f"is not YAML: {' '.join(str(error).split())}"]) from error


def _members(node: yaml.Node | None) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    return {key.value: (key, value) for key, value in node.value} if isinstance(node, yaml.MappingNode) else {}


def _offset(text: str, line: int, column: int) -> int:
    """Marks count lines and characters; their `index` counts bytes."""
    start = 0
    for _ in range(line):
        start = text.index("\n", start) + 1
    return start + column
