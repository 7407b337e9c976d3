"""Answers that a vendor keeps for an account which tenants share: only its tenant can go on from one.

The vendor's id gets a seal over the tenant and the target. Whoever names an answer has to name its seal too, so an id
that another tenant has seen, or that was guessed, names nothing; and a conversation goes on where it began.
"""

from __future__ import annotations

import hmac

SEAL_DIGITS = 32
"""128 bits of HMAC-SHA256 in hexadecimal."""


def owner(secret: str, tenant_id: str) -> bytes:
    """What seals the answers of a tenant."""
    return hmac.digest(secret.encode(), b"stored answers of " + tenant_id.encode(), "sha256")


def named(vendor_id: str, owner: bytes, target: str) -> str:
    """The name of an answer that the vendor keeps under its id."""
    return f"{vendor_id}-{_seal(vendor_id, owner, target)}"


def vendor_id(name: str, owner: bytes, target: str) -> str | None:
    """The vendor's id of an answer; None unless it is the owner's, at this target."""
    id, dash, seal = name.rpartition("-")
    if dash and hmac.compare_digest(seal.encode(), _seal(id, owner, target).encode()):
        return id
    return None


def _seal(vendor_id: str, owner: bytes, target: str) -> str:
    return hmac.digest(owner, f"{target}\n{vendor_id}".encode(), "sha256").hex()[:SEAL_DIGITS]
