"""Dead letters: lines of the spool that could not become rows, kept beside it until somebody has looked at them.

`SEGMENT.spool.dead-letter` has a line for each: an event as JSON that PostgreSQL refused, or a line of the spool that
was damaged. Replaying tries each again. What becomes a row, or is one already, leaves the file; the rest stays, with a
reason. A line may be mended in an editor: an event as plain JSON, on one line, is taken as it stands there.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from app.archive import Archive
from app.core import LedgerEvent
from app.ledger import read_lines

_ASIDE = ".replaying"
_decode = msgspec.json.Decoder(LedgerEvent).decode


class Letter(Struct, frozen=True):
    """One line of a file. `event` is None where there is none in it that may be tried; `reason` then says why."""

    line: int
    content: bytes
    event: str | None = None
    reason: str = "PostgreSQL refused it as a row"


class Replayed(Struct, frozen=True):
    """One file after its replay: rows that are in the ledger now, new or not, and the lines that stay."""

    file: str
    rows: int
    left: tuple[str, ...]


def files(spool_dir: Path) -> list[Path]:
    """The files with dead letters; also those that a replay which broke off has moved aside, by the name they had."""
    found = spool_dir.glob("*.spool.dead-letter*")
    return sorted({path.with_name(path.name.removesuffix(_ASIDE)) for path in found})


def bury(path: Path, lines: Sequence[bytes]) -> None:
    """Adds lines to a file of dead letters, and waits until they are on the disk."""
    if not lines:
        return
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_ino != _inode(path):
                continue  # a replay took the file away between opening and locking it
            file.writelines(line.rstrip(b"\n") + b"\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
            return


def _inode(path: Path) -> int:
    return path.stat().st_ino if path.exists() else 0


def read_letters(content: bytes) -> Iterator[Letter]:
    """The lines of a file; empty ones count, and are skipped."""
    for number, piece in enumerate(content.split(b"\n"), 1):
        payload = piece
        if not piece.strip():
            continue
        if not piece.startswith(b"{"):
            (line,) = read_lines(piece + b"\n")
            payload = line.payload
            if line.kind != "E":
                yield Letter(number, piece, reason="it is damaged, and no line of the spool any more")
                continue
        try:
            _decode(payload)
            yield Letter(number, piece, payload.decode())
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            yield Letter(number, piece, reason=f"it is no event: {error}")


def read(path: Path) -> list[Letter]:
    """All letters of a file, those that a broken replay has moved aside included."""
    parts = (part for part in (path, _aside(path)) if part.exists())
    return list(read_letters(b"".join(part.read_bytes() for part in parts)))


async def replay(path: Path, archive: Archive) -> Replayed:
    """Tries the lines of a file again; those that are still no row are put back. Raises `ArchiveError` and OSError.

    The file is moved aside meanwhile, so that a shipper that buries more begins a new one. Where the replay breaks off,
    the moved file is replayed the next time.
    """
    aside = _move_aside(path)
    letters = read(aside)
    tried = [letter for letter in letters if letter.event is not None]
    _, unfit = await archive.insert([letter.event for letter in tried])
    refused = {tried[place].line for place in unfit}
    left = [letter for letter in letters if letter.event is None or letter.line in refused]
    _put_back(aside, path, left)
    return Replayed(path.name, len(tried) - len(unfit), tuple(f"line {one.line}: {one.reason}" for one in left))


def _move_aside(path: Path) -> Path:
    aside = _aside(path)
    if not path.exists():
        return aside
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if aside.exists():  # of a replay that broke off
            file.write(aside.read_bytes())
        path.replace(aside)
    return aside


def _aside(path: Path) -> Path:
    return path.with_name(path.name + _ASIDE)


def _put_back(aside: Path, path: Path, left: Sequence[Letter]) -> None:
    bury(path, [letter.content for letter in left])
    aside.unlink()
