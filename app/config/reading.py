"""Files -> one merged, typed document, with every fault by its file and path. The only home of yaml."""

from __future__ import annotations

import contextlib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import yaml
from msgspec import Struct

from app.config.running import Secret

T = TypeVar("T")

FILES = {
    "gateway.yaml": {"gateway"},
    "gateway_models.yaml": {"providers", "targets", "aliases", "guardrails"},
    "tenant_policy.yaml": {"plans", "tenants", "global"},
    "service_keys.yaml": {"service_keys", "issuers", "certificates"},
}
"""Which sections each file of the configuration folder may hold. An overlay may hold any."""

PRICE_SECTIONS = {"prices", "discounts"}


_NAMED = 20
"""How many names a fault lists."""


class ConfigError(Exception):
    """The configuration has faults: `faults` is one sentence each, with file and path. Nothing was swapped."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


class Loader(yaml.CSafeLoader):
    """A safe loader to which a key written twice is a fault, and so is one that YAML does not read as text.

    YAML reads `no` as false and 0123 as 83: a tenant or a key id of that name would be another one.
    """


def mapping(loader: Loader, node: yaml.MappingNode) -> dict[str, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        if key_node.tag != "tag:yaml.org,2002:str":
            raise yaml.MarkedYAMLError(None, None, "a key here is not text; write it in quotes", key_node.start_mark)
        if key_node.value in seen:
            raise yaml.MarkedYAMLError(None, None, f"the key {key_node.value!r} is written twice", key_node.start_mark)
        seen.add(key_node.value)
    return loader.construct_mapping(node, deep=True)


Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)


class Faults:
    """Collects sentences; knows which file a path was written in."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.origin: dict[str, str] = {}

    def add(self, path: str, message: str) -> None:
        at = path
        while at not in self.origin and "." in at:
            at = at.rpartition(".")[0]
        self.sentences.append(f"{self.origin.get(at, 'configuration')}: {path}: {message}")


def merge(base: dict[str, Any], over: dict[str, Any], path: str, file: str, faults: Faults) -> None:
    """Mappings merge, everything else replaces. Notes the file of every path."""
    for key, value in over.items():
        here = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merge(base[key], value, here, file, faults)
            continue
        base[key] = value
        faults.origin[here] = file
        if isinstance(value, dict):
            base[key] = {}
            merge(base[key], value, here, file, faults)


def entries(
    section: Mapping[str, T | None], pattern: re.Pattern[str], path: str, faults: Faults
) -> Iterator[tuple[str, T]]:
    """Names and entries that could be read; checks the names of all."""
    for name, entry in section.items():
        if not pattern.fullmatch(name):
            faults.add(f"{path}.{name}", f"a name here matches {pattern.pattern}")
        if entry is not None:
            yield name, entry


def known(name: str, section: Mapping[str, object], what: str, path: str, faults: Faults) -> None:
    if name not in section:
        more = f" and {len(section) - _NAMED} more" if len(section) > _NAMED else ""
        faults.add(path, f"no {what} {name!r}; known: {', '.join(islice(section, _NAMED))}{more}")


FAULTY = object()


def convert(value: Any, shape: Any, path: str, faults: Faults) -> Any:
    """`value` as `shape`, without the parts that are faulty, so that the rest is checked too.

    `FAULTY` stands for what cannot go without such a part; a faulty entry of a mapping is None.
    """
    shape = _present(shape, value)
    if isinstance(shape, type) and issubclass(shape, Struct):
        if not isinstance(value, dict):
            faults.add(path, f"expected a mapping, found {kind(value)}")
            return FAULTY
        members = {m.encode_name: m for m in msgspec.structs.fields(shape)}
        parts: dict[str, Any] = {}
        for key, part in value.items():
            here = f"{path}.{key}" if path else key
            if key in members:
                parts[members[key].name] = convert(part, members[key].type, here, faults)
            else:
                faults.add(here, f"unknown key; known here: {', '.join(sorted(members))}")
        required = [member for member in members.values() if member.required]
        for member in required:
            if member.name not in parts:
                faults.add(f"{path}.{member.encode_name}" if path else member.encode_name, "is required")
        good = {name: part for name, part in parts.items() if part is not FAULTY}
        return shape(**good) if all(member.name in good for member in required) else FAULTY
    if typing.get_origin(shape) is dict:
        if not isinstance(value, dict):
            faults.add(path, f"expected a mapping, found {kind(value)}")
            return FAULTY
        part_shape = typing.get_args(shape)[1]
        entries = {key: convert(part, part_shape, f"{path}.{key}", faults) for key, part in value.items()}
        return {key: None if part is FAULTY else part for key, part in entries.items()}
    if value is False and "off" in _words(shape):
        value = "off"
    if typing.get_origin(shape) is Literal and value not in typing.get_args(shape):
        faults.add(path, f"expected one of {', '.join(typing.get_args(shape))}")
        return FAULTY
    try:
        return msgspec.convert(value, shape)
    except msgspec.ValidationError as error:
        faults.add(path, str(error))
        return FAULTY


def _words(shape: Any) -> tuple[Any, ...]:
    """Of a choice of words, or none of them, the words. YAML reads `off` as false."""
    if typing.get_origin(shape) is Literal:
        return typing.get_args(shape)
    return tuple(word for part in typing.get_args(shape) for word in _words(part))


