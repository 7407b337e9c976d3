"""Alerts and dashboards: every alert fires and clears, leads to a page, and is on a metric that a live scrape has."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from app.ambient import Ambient
from app.jobs import JobsOptions, JobsProcess
from app.telemetry import Lines
from tests.journey import Journey, chat, until

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "config" / "observability"
SOURCE = FOLDER / "alerts.yml"
KUBERNETES = ROOT / "traefik" / "kubernetes" / "alerts.yaml"
GROUPS = yaml.safe_load(SOURCE.read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
OBSERVABILITY = (ROOT / "runbooks" / "observability.md").read_text()
DASHBOARDS = {file.stem: json.loads(file.read_text()) for file in sorted((FOLDER / "dashboards").glob("*.json"))}
promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is missing: apt install prometheus")


# --- what each alert is on: what fires it, what clears it -------------------------------------------------------------

CALLS = 'gateway_requests_total{instance="a",status="success"}'
FAILED = 'gateway_requests_total{instance="a",status="error"}'
INFLIGHT = 'gateway_inflight{instance="a"}'


def gauge(name: str, firing: float, cleared: float) -> dict[str, str]:
    return {name: f"{firing}x60 {cleared}x60"}


def share(part: str, whole: str, each: int, of: int) -> dict[str, str]:
    """For an hour, `each` of `of` in a minute are of that part; then none are."""
    return {part: f"0+{each}x60 {each * 60}+0x60", whole: f"0+{of - each}x60 {(of - each) * 60}+{of}x60"}


def slow(name: str, fast: str, slow: str) -> dict[str, str]:
    """A histogram whose values lie between two bounds for an hour, then below both."""
    return {
        f'{name}_bucket{{instance="a",le="{fast}"}}': "0x60 0+60x60",
        f'{name}_bucket{{instance="a",le="{slow}"}}': "0+60x60 3600+60x60",
        f'{name}_bucket{{instance="a",le="+Inf"}}': "0+60x60 3600+60x60",
    }


def attempts(outcome: str, each: int) -> dict[str, str]:
    labels = 'instance="a",provider="openai",target="openai/gpt-4o-mini"'
    name = "gateway_attempts_total"
    return share(f'{name}{{{labels},outcome="{outcome}"}}', f'{name}{{{labels},outcome="success"}}', each, 100)


CASES: dict[str, dict[str, str]] = {
    "GatewayErrorBudgetBurnsFast": share(FAILED, CALLS, 2, 100),
    "GatewayErrorBudgetBurns": {FAILED: "0+5x72 360+0x24", CALLS: "0+495x96"},
    "GatewayErrorBudgetBurnsSlowly": {FAILED: "0+15x288 4320+0x40", CALLS: "0+7485x328"},
    "GatewayDown": gauge('up{job="gateway",instance="a"}', 0, 1) | {INFLIGHT: "1x120"},
    "GatewayLatencyHigh": slow("gateway_request_seconds", "3", "5"),
    "GatewayEventLoopSlow": slow("gateway_event_loop_delay_seconds", "0.1", "0.25"),
    "GatewaySheds": {'gateway_shed_calls{instance="a",priority="low"}': "0+6x60 360+0x60"},
    "GatewayRefusesByLimit": share('gateway_requests_total{instance="a",status="rate_limited"}', CALLS, 6, 100),
    "GatewayFallsBack": share('gateway_fallback_total{from="x",to="y",reason="failed"}', CALLS, 12, 100),
    "GatewayVendorFails": attempts("failed", 2),
    "GatewayVendorThrottles": attempts("throttled", 6),
    "GatewayCacheHitsLow": {
        'gateway_cache_results_total{result="miss"}': "0+99x120 11880+0x60",
        'gateway_cache_results_total{result="exact"}': "0+1x120 120+50x60",
    },
    "GatewayVendorKeyDead": {
        'gateway_target_misconfigured_total{instance="a",target="openai/x",rests="key:openai:main"}': "0+2x60 120+0x60"
    },
    "GatewayReloadRefused": gauge('gateway_config_refused{instance="a"}', 1, 0),
    "GatewayReplicasDisagree": {
        'gateway_config_info{instance="a",version="1"}': "1x120",
        'gateway_config_info{instance="b",version="2"}': "1x60 stale",
    },
    "GatewayCertificateExpires": gauge('traefik_tls_certs_not_after{cn="gateway"}', 864_000, 8_640_000),
    "GatewayRedisDown": gauge('gateway_dependency_up{instance="a",name="redis"}', 0, 1),
    "GatewayPostgresDown": gauge('gateway_dependency_up{instance="a",name="postgres"}', 0, 1),
    "GatewayLedgerLags": gauge('gateway_ledger_lag_seconds{instance="a"}', 61, 1),
    "GatewaySpoolGrows": gauge('gateway_spool_bytes{instance="a"}', 2e9, 1e3),
    "GatewaySpoolFull": gauge('gateway_spool_available{instance="a"}', 0, 1),
    "GatewayRowsUnreadable": {'gateway_ledger_dead_letters{instance="a"}': "0x50 1x130"},
    "GatewayJobMissed": gauge('gateway_job_missed{name="rollup"}', 1, 0),
    "GatewayJobsAway": {'gateway_job_missed{name="rollup"}': "_x61 0x60"},
    "GatewaySpendLeaps": gauge('gateway_tenant_spend_today_usd{tenant="a"}', 13, 11)
    | {'gateway_tenant_spend_average_usd{tenant="a"}': "10x120"},
    "GatewayLedgerDrifts": gauge('gateway_reconcile_drift_ratio{vendor="openai"}', 0.06, 0.01),
    "GatewayPricesOld": gauge('gateway_price_age_days{instance="a"}', 8, 1),
    "GatewayCallsUnpriced": {'gateway_unpriced_total{instance="a",provider="openai"}': "0x55 3x125"},
}
"""Series by minute: on for an hour, off for the next, where nothing else says so."""
FIRES_AT = {"GatewayErrorBudgetBurns": 355, "GatewayErrorBudgetBurnsSlowly": 4305}
CLEARS_AT = {"GatewayErrorBudgetBurns": 395, "GatewayErrorBudgetBurnsSlowly": 4710, "GatewayCallsUnpriced": 119}
CLEARS_AT |= {"GatewayRowsUnreadable": 119, "GatewayCacheHitsLow": 175}
STEPS = {"GatewayErrorBudgetBurns": "5m", "GatewayErrorBudgetBurnsSlowly": "15m"}
"""Series of hours and days by longer steps than a minute."""


def evaluated(alert: str, minute: int, fires: bool) -> dict[str, Any]:
    """promtool compares labels and annotations in full; a rule's own count of what fires is all that is asked."""
    count = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})'
    found = [{"labels": "{}", "value": 1}] if fires else []
    return {"expr": count, "eval_time": f"{minute}m", "exp_samples": found}


