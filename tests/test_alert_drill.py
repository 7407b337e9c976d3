"""The fallback drill's alert, by a real Prometheus that scrapes real replicas. `make drills`."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import yaml

from loadtest.processes import ROOT, free_port
from loadtest.services import write_private
from tests.journey import Journey, until
from tests.traffic import Traffic

pytestmark = [
    pytest.mark.drill,
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is missing: apt install prometheus"),
]
ALERT = "GatewayFallsBack"


@pytest.fixture
def alerts(journey: Journey, tmp_path: Path) -> Iterator[str]:
    """The address of a Prometheus with the shipped rules, twenty times as fast: each of their minutes is 3 s."""
    rules = (ROOT / "config" / "observability" / "alerts.yml").read_text()
    fast = re.sub(r"\b(\d+)m\b", lambda found: f"{int(found[1]) * 3}s", rules)
    assert "[15s]" in fast
    assert "for: 15s" in fast
    (tmp_path / "alerts.yml").write_text(fast)
    write_private(tmp_path / "token", journey.stack.admin_token)
    targets = [urlsplit(replica.admin_url).netloc for replica in journey.stack.replicas]
    scraped = {
        "job_name": "gateway",
        "authorization": {"credentials_file": str(tmp_path / "token")},
        "static_configs": [{"targets": targets}],
    }
    configuration = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(tmp_path / "alerts.yml")],
        "scrape_configs": [scraped],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    port = free_port()
    with (tmp_path / "log").open("wb") as log:
        running = subprocess.Popen(
            [
                "prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log, stderr=log,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: answers(url), 30)
        yield url
    finally:
        running.terminate()
        running.wait(60)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready", timeout=60).status_code == 200
    except httpx.TransportError:
        return False


def state(url: str) -> str:
    """Of the alert: `inactive`, `pending` or `firing`."""
    found = httpx.get(f"{url}/api/v1/alerts", timeout=60).raise_for_status().json()["data"]["alerts"]
    return next((alert["state"] for alert in found if alert["labels"]["alertname"] == ALERT), "inactive")


def scraped(url: str) -> float:
    """Calls that Prometheus knows of."""
    asked = {"query": "sum(gateway_requests_total)"}
    found = httpx.get(f"{url}/api/v1/query", params=asked, timeout=60).raise_for_status().json()["data"]["result"]
    return float(found[0]["value"][1]) if found else 0.0


@pytest.mark.parametrize("fault", [{"kind": "status", "status": 503}, {"kind": "reset"}], ids=["failing", "refusing"])
def test_alert_of_a_blocked_primary_fires_and_clears(journey: Journey, alerts: str, fault: dict[str, object]) -> None:
    with Traffic(journey, clients=4) as traffic:
        before = until(lambda: scraped(alerts), 30)
        until(lambda: scraped(alerts) > before + 50, 60)
        assert state(alerts) == "inactive"
        journey.fault("openai", **fault)
        until(lambda: state(alerts) == "firing", 90)
        journey.fault("openai", kind="latency", latency_ms=1)
        until(lambda: state(alerts) == "inactive", 90)
    assert traffic.outcomes() == {"whole"}
