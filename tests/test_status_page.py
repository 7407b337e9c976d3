"""`/status` on the main port: what anyone sees, what the administrator sees, as JSON and as a page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.cli import main
from app.status_page import page, public
from tests.browser import Browser, chromedriver
from tests.journey import Journey, until

HEALTHY: dict[str, Any] = {
    "replica": "replica-1-77", "mode": "normal", "mode_until": None, "draining": False, "redis": "up",
    "postgres": "up", "overload": {"level": 0.0}, "targets": {"openai/gpt-4o-mini": "ok", "azure/gpt": "ok"},
    "spool": {"available": True}, "shipper": {"lag_seconds": 0.2},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "health", "part"),
    [
        ({}, "ok", None),
        ({"draining": True}, "draining", "calls"),
        ({"overload": {"level": 0.3}}, "degraded", "calls"),
        ({"redis": "down"}, "degraded", "limits"),
        ({"postgres": "down"}, "degraded", "ledger"),
        ({"shipper": {"lag_seconds": 61}}, "degraded", "ledger"),
        ({"spool": {"available": False}}, "degraded", "ledger"),
        ({"shipper": None, "postgres": "not configured"}, "ok", None),
        ({"targets": {"openai/gpt-4o-mini": "resting", "azure/gpt": "ok"}}, "degraded", "models"),
        ({"targets": {"openai/gpt-4o-mini": "resting"}}, "degraded", "models"),
    ],
)
def test_health_is_of_all_parts(changed: dict[str, Any], health: str, part: str | None) -> None:
    shown = public(HEALTHY | changed)
    assert shown["health"] == health
    assert [name for name, said in shown["parts"].items() if said != "ok"] == ([part] if part else [])


def test_page_escapes_what_it_shows() -> None:
    text = page(public(HEALTHY), HEALTHY | {"config_fault": "<script>alert(1)</script>"}).decode()
    assert "<script" not in text
    assert "&lt;script" in text


# --- on the stack -----------------------------------------------------------------------------------------------------

SECRET = ("openai", "gpt-4o-mini", "replica-1", "tenant-a", "config_version")


def names(text: str) -> list[str]:
    return [word for word in SECRET if word in text]


@pytest.mark.parametrize("accept", ["*/*", "text/html"])
def test_anyone_sees_mode_and_health_and_no_names(journey: Journey, accept: str) -> None:
    answer = journey.http.get("/status", headers={"accept": accept})
    assert answer.status_code == 200
    assert "normal" in answer.text or "as usual" in answer.text
    assert names(answer.text) == []


@pytest.mark.parametrize("accept", ["*/*", "text/html"])
def test_the_admin_token_shows_targets_errors_version_and_lag(journey: Journey, accept: str) -> None:
    journey.fault("openai", kind="status", status=503, times=1)
    assert journey.post().is_success
    token = {"authorization": f"Bearer {journey.stack.admin_token}", "accept": accept}
    shown = until(lambda: text if "failed" in (text := journey.http.get("/status", headers=token).text) else None)
    for word in ("openai/gpt-4o-mini", "lag_seconds", journey.post().headers["x-gateway-config-version"]):
        assert word in shown


def test_another_token_is_refused(journey: Journey) -> None:
    answer = journey.http.get("/status", headers={"authorization": f"Bearer {journey.key}"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_forbidden")


def test_json_is_what_is_told_without_being_asked_for_html(journey: Journey) -> None:
    shown = journey.http.get("/status").json()
    assert (shown["mode"], shown["mode_until"], set(shown)) == (
        "normal",
        None,
        {"health", "mode", "mode_until", "parts"},
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromedriver(tmp_path_factory.mktemp("chromedriver")) as url:
        browser = Browser(url, width=800, height=700)
        yield browser
        browser.close()


def keep(browser: Browser, name: str) -> None:
    """A picture for who looks at the page, in build/."""
    folder = Path(__file__).parents[1] / "build"
    folder.mkdir(exist_ok=True)
    browser.screenshot(folder / f"{name}.png")


def test_person_sees_an_incident_and_its_end(journey: Journey, browser: Browser) -> None:
    at = ["--redis-url", journey.stack.redis_url]
    browser.open(f"{journey.stack.url}/status")
    assert browser.title.startswith("LLM gateway: ")
    keep(browser, "status")
    assert main(["mode", "cache-only", "--for", "2h", *at]) == 0
    try:
        until(lambda: {journey.http.get("/status").json()["mode"] for _ in range(8)} == {"cache_only"})
        browser.open(f"{journey.stack.url}/status")
        assert "Incident mode: cache-only" in browser.text("[role=status]")
        keep(browser, "status-incident")
    finally:
        assert main(["mode", "normal", *at]) == 0
    assert [said for said in browser.complaints() if "favicon" not in said] == []
    until(lambda: {journey.http.get("/status").json()["mode"] for _ in range(8)} == {"normal"})
