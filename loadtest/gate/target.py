"""The gateway that is held against the gates, and what of its surroundings can be reached."""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from typing import Any

import httpx
from msgspec import Struct


class NotRun(Exception):
    """Why a gate could not be run, in a sentence that says what it needs. It counts as missed."""


class Target(Struct, frozen=True):
    """`url` is without /v1. `ca_file` is what its certificate is verified with, the machine's CAs where None."""

    url: str
    key: str
    tenant: str
    ca_file: Path | None = None
    simulator_url: str | None = None
    """The vendors, where they are simulated: only those can be told to fail."""
    database_url: str | None = None
    """The ledger's PostgreSQL."""
    admin_urls: tuple[str, ...] = ()
    """The admin ports of all replicas; `admin_token` opens them."""
    admin_token: str | None = None

    def client(self) -> httpx.Client:
        verify = ssl.create_default_context(cafile=str(self.ca_file)) if self.ca_file else True
        headers = {"authorization": f"Bearer {self.key}", "x-tenant-id": self.tenant}
        return httpx.Client(base_url=self.url, headers=headers, verify=verify, timeout=60)

    def counted(self, metric: str, **labels: str) -> float | None:
        """A counter's sum over labels and replicas; None where no admin port is known."""
        if not self.admin_urls:
            return None
        total = 0.0
        for url in self.admin_urls:
            headers = {"authorization": f"Bearer {self.admin_token}"}
            text = httpx.get(f"{url}/metrics", headers=headers, timeout=10).raise_for_status().text
            for written, value in re.findall(rf"^{metric}_total{{(.*)}} (\S+)$", text, re.MULTILINE):
                if all(f'{label}="{wanted}' in written for label, wanted in labels.items()):
                    total += float(value)
        return total

    def simulator(self, method: str, path: str, document: Any = None) -> Any:
        """An admin call of the simulator, under /_sim/. Raises `NotRun` where no simulator is known."""
        if self.simulator_url is None:
            raise NotRun("needs vendors that can be told to fail: --simulator-url.")
        answer = httpx.request(method, f"{self.simulator_url}/_sim/{path}", json=document, timeout=10)
        answer.raise_for_status()
        return answer.json()
