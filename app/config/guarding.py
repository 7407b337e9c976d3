"""Guardrails: written shape -> who is asked about what, and which aliases and tenants ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from app.config.reading import Faults, Secrets, entries, known
from app.config.running import BASE_URL, NAME, Guardrail
from app.config.written import Written

MAX_TIMEOUT_MS = 60_000
MAX_SEGMENT_CHARACTERS = 100_000


def guardrails(written: Written, secrets: Secrets, faults: Faults) -> dict[str, Guardrail]:
    used = _used(written)
    found: dict[str, Guardrail] = {}
    for name, guardrail in entries(written.guardrails, NAME, "guardrails", faults):
        path = f"guardrails.{name}"
        match = BASE_URL.fullmatch(guardrail.url)
        if match is None or not 0 < int(match["port"] or 1) <= 65_535:
            faults.add(f"{path}.url", "expected an http(s) URL without credentials, query and fragment")
        if not guardrail.checks:
            faults.add(f"{path}.checks", "needs input, output or both")
        if not 0 < guardrail.timeout_ms <= MAX_TIMEOUT_MS:
            faults.add(f"{path}.timeout_ms", f"must be above 0 and at most {MAX_TIMEOUT_MS}")
        if not 0 < guardrail.segment_characters <= MAX_SEGMENT_CHARACTERS:
            faults.add(f"{path}.segment_characters", f"must be above 0 and at most {MAX_SEGMENT_CHARACTERS}")
        token = None
        if guardrail.token is not None:
            token = secrets.resolve(guardrail.token, f"{path}.token", faults, needed=name in used)
        found[name] = Guardrail(
            name=name,
            url=guardrail.url,
            token=token,
            checks=frozenset(guardrail.checks),
            timeout_seconds=guardrail.timeout_ms / 1000,
            fails_open=guardrail.away == "open",
            segment_characters=guardrail.segment_characters,
        )
    return found


def _used(written: Written) -> frozenset[str]:
    """Those that somebody asks: only they need their tokens."""
    owners = (*written.aliases.values(), *written.plans.values(), *written.tenants.values())
    return frozenset(name for owner in owners if owner is not None for name in owner.guardrails or ())


def named(
    names: Sequence[str] | None, guardrails: Mapping[str, Guardrail], path: str, faults: Faults
) -> tuple[Guardrail, ...]:
    """The guardrails of an alias or a tenant, in the order in which they are asked."""
    for name in names or ():
        known(name, guardrails, "guardrail", path, faults)
    return tuple(guardrails[name] for name in names or () if name in guardrails)