@promtool
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group["name"])
def test_every_alert_fires_and_clears(group: dict[str, Any], tmp_path: Path) -> None:
    """A group at a time, or promtool evaluates every rule in every minute of every case."""
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [group]}))
    for alert in {rule["alert"] for rule in group["rules"] if "alert" in rule}:
        test = {
            "name": alert,
            "interval": STEPS.get(alert, "1m"),
            "input_series": [{"series": name, "values": values} for name, values in CASES[alert].items()],
            "promql_expr_test": [
                evaluated(alert, FIRES_AT.get(alert, 59), True),
                evaluated(alert, CLEARS_AT.get(alert, 115), False),
            ],
        }
        written = {"rule_files": ["rules.yml"], "evaluation_interval": STEPS.get(alert, "1m"), "tests": [test]}
        (tmp_path / f"{alert}.yml").write_text(yaml.safe_dump(written))
    ran = subprocess.run(["promtool", "test", "rules", *tmp_path.glob("Gateway*.yml")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_alert_has_a_case() -> None:
    assert set(CASES) == set(ALERTS)


@promtool
def test_case_that_never_fires_would_be_found(tmp_path: Path) -> None:
    test = {
        "interval": "1m",
        "input_series": [{"series": 'gateway_dependency_up{name="redis"}', "values": "1x120"}],
        "promql_expr_test": [evaluated("GatewayRedisDown", 59, True)],
    }
    (tmp_path / "tests.yml").write_text(yaml.safe_dump({"rule_files": [str(SOURCE)], "tests": [test]}))
    assert subprocess.run(["promtool", "test", "rules", tmp_path / "tests.yml"], capture_output=True).returncode != 0


# --- what it leads to -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_leads_to_a_page_that_says_what_to_do_and_says_how_urgent_it_is(alert: str) -> None:
    """Not to a page of reference: tests/test_runbooks.py holds these to their form, and runs them."""
    rule = ALERTS[alert]
    page = (ROOT / rule["annotations"]["runbook_url"]).read_text()
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == ["Symptom", "Check", "Act", "Verify", "Undo", "Escalate"]
    assert rule["annotations"]["summary"]
    assert rule["labels"]["severity"] in ("page", "ticket")


def test_page_on_observability_has_every_alert() -> None:
    listed = re.findall(r"^\| `(Gateway\w+)` \| .* \| .*\]\(([\w-]+\.md)\)", OBSERVABILITY, re.MULTILINE)
    assert dict(listed) == {
        alert: rule["annotations"]["runbook_url"].removeprefix("runbooks/") for alert, rule in ALERTS.items()
    }


def test_kubernetes_has_the_same_rules() -> None:
    if os.environ.get("RECORD"):
        resource = {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": {"name": "gateway", "labels": {"app.kubernetes.io/name": "llm-gateway"}},
            "spec": {"groups": GROUPS},
        }
        head = "# Written by `RECORD=1 pytest tests/test_alerts.py` from config/observability/alerts.yml.\n"
        KUBERNETES.write_text(head + yaml.safe_dump(resource, sort_keys=False, width=200))
    assert yaml.safe_load(KUBERNETES.read_text())["spec"]["groups"] == GROUPS


# --- the dashboards ---------------------------------------------------------------------------------------------------


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", [])


def queries(dashboard: dict[str, Any]) -> list[str]:
    asked = [target["expr"] for panel in panels(dashboard) for target in panel.get("targets", [])]
    return asked + [each["query"]["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"]


def plain(query: str) -> str:
    """With Grafana's variables filled in."""
    inside = re.sub(r"^label_values\((.*), *\w+\)$", r"\1", query)
    return inside.replace("$__rate_interval", "5m").replace("$__range", "1d").replace("$__interval", "1m")


def test_dashboards_are_the_five() -> None:
    assert set(DASHBOARDS) == {"overview", "tenant", "provider", "capacity", "ledger"}


@pytest.mark.parametrize("name", DASHBOARDS)
def test_dashboard_can_be_provisioned(name: str) -> None:
    dashboard = DASHBOARDS[name]
    assert dashboard["uid"] == f"gateway-{name}"
    assert dashboard.get("id") is None
    ids = [panel["id"] for panel in panels(dashboard)]
    assert len(ids) == len(set(ids))
    for panel in panels(dashboard):
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["title"]
            assert panel["description"]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_links_lead_to_dashboards_that_are_there(name: str) -> None:
    linked = re.findall(r"/d/gateway-(\w+)", json.dumps(DASHBOARDS[name]))
    assert set(linked) <= set(DASHBOARDS)
    assert set(DASHBOARDS) - {name} <= set(linked)


@promtool
def test_every_query_of_a_dashboard_is_one(tmp_path: Path) -> None:
    rules = [
        {"record": f"asked:{name}:{place}", "expr": plain(query)}
        for name, dashboard in DASHBOARDS.items()
        for place, query in enumerate(queries(dashboard))
    ]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": rules}]}))
    ran = subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_overview_has_the_six_panels_of_the_guide_and_what_a_call_costs() -> None:
    titles = " | ".join(panel["title"] for panel in panels(DASHBOARDS["overview"]))
    for wanted in (
        "Spend today by tenant",
        "p95 of whole calls",
        "429 rate",
        "Cache hit rate",
        "Fallback rate",
        "Error rate by provider",
        "$ per 1,000 requests",
        "429 rate by tenant",
    ):
        assert wanted in titles


# --- compose's profile ------------------------------------------------------------------------------------------------

COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
PROMETHEUS = yaml.safe_load((FOLDER / "prometheus.yml").read_text())


def mounts(service: str) -> dict[str, str]:
    """Where a service sees the folder's files."""
    parts = [volume.split(":") for volume in SERVICES[service]["volumes"] if volume.startswith("./")]
    return {inside: outside for outside, inside, *_ in parts}


def test_profile_mounts_what_is_there() -> None:
    for service in ("prometheus", "grafana", "collector"):
        assert SERVICES[service]["profiles"] == ["observability"]
        assert all((ROOT / outside).exists() for outside in mounts(service).values())


def test_prometheus_reads_the_rules_and_scrapes_what_runs() -> None:
    assert set(PROMETHEUS["rule_files"]) <= set(mounts("prometheus"))
    scraped = {job["job_name"]: job["static_configs"][0]["targets"] for job in PROMETHEUS["scrape_configs"]}
    assert {target.partition(":")[0] for targets in scraped.values() for target in targets} <= set(SERVICES)
    replicas = SERVICES["traefik"]["environment"]["GATEWAY_REPLICAS"].replace("http://", "").replace(":8080", ":9090")
    assert scraped["gateway"] == replicas.split(",")
    for job in PROMETHEUS["scrape_configs"]:
        named = job.get("authorization", {}).get("credentials_file", "/run/secrets/").rpartition("/")[2]
        assert not named or named in SERVICES["prometheus"]["secrets"]


def test_grafana_finds_the_dashboards_and_their_source() -> None:
    seen = mounts("grafana")
    (provider,) = yaml.safe_load((FOLDER / "grafana" / "dashboards" / "gateway.yml").read_text())["providers"]
    assert Path(seen[provider["options"]["path"]]).name == "dashboards"
    (source,) = yaml.safe_load((FOLDER / "grafana" / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["type"] == "prometheus"
    assert httpx.URL(source["url"]).host in SERVICES
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (FOLDER / "dashboards" / Path(home).name).is_file()


@promtool
def test_prometheus_of_compose_has_a_valid_configuration() -> None:
    command = ["promtool", "check", "config", "--syntax-only", FOLDER / "prometheus.yml"]
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_collector_passes_on_what_it_takes() -> None:
    collector = yaml.safe_load((FOLDER / "collector.yml").read_text())
    for pipeline in collector["service"]["pipelines"].values():
        for kind, names in pipeline.items():
            assert set(names) <= set(collector[kind])


def test_collector_scrapes_what_prometheus_scrapes() -> None:
    def scraped(configs: list[dict[str, Any]]) -> list[tuple[str, Any, Any]]:
        return [(one["job_name"], one.get("authorization"), one["static_configs"]) for one in configs]

    prometheus = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    collector = yaml.safe_load((FOLDER / "collector.yml").read_text())
    scrapes = collector["receivers"]["prometheus"]["config"]["scrape_configs"]
    assert scraped(scrapes) == scraped(prometheus["scrape_configs"])


def test_replicas_are_told_where_the_collector_is_only_when_asked() -> None:
    for replica in ("gateway-1", "gateway-2"):
        told = SERVICES[replica]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"]
        assert told == "${OTEL_EXPORTER_OTLP_ENDPOINT:-}"


# --- that what they are on is there -----------------------------------------------------------------------------------


def named(text: str) -> set[str]:
    return set(re.findall(r"\b(?:gateway|traefik|process)_\w+", text))


def families(scrape: str) -> set[str]:
    """The names of samples that a scrape has, or would have: of its families."""
    found = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\w+)$", scrape, re.MULTILINE):
        found |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"} if kind == "histogram" else {name}
    return found


def jobs_scrape(journey: Journey, capsys: pytest.CaptureFixture[str]) -> str:
    async def scraped() -> str:
        options = JobsOptions(
            database_url=journey.stack.postgres_url, host="127.0.0.1", port=0, admin_token=None, reports=None,
            invoices=None, rollup_seconds=900,
        )  # fmt: skip
        process = JobsProcess(options, Ambient(), lines)
        try:
            await process.run_once()
            return process.scrape().decode()
        finally:
            await process.close()

    lines = Lines()
    try:
        return asyncio.run(scraped())
    finally:
        lines.close()


def test_every_metric_that_is_named_is_in_a_live_scrape(journey: Journey, capsys: pytest.CaptureFixture[str]) -> None:
    journey.clear()
    assert journey.post(chat("tokens=2")).status_code == 200
    traefik = until(
        lambda: (
            text
            if "traefik_tls_certs_not_after" in (text := httpx.get(journey.stack.traefik_metrics_url, timeout=60).text)
            else ""
        )
    )
    live = families(journey.admin("/metrics").text) | families(traefik) | families(jobs_scrape(journey, capsys))
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    for name, text in [
        ("alerts", SOURCE.read_text()),
        *((name, " ".join(queries(dashboard))) for name, dashboard in DASHBOARDS.items()),
    ]:
        assert named(text) - live - recorded - {"gateway_admin"} == set(), name
