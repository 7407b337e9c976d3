"""A real Prometheus on the shipped configuration: it scrapes the stack, judges by the rules, answers every panel."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from loadtest.processes import free_port
from tests.journey import Journey, chat, events, until
from tests.test_alerts import ALERTS, DASHBOARDS, FOLDER, RULES, panels, plain

pytestmark = [
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is missing: apt install prometheus"),
    pytest.mark.timeout(600),
]
SECONDS = 2
"""Between scrapes, and between looks at the rules."""
UNTIL_SECONDS = 120.0


class Prometheus:
    """The shipped configuration, but for addresses, the token's file and hurry: alerts fire at once."""

    def __init__(self, folder: Path, scraped: dict[str, list[str]], admin_token: str) -> None:
        (folder / "admin_token").write_text(admin_token)
        rules = yaml.safe_load((FOLDER / "alerts.yml").read_text())
        for rule in [rule for group in rules["groups"] for rule in group["rules"]]:
            rule.pop("for", None)
        (folder / "alerts.yml").write_text(yaml.safe_dump(rules))
        shipped = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        shipped["global"] = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), f"{SECONDS}s")
        shipped["rule_files"] = [str(folder / Path(file).name) for file in shipped["rule_files"]]
        for job in shipped["scrape_configs"]:
            job["static_configs"] = [{"targets": scraped[job["job_name"]]}]
            if "authorization" in job:
                job["authorization"]["credentials_file"] = str(folder / "admin_token")
        (folder / "prometheus.yml").write_text(yaml.safe_dump(shipped))
        address = f"127.0.0.1:{free_port()}"
        self._http = httpx.Client(base_url=f"http://{address}/api/v1", timeout=30)
        self.log = folder / "prometheus.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={address}",
                ],
                stdout=log,
                stderr=log,
            )

    def get(self, path: str, **params: str) -> Any:
        answer = self._http.get(path, params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def answers(self) -> bool:
        assert self._process.poll() is None, self.log.read_text()
        try:
            return self._http.get("/status/runtimeinfo").status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, expr: str) -> list[Any]:
        return self.get("/query", query=expr)["result"]

    def scrapes(self) -> float:
        """How many there have been of each target, of the one with the fewest."""
        return min(float(one["value"][1]) for one in self.ask("count_over_time(up[1h])"))

    def firing(self, alert: str) -> list[dict[str, str]]:
        """The labels of each that fires."""
        found = self.get("/alerts")["alerts"]
        return [one["labels"] for one in found if one["labels"]["alertname"] == alert and one["state"] == "firing"]

    def close(self) -> None:
        self._http.close()
        self._process.terminate()
        self._process.wait(60)


@pytest.fixture(scope="module")
def prometheus(stack: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It scrapes the suite's stack, with a process for the jobs beside it."""
    folder = tmp_path_factory.mktemp("prometheus")
    port = free_port()
    with Journey(stack) as journey:  # a day to be summed, for the figures of spend
        journey.row(journey.post(chat("tokens=2")).headers["x-request-id"])
    environ = os.environ | {"GATEWAY_ADMIN_TOKEN": stack.admin_token, "DATABASE_URL": stack.postgres_url}
    with (folder / "jobs.log").open("wb") as log:
        jobs = subprocess.Popen([sys.executable, "-m", "app.cli", "jobs", "--port", str(port)], env=environ, stdout=log)
    made = Prometheus(
        folder,
        {
            "gateway": [httpx.URL(replica.admin_url).netloc.decode() for replica in stack.replicas],
            "gateway-jobs": [f"127.0.0.1:{port}"],
            "traefik": [httpx.URL(stack.traefik_metrics_url).netloc.decode()],
        },
        stack.admin_token,
    )
    try:
        until(made.answers, UNTIL_SECONDS)
        yield made
    finally:
        made.close()
        jobs.terminate()
        jobs.wait(60)


def variables(dashboard: str) -> str:
    """What a variable stands for where nobody has chosen: all that it may be."""
    return next((each["allValue"] for each in DASHBOARDS[dashboard]["templating"]["list"] if "allValue" in each), "")


def traffic(journey: Journey) -> None:
    """Of every kind that a panel shows."""
    journey.clear()
    journey.fault("openai", kind="status", status=500, times=2)
    for _ in range(2):
        journey.post(chat("tokens=2"))
    with journey.stream(chat("tokens=8 chunk_ms=5")) as answer:
        events(answer)
    for _ in range(2):
        journey.post(chat("Seen by Prometheus? tokens=2", "remembered"))
    journey.post(chat("Is a question looked for in other words? tokens=2", "meant-plainly"))
    for _ in range(7):
        journey.post(chat("tokens=2"), x_tenant_id="tenant-few-prometheus")
    journey.post(chat("tokens=2"), authorization="Bearer sk-gw-nobody")
    journey.fault("openai", kind="status", status=429, times=1)
    journey.post(chat("tokens=2"))


QUIET = {
    "Drift from invoices": "no invoice was compared",
    "Refusals of our credential or model": "none is refused here",
    "Downgrades": "no tenant's budget is nearly used up here",
    "Wrong answers from before": "no answer to a question in other words is judged here",
    "Learning": "no alias here learns (mode verified)",
}
"""Panels that show nothing of this traffic, and why."""


def has_data(found: list[Any]) -> bool:
    return any(math.isfinite(float(one["value"][1])) for one in found)


def test_every_target_is_up_every_rule_is_judged_and_every_panel_has_data(
    prometheus: Prometheus, journey: Journey
) -> None:
    def all_up() -> bool:
        targets = prometheus.get("/targets")["activeTargets"]
        up = sorted(target["labels"]["job"] for target in targets if target["health"] == "up")
        return up == ["gateway", "gateway", "gateway-jobs", "traefik"]

    until(all_up, UNTIL_SECONDS)
    asked = [
        (dashboard, panel["title"], re.sub(r"\$\w+", variables(dashboard), plain(target["expr"])))
        for dashboard in DASHBOARDS
        for panel in panels(DASHBOARDS[dashboard])
        for target in panel.get("targets", [])
        if panel["title"] not in QUIET
    ]
    deadline = time.monotonic() + UNTIL_SECONDS
    while lacking := [one for one in asked if not has_data(prometheus.ask(one[2]))]:
        assert time.monotonic() < deadline, lacking
        before = prometheus.scrapes()
        traffic(journey)
        until(lambda before=before: prometheus.scrapes() > before, UNTIL_SECONDS)
    judged = {rule["name"]: rule for group in prometheus.get("/rules")["groups"] for rule in group["rules"]}
    assert set(judged) == {*ALERTS, *(rule["record"] for rule in RULES if "record" in rule)}
    assert [(name, rule["lastError"]) for name, rule in judged.items() if rule["health"] != "ok"] == []


@pytest.mark.drill
def test_replica_that_is_down_is_an_alert_until_it_is_back(prometheus: Prometheus, whole: Journey) -> None:
    gone = whole.stack.replicas[1]
    instance = httpx.URL(gone.admin_url).netloc.decode()

    def fires() -> bool:
        return any(labels.get("instance") == instance for labels in prometheus.firing("GatewayDown"))

    until(lambda: not fires(), UNTIL_SECONDS)
    whole.stack.stop(gone.name)
    try:
        until(fires, UNTIL_SECONDS)
    finally:
        whole.stack.start(gone.name)
    until(lambda: not fires(), UNTIL_SECONDS)
