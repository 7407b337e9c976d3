"""Loading the configuration whole, and holding the snapshot that is in force."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path

from app.ambient import Ambient
from app.config.build import build
from app.config.callers import check_environments
from app.config.reading import (
    FAULTY,
    PRICE_SECTIONS,
    ConfigError,
    Faults,
    Secrets,
    convert,
    known_environments,
    parse,
    price_table,
    read_files,
)
from app.config.running import (
    Config,
)
from app.config.written import (
    Written,
)


def load(
    folder: Path,
    environment: str,
    overlays: Sequence[Path] = (),
    *,
    environ: Mapping[str, str] = os.environ,
    require_secrets: bool = True,
    day: date | None = None,
) -> Config:
    """The configuration in `folder` for `environment`, with the price table of `day` (today, UTC).

    Raises `ConfigError` with every fault. With `require_secrets` False, references that cannot be resolved pass:
    that is how `gateway check` runs where the secrets are not.
    """
    return _load(folder, environment, overlays, Secrets(environ, require_secrets), day or utc_day(Ambient()))[0]


def utc_day(ambient: Ambient) -> date:
    """Today in UTC."""
    return datetime.fromtimestamp(ambient.now(), UTC).date()


def _load(
    folder: Path, environment: str, overlays: Sequence[Path], secrets: Secrets, day: date
) -> tuple[Config, bytes]:
    """The snapshot, and a digest of everything it came from, secrets included: that tells whether it is a new one."""
    files = read_files(folder, environment, overlays, day)
    faults = Faults()
    merged = parse(files, faults)
    written = convert(merged, Written, "", faults) if not faults.sentences else FAULTY
    if written is FAULTY:
        raise ConfigError(faults.sentences)
    content = hashlib.sha256()
    for name, _, part in files:
        content.update(f"{Path(name).name}:{len(part)}\n".encode() + part)
    content.update(environment.encode())
    price_version = next(Path(name).stem for name, sections, _ in files if sections == PRICE_SECTIONS)
    check_environments(written, known_environments(folder), faults)
    config = build(written, content.hexdigest()[:12], environment, price_version, secrets, faults)
    if faults.sentences:
        raise ConfigError(faults.sentences)
    seen = hashlib.sha256(content.digest())
    for value in secrets.read:
        seen.update(hashlib.sha256(value).digest())
    return config, seen.digest()


class ConfigSource:
    """Holds the snapshot that new calls get. `reload` swaps it whole, or keeps it and raises.

    A price table dated ahead takes effect when its day begins in UTC: that counts as a change.
    """

    def __init__(
        self,
        folder: Path,
        environment: str,
        overlays: Sequence[Path],
        environ: Mapping[str, str],
        ambient: Ambient | None = None,
    ) -> None:
        self._where = (folder, environment, tuple(overlays), environ)
        self._ambient = ambient or Ambient()
        self._secret_files: tuple[Path, ...] = ()
        self._looked = self._look()
        self.current, self._seen = self._load()

    def changed(self) -> bool:
        """True when a file looks other than at the last load: a stat call for each."""
        return self._look() != self._looked

    def reload(self) -> bool:
        """Reads the files again: True when a new snapshot took effect, False when the content is the same.

        Raises `ConfigError`; the old snapshot then keeps serving. May run in a thread: the swap is one assignment.
        """
        self._looked = self._look()
        config, seen = self._load()
        if seen == self._seen:
            return False
        self.current, self._seen = config, seen
        return True

    def _load(self) -> tuple[Config, bytes]:
        folder, environment, overlays, environ = self._where
        secrets = Secrets(environ, True)
        try:
            return _load(folder, environment, overlays, secrets, utc_day(self._ambient))
        finally:
            if secrets.files:  # other files than before make the next `changed` true: once more, and nothing is missed
                self._secret_files = tuple(secrets.files)

    def _look(self) -> tuple[object, ...]:
        folder, _, overlays, _ = self._where
        seen: list[object] = [price_table(folder, utc_day(self._ambient))]
        for file in sorted([*folder.glob("*.yaml"), *folder.glob("*/*.yaml"), *overlays, *self._secret_files]):
            try:
                stat = file.stat()
            except OSError:
                continue
            seen.append((str(file), stat.st_ino, stat.st_size, stat.st_mtime_ns))
        return tuple(seen)
