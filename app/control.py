"""The control channel: what must reach every replica within seconds and is not in a file, by kind and name.

It is one small hash in Redis. Each replica reads its version every POLL_SECONDS, off the hot path, and the whole hash
when the version is another one. What a replica has read stays in force while Redis is away, and also when Redis comes
back empty: an entry ends by its time or by another entry, never by its absence. Files remain the truth for what is
permanent.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from msgspec import Struct

from app.ambient import Ambient, timestamp
from app.redis_cluster import reached
from app.redis_pipe import RedisAway, RedisPipe, RedisRefused

log = logging.getLogger(__name__)

CHANNEL = "gateway:control"
POLL_SECONDS = 0.5
"""A revoked key is refused everywhere within two seconds: this, a slow Redis and a busy event loop together."""
REACH_SECONDS = 3.0
"""How long `tell` tries to reach Redis."""
REVOKED = "revoked"
"""The kind whose names are ids of credentials that no longer count."""
_FIELD = re.compile(r"[a-z_]+:[A-Za-z0-9][A-Za-z0-9._:/-]{0,191}")


class Entry(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One instruction: `by` says who gave it, `at` when (RFC 3339); past `until`, unix seconds, it no longer counts.

    What `value` says is the kind's own; None takes back what stood under that name.
    """

    value: str | None
    by: str
    at: str
    until: float | None = None


OnEntry = Callable[[str, str, Entry], None]
"""Called with kind, name and entry for each that a replica had not heard of."""


class Control:
    """The channel as one replica knows it."""

    def __init__(self, pipe: RedisPipe, ambient: Ambient, on_entry: OnEntry | None = None) -> None:
        self._pipe = pipe
        self._ambient = ambient
        self._on_entry = on_entry
        self._put = pipe.script(Path(__file__).with_name("control_put.lua").read_text())
        self._heard: dict[bytes, bytes] = {}
        self._in_force: dict[str, dict[str, Entry]] = {}
        self._version: bytes | None = None
        self._read_at = ambient.monotonic()
        self.read = False
        """Whether it was ever read: before that, nothing is known of what was told before this replica came."""

    @property
    def age_seconds(self) -> float:
        """Since the channel was last read: beyond a few seconds this replica hears of nothing."""
        return self._ambient.monotonic() - self._read_at

    def kind(self, kind: str) -> Mapping[str, Entry]:
        """A kind's entries in force, by name. The same mapping for ever: it changes as the channel does."""
        return self._in_force.setdefault(kind, {})

    async def run(self) -> None:
        while True:
            await self.run_once()
            await self._ambient.sleep(POLL_SECONDS)

    async def run_once(self) -> int:
        """Reads what is new; returns how many entries were. With Redis away everything stays as it is."""
        self._end_what_lapsed()
        try:
            version = await self._pipe.execute("HGET", CHANNEL, "version")
            fields = [] if version in (None, self._version) else await self._pipe.execute("HGETALL", CHANNEL)
        except RedisAway:
            return 0
        except RedisRefused as error:
            log.error("the control channel cannot be read: %s", error)
            return 0
        self._read_at, self.read = self._ambient.monotonic(), True
        read = dict(zip(fields[::2], fields[1::2], strict=True))
        self._version = read.pop(b"version", self._version)
        new = [field for field, content in read.items() if self._heard.get(field) != content]
        for field in new:
            self._heard[field] = read[field]
            self._take(field, read[field])
        return len(new)

    async def put(self, kind: str, name: str, value: str | None, by: str, until: float | None = None) -> Entry:
        """Tells every replica, this one at its next look. Raises RedisAway, RedisRefused."""
        field = f"{kind}:{name}"
        if not _FIELD.fullmatch(field):
            raise ValueError(f"{field!r} does not match {_FIELD.pattern}")
        now = self._ambient.now()
        entry = Entry(value=value, by=by, at=timestamp(now), until=until)
        version = self._ambient.event_id(now)
        await self._pipe.execute("EVALSHA", self._put, 1, CHANNEL, field, msgspec.json.encode(entry), version)
        return entry

    def _take(self, field: bytes, content: bytes) -> None:
        kind, _, name = field.decode("utf-8", "replace").partition(":")
        try:
            entry = msgspec.json.decode(content, type=Entry)
        except msgspec.MsgspecError:
            log.error("the control channel holds no entry under %s:%s", kind, name)
            return
        entries = self._in_force.setdefault(kind, {})
        if entry.value is None:
            entries.pop(name, None)
        elif entry.until is None or entry.until > self._ambient.now():
            entries[name] = entry
        if self._on_entry is not None:
            self._on_entry(kind, name, entry)

    def _end_what_lapsed(self) -> None:
        now = self._ambient.now()
        for entries in self._in_force.values():
            for name in [name for name, entry in entries.items() if entry.until is not None and entry.until <= now]:
                del entries[name]


async def tell(
    url: str, ambient: Ambient, kind: str, name: str, value: str | None, by: str, until: float | None = None
) -> Entry:
    """Puts one entry from outside a replica, as the command line does. Raises RedisAway, RedisRefused."""
    async with _reached(url, ambient) as control:
        return await control.put(kind, name, value, by, until)


async def told(url: str, ambient: Ambient, *kinds: str) -> dict[str, Mapping[str, Entry]]:
    """What the channel holds of these kinds. Raises RedisAway."""
    async with _reached(url, ambient) as control:
        await control.run_once()
        return {kind: control.kind(kind) for kind in kinds}


@asynccontextmanager
async def _reached(url: str, ambient: Ambient) -> AsyncIterator[Control]:
    async with reached(url, ambient, REACH_SECONDS) as pipe:
        yield Control(pipe, ambient)
