"""One answer on its way to everybody who asked for the same: the leader's frames, and those who listen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from app.cache.entry import MAX_ENTRY_BYTES
from app.core import Exchange
from app.errors import GatewayError


class Flight:
    """What a vendor says to the leader's call, kept until it is over: for the store, and for listeners.

    The vendor's call lives while anybody listens: a leader whose client hangs up goes on for the listeners, and is cut
    when the last of them leaves. A whole answer is a flight of one frame.

    `frames` is None where the answer grew beyond MAX_ENTRY_BYTES with nobody listening: then it is neither kept nor
    followed. `over`: it was good to its end. `error`: what the leader's client is told in its place. `lost`: the leader
    left without either, and listeners must ask for themselves. `begun`: the first frame is there.
    """

    def __init__(self, leader: Exchange) -> None:
        self.leader = leader
        self.frames: list[bytes] | None = []
        self.begun = self.over = self.lost = False
        self.error: GatewayError | None = None
        self.listeners = 0
        self.cut: Callable[[], object] | None = None
        """Ends the leader, whose client is gone."""
        self._bytes = 0
        self._changed: asyncio.Event | None = None

    @property
    def joinable(self) -> bool:
        return self.frames is not None and not self.landed

    @property
    def landed(self) -> bool:
        """Whether the leader is done with it, one way or another."""
        return self.over or self.lost or self.error is not None

    def add(self, frame: bytes) -> None:
        if self.frames is None:
            return
        self._bytes += len(frame)
        if self._bytes > MAX_ENTRY_BYTES and not self.listeners:
            self.frames = None
            return
        self.frames.append(frame)
        self.begun = True
        self._tell()

    def end(self, error: GatewayError | None = None, *, over: bool = False) -> None:
        """The leader is done with it, one way or another."""
        if self.landed:
            return
        self.over = over
        self.error = error
        self.lost = not over and error is None
        self._tell()

    async def change(self) -> None:
        """Until there is more, or an end."""
        if self._changed is None:
            self._changed = asyncio.Event()
        await self._changed.wait()

    def hold(self, cut: Callable[[], object]) -> bool:
        """The leader's client is gone: whether the leader must go on, until `cut` is called."""
        if not self.listeners or not self.joinable:
            return False
        self.cut = cut
        return True

    def leave(self) -> None:
        """A listener is done."""
        self.listeners -= 1
        if not self.listeners and self.cut is not None and self.joinable:
            self.cut()

    def _tell(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None
