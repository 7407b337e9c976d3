"""What a release has to pass, as `gates.yaml` says it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml
from msgspec import Meta, Struct

DEFAULT = Path(__file__).with_name("gates.yaml")
Share = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[int, Meta(gt=0)]


class Gate(Struct, frozen=True, forbid_unknown_fields=True):
    title: str
    threshold: str
    blocking: bool


class Gates(Struct, frozen=True, forbid_unknown_fields=True):
    """One of each; the order is that of the report."""

    smoke: Gate
    direct: Gate
    rows: Gate
    fallback: Gate
    load: Gate
    evals: Gate


class Load(Struct, frozen=True, forbid_unknown_fields=True):
    model: str
    expected_peak_rpm: Positive
    seconds: Positive
    p95_seconds: Annotated[float, Meta(gt=0)]
    error_share: Share
    stream_share: Share
    vendor_rpm: Positive
    vendor_tpm: Positive

    @property
    def rpm(self) -> int:
        return 2 * self.expected_peak_rpm


class Fallback(Struct, frozen=True, forbid_unknown_fields=True):
    model: str
    primary: str
    """The provider that is blocked, as the simulator names it."""
    rpm: Positive
    seconds: Positive
    faults: Annotated[dict[str, dict[str, Any]], Meta(min_length=1)]


class Case(Struct, frozen=True, forbid_unknown_fields=True):
    ask: str
    expect: str


class Evals(Struct, frozen=True, forbid_unknown_fields=True):
    model: str
    baseline: Share
    cases: Annotated[list[Case], Meta(min_length=1)]


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    gates: Gates
    load: Load
    fallback: Fallback
    evals: Evals


class BadSettings(Exception):
    """The file of gates is wrong; the text names the key."""


def read(file: Path = DEFAULT) -> Settings:
    """Raises `BadSettings`."""
    try:
        return msgspec.convert(yaml.safe_load(file.read_text()), Settings)
    except (OSError, yaml.YAMLError, msgspec.ValidationError) as error:
        raise BadSettings(f"{file} cannot be used: {error}.") from error
