"""Incident modes: what a replica still does while something is wrong, for everybody or for one tenant."""

from __future__ import annotations

from collections.abc import Mapping

from app.ambient import Ambient
from app.config import Config, Mode
from app.control import Control, Entry
from app.errors import ReadOnly

MODE, TENANT_MODE = "mode", "tenant_mode"
"""The kinds of the control channel's entries: the first has one name, EVERYBODY; the second's are tenants."""
EVERYBODY = "gateway"
STRICTNESS: Mapping[str, int] = {"normal": 0, "cache_only": 1, "read_only": 2}
RETRY_SECONDS = 60.0
"""What a refused client is told to wait where nobody said when the mode ends."""


class Modes:
    """What holds: the strictest of the configuration's `gateway.mode`, the channel's for everybody, the tenant's."""

    def __init__(self, control: Control, ambient: Ambient) -> None:
        self._everybody = control.kind(MODE)
        self._tenants = control.kind(TENANT_MODE)
        self._ambient = ambient

    def of(self, config: Config, tenant_id: str) -> Mode:
        """A tenant's mode, looked up once a call."""
        if not self._everybody and not self._tenants:
            return config.settings.mode
        return self._strictest(config, self._tenants.get(tenant_id))[0]

    def told(self, config: Config) -> tuple[Mode, Entry | None]:
        """Everybody's mode, and the entry of the channel that made it so; None where it is the configuration's."""
        return self._strictest(config, None)

    def tenants(self) -> Mapping[str, Entry]:
        """What was told of single tenants."""
        return self._tenants

    def refusal(self, config: Config, tenant_id: str, mode: Mode) -> ReadOnly:
        """The error for a call that `mode` does not serve."""
        entry = self._strictest(config, self._tenants.get(tenant_id))[1]
        if mode == "read_only":
            said = "The gateway is in read-only mode: no calls are served until it ends."
        else:
            said = "The gateway is in cache-only mode: only answers from the cache are served until it ends."
        until = None if entry is None else entry.until
        wait = RETRY_SECONDS if until is None else max(1.0, until - self._ambient.now())
        return ReadOnly(f"{said} GET /status tells when.", retry_after_seconds=wait, should_retry=False)

    def _strictest(self, config: Config, tenant: Entry | None) -> tuple[Mode, Entry | None]:
        """A word of the channel that this version does not know counts as nothing: a later one may have more."""
        strictest: tuple[Mode, Entry | None] = (config.settings.mode, None)
        for entry in (self._everybody.get(EVERYBODY), tenant):
            value = None if entry is None else entry.value
            if value is not None and STRICTNESS.get(value, -1) > STRICTNESS[strictest[0]]:
                strictest = (value, entry)
        return strictest
