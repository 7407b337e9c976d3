"""What has been invalidated: an epoch for each tenant, alias, revision and document, told to all replicas.

Epochs are part of keys, so nothing that was kept before one is found after it, an answer that was under way included:
it is kept under the epoch that it was asked in. They are told by the control channel, which every replica reads twice a
second; a replica that has not read it for REACH_SECONDS finds nothing at all. Documents are not part of keys: an entry
notes the epochs of its documents when it was asked for, and is none once they are others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import product

import msgspec
from msgspec import Struct

from app.ambient import Ambient
from app.config.caching import MAX_TTL_SECONDS
from app.control import Control, Entry

INVALIDATED = "invalidated"
"""The kind of the control channel's entries."""
REACH_SECONDS = 1.0
"""Two readings of the channel: an invalidation holds everywhere within this, or nothing is served from before."""
REMEMBERED_SECONDS = MAX_TTL_SECONDS + 86_400
"""By then everything that was kept before an invalidation has ended by itself."""


class Scope(Struct, frozen=True, omit_defaults=True):
    """What is invalidated: all of it that is of this tenant, alias, revision and document, where they are named."""

    tenant: str | None = None
    alias: str | None = None
    revision: str | None = None
    tag: str | None = None


class _Told(Struct, frozen=True):
    scope: Scope
    epoch: str


class Epochs:
    """What this replica has heard of."""

    def __init__(self, control: Control, ambient: Ambient) -> None:
        self._control = control
        self._ambient = ambient
        self._epochs: dict[Scope, str] = {}

    @property
    def known(self) -> bool:
        """Whether everything that was invalidated a second ago has been heard of."""
        return self._control.read and self._control.age_seconds <= REACH_SECONDS

    def of(self, tenant: str, alias: str, revision: str) -> str:
        """Of what a call would find; empty where nothing of it was ever invalidated."""
        if not self._epochs:
            return ""
        return "".join(self._of(tenant, alias, revision, None))

    def of_tag(self, tenant: str, alias: str, revision: str, tag: str) -> str:
        """Of one document."""
        if not self._epochs:
            return ""
        return "".join(self._of(tenant, alias, revision, tag))

    def _of(self, tenant: str, alias: str, revision: str, tag: str | None) -> Iterator[str]:
        for scope in product((None, tenant), (None, alias), (None, revision)):
            if epoch := self._epochs.get(Scope(*scope, tag)):
                yield f"{len(epoch)}:{epoch}"

    async def begin(self, scope: Scope, by: str, epoch: str | None = None) -> str:
        """A new epoch, or the one that is named, from which on nothing from before is found. Here it holds at once.

        Raises RedisAway, RedisRefused.
        """
        name, value, until, epoch = instruction(scope, epoch, self._ambient)
        await self._control.put(INVALIDATED, name, value, by, until)
        self._epochs[scope] = epoch
        return epoch

    def heard(self, entry: Entry) -> Scope | None:
        """What the channel tells; an instruction that cannot be read invalidates everything."""
        if entry.value is None:
            return None
        try:
            told = msgspec.json.decode(entry.value, type=_Told)
        except msgspec.MsgspecError:
            told = _Told(Scope(), entry.value)
        self._epochs[told.scope] = told.epoch
        return told.scope


def instruction(scope: Scope, epoch: str | None, ambient: Ambient) -> tuple[str, str, float, str]:
    """What is put in the control channel: name, value, until when; and the epoch that begins."""
    now = ambient.now()
    epoch = epoch or ambient.event_id(now)
    name = hashlib.sha256(msgspec.json.encode(scope)).hexdigest()[:32]
    return name, msgspec.json.encode(_Told(scope, epoch)).decode(), now + REMEMBERED_SECONDS, epoch
