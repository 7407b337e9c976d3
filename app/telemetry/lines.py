"""Log lines: through a thread, so that a stalled consumer never stops the event loop."""

from __future__ import annotations

import logging
import sys
import threading

import msgspec

from app.ambient import Ambient, timestamp

MAX_WAITING_LINES = 20_000
LINES_SECONDS = 0.05
OF_CALL = ("request_id", "trace_id")
"""Members of a line that is about one call: `extra=call.named`."""


class Lines:
    """Lines to standard output by a thread of their own. When the consumer stalls, lines are dropped and counted.

    The thread looks every LINES_SECONDS instead of being woken by each line: a wake-up costs more than a line.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._waiting: list[bytes] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lines", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        if len(self._waiting) < MAX_WAITING_LINES:
            self._waiting.append(line)
        else:
            self.dropped += 1

    def close(self) -> None:
        """Waits until what was written is out, at most a second."""
        self._closed.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        while not self._closed.wait(LINES_SECONDS):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        lines, self._waiting = self._waiting, []
        if not lines:
            return
        try:
            sys.stdout.buffer.write(b"\n".join(lines) + b"\n")
            sys.stdout.buffer.flush()
        except (OSError, ValueError):
            self.dropped += len(lines)


class JsonLog(logging.Handler):
    """The rest of the log, in the same form and through the same thread. What is about one call names it (OF_CALL)."""

    def __init__(self, lines: Lines, ambient: Ambient) -> None:
        super().__init__()
        self._lines = lines
        self._ambient = ambient

    def emit(self, record: logging.LogRecord) -> None:
        entry = {
            "time": timestamp(self._ambient.now()),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            "logger": record.name,
        }
        for name in OF_CALL:
            if (value := getattr(record, name, None)) is not None:
                entry[name] = value
        if record.exc_info:
            entry["traceback"] = logging.Formatter().formatException(record.exc_info)
        self._lines.write(msgspec.json.encode(entry))
