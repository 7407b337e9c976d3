"""Chromium, driven over WebDriver (w3.org/TR/webdriver2) by HTTP requests to chromedriver."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtest.processes import free_port

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The name under which WebDriver hands out elements."""


class Browser:
    """One session. Certificates are not checked: the stack's are its own."""

    def __init__(self, driver_url: str, *, dark: bool = False, width: int = 1200, height: int = 1400) -> None:
        arguments = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            f"--window-size={width},{height}", *(["--force-dark-mode"] if dark else []),
        ]  # fmt: skip
        wanted = {
            "browserName": "chrome",
            "acceptInsecureCerts": True,
            "goog:chromeOptions": {"args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        self._http = httpx.Client(base_url=driver_url, timeout=60)
        session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._path = f"/session/{session['sessionId']}"

    def close(self) -> None:
        self._ask("DELETE", self._path)
        self._http.close()

    def open(self, url: str) -> None:
        self._ask("POST", f"{self._path}/url", {"url": url})

    @property
    def url(self) -> str:
        return self._ask("GET", f"{self._path}/url")

    @property
    def title(self) -> str:
        return self._ask("GET", f"{self._path}/title")

    def text(self, selector: str = "body") -> str:
        return self._ask("GET", f"{self._path}/element/{self._find(selector)}/text")

    def type(self, selector: str, text: str) -> None:
        self._ask("POST", f"{self._path}/element/{self._find(selector)}/value", {"text": text})

    def click(self, selector: str) -> None:
        self._ask("POST", f"{self._path}/element/{self._find(selector)}/click", {})

    def press(self, *keys: str) -> None:
        """Presses keys one after the other, wherever the focus is; WebDriver's codes, such as Tab's \ue004."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        keyboard = {"type": "key", "id": "keyboard", "actions": actions}
        self._ask("POST", f"{self._path}/actions", {"actions": [keyboard]})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns, run by the driver: the page's own policy does not apply to it."""
        return self._ask("POST", f"{self._path}/execute/sync", {"script": script, "args": list(arguments)})

    def complaints(self) -> list[str]:
        """What the browser's console has: scripts and styles that the policy blocked, resources that were missing."""
        return [entry["message"] for entry in self._ask("POST", f"{self._path}/se/log", {"type": "browser"})]

    def accessibility(self) -> list[dict[str, Any]]:
        """The tree that screen readers get, as Chromium computes it."""
        command = {"cmd": "Accessibility.getFullAXTree", "params": {}}
        return self._ask("POST", f"{self._path}/goog/cdp/execute", command)["nodes"]

    def emulate(self, **media: str) -> None:
        """CSS media features, such as prefers_color_scheme="dark"."""
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        command = {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}}
        self._ask("POST", f"{self._path}/goog/cdp/execute", command)

    def screenshot(self, file: Path) -> None:
        """The whole page."""
        command = {"cmd": "Page.captureScreenshot", "params": {"captureBeyondViewport": True}}
        file.write_bytes(base64.b64decode(self._ask("POST", f"{self._path}/goog/cdp/execute", command)["data"]))

    def _find(self, selector: str) -> str:
        return self._ask("POST", f"{self._path}/element", {"using": "css selector", "value": selector})[_ELEMENT]

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = self._http.request(method, path, json=body)
        assert answer.is_success, answer.text
        return answer.json()["value"]


@contextmanager
def chromedriver(folder: Path) -> Iterator[str]:
    """The URL of a running driver. Skips where Chromium is not installed, except in CI."""
    program = shutil.which("chromedriver")
    if program is None or shutil.which("chromium") is None:
        assert not os.environ.get("CI"), "CI needs chromium and chromedriver"
        pytest.skip("Chromium is not installed: `apt-get install chromium chromium-driver`")
    port = free_port()
    with (folder / "chromedriver.log").open("wb") as log:
        process = subprocess.Popen([program, f"--port={port}"], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"{url}/status", timeout=60).raise_for_status()
                break
            except httpx.HTTPError:
                assert time.monotonic() < deadline, "chromedriver does not answer"
                time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(60)
