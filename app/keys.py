"""Service keys, from the making to the revoking: `service_keys.yaml` is changed, the rest of the file stays.

A key is shown once, where it is made; the file has its digest. Each change is checked by loading the configuration of
every environment, and taken back if that finds a fault.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path

from msgspec import Struct

from app.ambient import Ambient, timestamp
from app.config import ConfigError, load
from app.config.editing import NoEntry, add_entry, members, set_member

SECTION = "service_keys"
FILE = "service_keys.yaml"


class UnknownKey(Exception):
    """No key has this id. The message says where the ids are shown."""


class MadeKey(Struct, frozen=True):
    """`key` is the secret itself: it is printed once and kept nowhere."""

    id: str
    key: str


class ListedKey(Struct, frozen=True):
    """What may be shown of a key. `state` is active, expired or revoked."""

    id: str
    service: str
    tenants: tuple[str, ...]
    roles: tuple[str, ...]
    expires: str | None
    state: str


def new(
    folder: Path,
    ambient: Ambient,
    service: str,
    tenants: Sequence[str],
    expires: date | None,
    roles: Sequence[str] = ("call",),
) -> MadeKey:
    """Makes a key and writes its entry. Raises ConfigError, OSError."""
    made = _made(ambient)
    written = {"service": json.dumps(service), "tenants": json.dumps(list(tenants))}
    if tuple(roles) != ("call",):
        written["roles"] = json.dumps(list(roles))
    _change(folder, lambda text: _added(text, made, ambient, written, expires))
    return made


def rotate(folder: Path, ambient: Ambient, key_id: str, overlap_days: int, expires: date | None) -> MadeKey:
    """Makes a key that is in everything else like another, which is valid for `overlap_days` more, through the day.

    A key that would expire sooner still does. Raises UnknownKey, ConfigError, OSError.
    """
    made = _made(ambient)

    def change(text: str) -> str:
        kept = members(text, SECTION, key_id)
        last = (_today(ambient) + timedelta(days=overlap_days)).isoformat()
        sooner = json.loads(kept.get("expires", "null"))
        changed = text if sooner and sooner <= last else set_member(text, SECTION, key_id, "expires", last)
        of_old = {"digest", "expires", "revoked"}
        return _added(changed, made, ambient, {k: v for k, v in kept.items() if k not in of_old}, expires)

    _change(folder, change)
    return made


def revoke(folder: Path, ambient: Ambient, key_id: str) -> None:
    """Marks a key as revoked, for good; its entry stays, so that rows still tell whose it was. Raises UnknownKey,
    ConfigError, OSError."""
    _change(folder, lambda text: set_member(text, SECTION, key_id, "revoked", _today(ambient).isoformat()))


def listed(folder: Path, ambient: Ambient) -> list[ListedKey]:
    """Every key of the folder, in the order of their services. Raises ConfigError."""
    now = ambient.now()
    config = load(folder, _environments(folder)[0], require_secrets=False)
    shown = [
        ListedKey(
            id=key.id,
            service=key.service,
            tenants=("*",) if key.tenants is None else tuple(sorted(key.tenants)),
            roles=tuple(sorted(key.roles)),
            expires=None if key.expires is None else timestamp(key.expires - 1)[:10],
            state="revoked" if key.revoked else "expired" if key.expires and key.expires <= now else "active",
        )
        for key in config.keys.values()
    ]
    return sorted(shown, key=lambda key: (key.service, key.id))


def _made(ambient: Ambient) -> MadeKey:
    public = ambient.key_id()
    return MadeKey(public, f"sk-gw-{public}-{ambient.key_secret()}")


def _added(text: str, made: MadeKey, ambient: Ambient, written: Mapping[str, str], expires: date | None) -> str:
    entry = {"digest": f"sha256:{hashlib.sha256(made.key.encode()).hexdigest()}", **written}
    if expires is not None:
        entry["expires"] = expires.isoformat()
    return add_entry(text, SECTION, made.id, entry, f"made {_today(ambient)}")


def _change(folder: Path, change: Callable[[str], str]) -> None:
    """Rewrites the file, whole or not at all; a change that leaves a faulty configuration is taken back."""
    file = folder / FILE
    before = file.read_text()
    try:
        changed = change(before)
    except NoEntry as error:
        raise UnknownKey(f"{file} has no key {error.name!r}; `gateway keys list` shows the ids of all.") from error
    _replace(file, changed)
    try:
        for environment in _environments(folder):
            load(folder, environment, require_secrets=False)
    except ConfigError:
        _replace(file, before)
        raise


def _replace(file: Path, text: str) -> None:
    beside = file.with_name(f".{file.name}.new")
    beside.write_text(text)
    beside.replace(file)


def _environments(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / "environments").glob("*.yaml")) or ["prod"]


def _today(ambient: Ambient) -> date:
    return date.fromisoformat(timestamp(ambient.now())[:10])
