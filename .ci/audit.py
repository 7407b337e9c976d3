"""What the project checks of itself beside its tests: `make audit`, or one of `secrets`, `vulnerabilities`, `sbom`.

secrets: no file of the repository holds one (detect-secrets, and the shape of our own keys).
vulnerabilities: no locked package has a known one (pip-audit). Where the advisories cannot be reached, a sentence.
sbom: the bill of materials of what `gateway serve` needs, CycloneDX JSON, in build/sbom.json.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from detect_secrets import SecretsCollection
from detect_secrets.settings import transient_settings

ROOT = Path(__file__).parents[1]
OUR_KEY = re.compile(r"sk-gw-[a-z0-9]{12}-[A-Za-z0-9_-]{43}")
GUESSERS = {"KeywordDetector", "Base64HighEntropyString", "HexHighEntropyString", "IPPublicDetector"}
"""They ask whether a word looks odd or stands beside `key`: references and digests do; vendors' secrets have shapes."""
PLACEHOLDERS = ["password", "hush", "secret", "s3cret"]
"""What stands for a password in the URLs of documentation and tests."""
LOOKUP_SECONDS = 180
LOCKS = ("requirements.lock", "requirements-dev.lock")


def secrets(folder: Path) -> Iterator[str]:
    """A sentence for each secret in the files that git has or would take."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=folder, capture_output=True, check=True,
    )  # fmt: skip
    files = [folder / name for name in listed.stdout.decode().split("\0") if name and not name.endswith(".lock")]
    found = SecretsCollection(root=str(folder))
    with transient_settings(_settings()):
        for file in files:
            if file.is_file():
                found.scan_file(str(file.relative_to(folder)))
    for name, secret in found:
        yield f"{name}:{secret.line_number}: {secret.type}"
    for file in files:
        text = file.read_text(errors="replace") if file.is_file() else ""
        if OUR_KEY.search(text):
            yield f"{file.relative_to(folder)}: a gateway key"


def _settings() -> dict[str, object]:
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

    names = {plugin.__name__ for plugin in get_mapping_from_secret_type_to_class().values()}
    return {
        "plugins_used": [{"name": name} for name in sorted(names - GUESSERS)],
        "filters_used": [
            {"path": "detect_secrets.filters.heuristic.is_templated_secret"},
            {"path": "detect_secrets.filters.allowlist.is_line_allowlisted"},
            {"path": "detect_secrets.filters.regex.should_exclude_secret", "pattern": PLACEHOLDERS},
        ],
    }


def vulnerabilities(lock: Path) -> Iterator[str]:
    """A sentence for each known vulnerability of a locked package. Says so where nothing could be looked up."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(lock), "--no-deps", "--disable-pip"]
    command += ["--format", "json", "--progress-spinner", "off", "--timeout", "10"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=LOOKUP_SECONDS, check=False)
        packages = json.loads(ran.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        print(f"{lock.name}: not checked for vulnerabilities: the advisories cannot be reached from here.")
        return
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if skipped:
        print(f"{lock.name}: {len(skipped)} of {len(packages)} packages not checked: no advisories for them from here.")
    for package in packages:
        for known in package.get("vulns", []):
            fixed = ", ".join(known["fix_versions"]) or "no version yet"
            yield f"{lock.name}: {package['name']} {package['version']}: {known['id']}, fixed in {fixed}"


def sbom() -> None:
    """Writes the bill of materials; the same lock gives the same file."""
    (ROOT / "build").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", str(ROOT / "requirements.lock")]
    command += ["--pyproject", str(ROOT / "pyproject.toml"), "--mc-type", "application", "--output-reproducible"]
    # Its one warning: a lock says what is installed, not which package asked for which.
    subprocess.run(
        [sys.executable, "-W", "ignore", *command[1:], "--output-file", str(ROOT / "build" / "sbom.json")], check=True
    )
    print("build/sbom.json is the bill of materials of what `gateway serve` needs.")


def main(asked: list[str]) -> int:
    """1 where something was found; each finding is a line on standard error."""
    every = ["secrets", "vulnerabilities", "sbom"]
    faults: list[str] = []
    if "secrets" in (asked or every):
        faults += secrets(Path(asked[1]) if len(asked) > 1 else ROOT)
    if "vulnerabilities" in (asked or every):
        faults += [fault for lock in LOCKS for fault in vulnerabilities(ROOT / lock)]
    if "sbom" in (asked or every):
        sbom()
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
