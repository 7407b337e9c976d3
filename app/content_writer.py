"""The child of a replica that redacts content and writes it: `<folder>/<tenant>/<day>.<replica>.jsonl`.

A tenant's folder is all that is kept of it, so deleting the tenant's content is deleting that. Files are opened for
each line: what is deleted is gone, and no descriptor holds it.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import BinaryIO

import msgspec

from app.ambient import Ambient
from app.config import NAME
from app.content import LENGTH_BYTES, MAX_BYTES, Captured
from app.redaction import redact, redact_json

CUT_CHARACTERS = 512
"""What was cut off may have left the beginning of a secret: so much before the cut goes too."""
PURGE_SECONDS = 3600.0
_NO_TEXT = frozenset({"type", "id", "object", "model", "role", "status"})


def main(arguments: Sequence[str], source: BinaryIO) -> None:
    """Until its input ends."""
    folder, replica, keep_days, *regions = arguments
    ambient, place, days = Ambient(), Path(folder), int(keep_days)
    purged = float("-inf")
    os.umask(0o077)
    while True:
        if ambient.monotonic() - purged > PURGE_SECONDS:
            purge(place, days, datetime.fromtimestamp(ambient.now(), UTC).date())
            purged = ambient.monotonic()
        header = source.read(LENGTH_BYTES)
        if len(header) < LENGTH_BYTES:
            return
        captured = msgspec.msgpack.decode(source.read(int.from_bytes(header, "big")), type=Captured)
        try:
            write(place, replica, captured, regions)
        except OSError as error:
            sys.stderr.write(f"content could not be written: {error}\n")


def write(folder: Path, replica: str, captured: Captured, regions: Sequence[str]) -> None:
    """One line, redacted. Raises OSError."""
    tenant = folder / captured.tenant
    tenant.mkdir(parents=True, exist_ok=True)
    line = msgspec.json.encode(entry(captured, regions)) + b"\n"
    with (tenant / f"{captured.time[:10]}.{replica}.jsonl").open("ab") as file:
        file.write(line)


def entry(captured: Captured, regions: Sequence[str]) -> dict[str, object]:
    """The line of a call: who and when, what was asked and answered without what it should not hold."""
    found: Counter[str] = Counter()
    answer = folded(captured.answer) if captured.stream else captured.answer
    return {
        "event_id": captured.event_id,
        "time": captured.time,
        "request_id": captured.request_id,
        "trace_id": captured.trace_id,
        "tenant_id": captured.tenant,
        "model_alias": captured.alias,
        "model_resolved": captured.model,
        "status": captured.status,
        "request": _clean(captured.request, found, regions),
        "answer": _clean(answer, found, regions),
        "redacted": dict(found),
    }


def _clean(body: bytes | dict[str, str], found: Counter[str], regions: Sequence[str]) -> object:
    if isinstance(body, dict):
        return {path: redact_json(text, found, regions) for path, text in body.items()}
    if len(body) <= MAX_BYTES:
        try:
            return redact_json(msgspec.json.decode(body), found, regions)
        except (msgspec.DecodeError, RecursionError):
            pass
    return redact(_whole(body.decode("utf-8", "replace"), len(body)), found, regions)


def _whole(text: str, size: int) -> str:
    return text if size <= MAX_BYTES else text[:-CUT_CHARACTERS]


def folded(frames: bytes) -> dict[str, str]:
    """A stream's text by where it stood in its events, put together: a secret may lie across many chunks."""
    parts: dict[str, list[str]] = {}
    for line in frames.split(b"\n"):
        if not line.startswith(b"data:"):
            continue
        try:
            event = msgspec.json.decode(line[5:])
        except (msgspec.DecodeError, RecursionError):
            continue
        for path, text in _deltas(event, "", False):
            parts.setdefault(path, []).append(text)
    return {path: _whole("".join(texts), len(frames)) for path, texts in parts.items()}


def _deltas(value: object, path: str, inside: bool) -> Iterator[tuple[str, str]]:
    """The strings below a member called `delta`, or `error`; lists by `index` where their members say one."""
    if isinstance(value, str):
        if inside:
            yield path, value
    elif isinstance(value, dict):
        if "index" in value or "output_index" in value:
            path = f"{path}[{value.get('output_index', '')}{value.get('index', '')}]"
        for name, member in value.items():
            if name not in _NO_TEXT:
                below = f"{path}.{name}" if path else name
                yield from _deltas(member, below, inside or name in ("delta", "error"))
    elif isinstance(value, list):
        for member in value:
            yield from _deltas(member, path, inside)


def purge(folder: Path, keep_days: int, today: date) -> int:
    """Deletes what is older; returns how many files."""
    oldest = (today - timedelta(days=keep_days)).isoformat()
    deleted = 0
    for file in folder.glob("*/*.jsonl"):
        if file.name[:10] < oldest:
            file.unlink(missing_ok=True)
            deleted += 1
    return deleted


def delete(folder: Path, tenant: str) -> int:
    """Deletes all content of a tenant; returns how many files. Raises ValueError for what is no tenant's name."""
    if not NAME.fullmatch(tenant):
        raise ValueError(f"{tenant!r} is no tenant's name")
    files = list((folder / tenant).glob("*.jsonl"))
    shutil.rmtree(folder / tenant, ignore_errors=True)
    if (folder / tenant).exists():
        raise OSError(f"{folder / tenant} could not be deleted")
    return len(files)


if __name__ == "__main__":
    main(sys.argv[1:], sys.stdin.buffer)
