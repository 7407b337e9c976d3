"""A vendor's stream on its way to the client: what may be sent, what is held back, what it told so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from app.errors import VendorBroke, VendorError
from app.providers.translator import Frame, Kind, StreamReader
from app.upstream import VendorAnswer

FILTERED = "content_filter"
"""The finish reason that says why there may be no content."""

KEPT_BYTES = 8_192
"""How much of a stream's frames is kept to estimate its tokens if the client hangs up; beyond it, extrapolated."""


class Stream:
    """A vendor's stream between its chunks: what is ready to relay, what it told so far, whether it is `done`."""

    def __init__(self, reader: StreamReader, start_buffer_bytes: int, *, withhold_usage: bool) -> None:
        self.reader = reader
        self._withhold_usage = withhold_usage
        self._start_buffer_bytes = start_buffer_bytes
        self._kept: list[bytes] = []
        self._kept_bytes = self._relayed_bytes = 0
        self._ready: list[bytes] = []
        self._started = self.done = False
        self._fault: VendorError | None = None

    async def begin(self, answer: VendorAnswer) -> None:
        """Reads up to the first content, or until the start buffer is full. Raises VendorError."""
        size = 0
        while not self._started and size <= self._start_buffer_bytes:
            chunk = await answer.chunk()
            if chunk is not None:
                size += len(chunk)
                self._take(self.reader.feed(chunk))
            elif self.reader.finished:
                self._take(self.reader.end())
            else:
                raise VendorBroke("the vendor's stream ended before any content")
            if self._fault and not self._started:
                raise self._fault
            if self.done and not self._started:
                if self.reader.finish_reason != FILTERED:
                    raise VendorBroke("the vendor's stream is empty")
                return  # the vendor's filter left nothing of it, and says so

    async def hold(self, answer: VendorAnswer, max_bytes: int) -> bool:
        """Reads on and keeps it all. False where it is larger than that before its end. Raises VendorError."""
        while not self.done and self._relayed_bytes <= max_bytes:
            if self._fault is not None:
                raise self._fault
            await self.more(answer)
        return self.done

    def rewrite(self, change: Callable[[bytes], bytes]) -> None:
        """Changes what has been taken and not sent."""
        self._ready = [change(self.ready())]

    @property
    def held(self) -> bytes | None:
        """The whole of a stream of which nothing was sent; None where its end is not there."""
        return b"".join(self._ready) if self.done else None

    async def more(self, answer: VendorAnswer) -> None:
        """Waits for the next bytes and reads them."""
        chunk = await answer.chunk()
        if chunk is None:
            self._end()
        else:
            self._take(self.reader.feed(chunk))

    async def pour(self, answer: VendorAnswer, take: Callable[[bytes], bool]) -> bool:
        """Gives `take` what comes, the moment it comes, until that wants no more; it reads it by `passing`.

        False where the vendor's bytes ended before.
        """
        sated = await answer.pour(take)
        if not sated:
            self._end()
        return sated

    def passing(self, chunk: bytes) -> bytes | None:
        """Reads bytes of the vendor's: what may be sent at once. None at the stream's end, and where it is broken.

        Nothing that was taken before waits to be sent.
        """
        if not self.reader.plain(chunk):
            self._take(self.reader.feed(chunk))
            return None if self.done or self._fault is not None else self.ready()
        self._relayed_bytes += len(chunk)  # most chunks of most streams
        if self._kept_bytes < KEPT_BYTES:
            self._keep(chunk)
        return chunk

    def _end(self) -> None:
        """The vendor's bytes end here."""
        if self.reader.finished:
            self._take(self.reader.end())
        else:
            self._fault = VendorBroke("the vendor cut its stream")

    def _keep(self, frames: bytes) -> None:
        self._kept.append(frames)
        self._kept_bytes += len(frames)

    def _take(self, frames: Iterator[Frame]) -> None:
        ready = self._ready
        try:
            for kind, frame in frames:
                if kind is Kind.CONTENT:
                    self._started = True
                    self._relayed_bytes += len(frame)
                    if self._kept_bytes < KEPT_BYTES:
                        self._keep(frame)
                elif kind is Kind.DONE:
                    self.done = True
                elif kind is Kind.USAGE and self._withhold_usage:
                    continue
                ready.append(frame)
                if self.done:
                    return
        except VendorError as fault:
            self._fault = fault

    def take(self) -> tuple[bytes, bool]:
        """What may be sent now, and whether it ends the stream. Raises VendorError; `ready()` has what came before."""
        if self._fault is not None:
            raise self._fault
        return self.ready(), self.done

    def ready(self) -> bytes:
        """What has been taken and not sent."""
        out = self._ready
        data = out[0] if len(out) == 1 else b"".join(out)
        self._ready = []
        return data

    def text_bytes(self) -> int:
        """Size of the text relayed so far: read from the frames that were kept, extrapolated beyond them."""
        kept = sum(self.reader.text_bytes(frame) for frame in self._kept)
        return kept * self._relayed_bytes // self._kept_bytes if self._kept_bytes else 0