def _present(shape: Any, value: Any) -> Any:
    """The struct of `Struct | None` where there is a value: its faults are told each by its path."""
    if value is not None and isinstance(shape, types.UnionType):
        structs = [part for part in typing.get_args(shape) if isinstance(part, type) and issubclass(part, Struct)]
        return structs[0] if len(structs) == 1 else shape
    return shape


def kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def price_tables(folder: Path) -> list[Path]:
    """The price tables, oldest first. A file that is not named by a date is none."""
    found = []
    for path in sorted((folder / "prices").glob("????-??-??.yaml")):
        with contextlib.suppress(ValueError):
            date.fromisoformat(path.stem)
            found.append(path)
    return found


def price_table(folder: Path, day: date) -> Path | None:
    """The table in force on `day`: the newest that is not of a later day.

    Where all are, the clock is wrong or the tables are: then the oldest, for a call has to cost something.
    """
    tables = price_tables(folder)
    return next((table for table in reversed(tables) if table.stem <= day.isoformat()), next(iter(tables), None))


def known_environments(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / "environments").glob("*.yaml"))


def read_files(
    folder: Path, environment: str, overlays: Sequence[Path], day: date
) -> list[tuple[str, set[str] | None, bytes]]:
    """Every file as (name, sections it may hold or None, content), in the order of merging."""
    faults: list[str] = []
    files: list[tuple[str, set[str] | None, bytes]] = []

    def read(path: Path, sections: set[str] | None, hint: str) -> None:
        try:
            files.append((str(path), sections, path.read_bytes()))
        except OSError as error:
            faults.append(f"{path}: cannot be read ({error.strerror}); {hint}")

    for name, sections in FILES.items():
        if name == "service_keys.yaml" and not (folder / name).exists():
            continue
        read(folder / name, sections, "every configuration folder has one")
    for file in sorted((folder / "tenants").glob("*.yaml")):
        read(file, {"tenants"}, "every file in this folder is read")
    table = price_table(folder, day)
    if table is not None:
        read(table, PRICE_SECTIONS, "it is the price table in force")
    else:
        faults.append(f"{folder / 'prices'}: no price table; write one named by its date, such as 2026-11-01.yaml")
    known = known_environments(folder)
    if environment in known:
        read(folder / "environments" / f"{environment}.yaml", None, "")
    else:
        faults.append(f"{folder / 'environments'}: no environment {environment!r}; known: {', '.join(known)}")
    for overlay in overlays:
        read(overlay, None, "it was named by --overlay")
    if faults:
        raise ConfigError(faults)
    return files


def parse(files: Sequence[tuple[str, set[str] | None, bytes]], faults: Faults) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name, sections, content in files:
        try:
            document = yaml.load(content, Loader=Loader)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-02-30
            faults.sentences.append(f"{name}: is not YAML: {' '.join(str(error).split())}")
            continue
        if document is None and sections is None:
            continue  # an environment or an overlay that changes nothing
        if document is None:
            faults.sentences.append(f"{name}: is empty; expected {', '.join(sorted(sections or ()))}")
            continue
        if not isinstance(document, dict):
            faults.sentences.append(f"{name}: expected a mapping at the top, found {kind(document)}")
            continue
        for section in [key for key in document if sections is not None and key not in sections]:
            faults.sentences.append(
                f"{name}: {section}: does not belong in this file; it may hold {', '.join(sorted(sections or ()))}"
            )
            del document[section]
        if sections is not None:
            _twice(merged, document, name, faults)
        merge(merged, document, "", name, faults)
    return merged


def _twice(merged: dict[str, Any], document: dict[str, Any], file: str, faults: Faults) -> None:
    """Base files do not lay entries over each other: only environments and overlays do."""
    for section, written in document.items():
        there = merged.get(section)
        if isinstance(written, dict) and isinstance(there, dict):
            for name in written.keys() & there.keys():
                faults.sentences.append(
                    f"{file}: {section}.{name}: is written in {faults.origin[f'{section}.{name}']} too"
                )


class Secrets:
    """Resolves `env:NAME` and `file:/path`; remembers what it read so that a rotation is noticed."""

    def __init__(self, environ: Mapping[str, str], require: bool) -> None:
        self.environ = environ
        self.require = require
        self.read: list[bytes] = []
        self.files: list[Path] = []

    def resolve(self, reference: str, path: str, faults: Faults, needed: bool = True, document: bool = False) -> Secret:
        """Where it is not `needed`, what cannot be found is an empty secret and no fault.

        Only a `document` may hold spaces and lines: everything else goes into a header.
        """
        require = self.require and needed
        scheme, _, name = reference.partition(":")
        value = ""
        if scheme == "env" and name:
            value = self.environ.get(name, "")
            if not value and require:
                faults.add(path, f"the environment variable {name} is not set")
        elif scheme == "file" and name:
            self.files.append(Path(name))
            try:
                value = Path(name).read_text().strip()
            except (OSError, ValueError):
                if require:
                    faults.add(path, f"the file {name} cannot be read")
            else:
                if not value and require:
                    faults.add(path, f"the file {name} is empty")
        else:
            faults.add(path, "a secret is a reference, env:NAME or file:/path, never the value itself")
        if not document and any(ord(c) < 33 or ord(c) > 126 for c in value):
            faults.add(path, f"what {reference} holds cannot stand in a header: printable ASCII without spaces only")
        self.read.append(value.encode())
        return Secret(value)
