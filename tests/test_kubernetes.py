"""The Kubernetes manifests: valid by the API's own schemas, and in agreement with the configuration that they carry."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_validate import utils as kubernetes

from app.cli import _parser
from app.config import load

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "traefik" / "kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
RESOURCES: dict[str, Any] = {
    f"{document['kind']}/{document['metadata']['name']}": document
    for name in KUSTOMIZATION["resources"]
    for document in yaml.safe_load_all((FOLDER / name).read_text())
}
CUSTOM = ("traefik.io/", "monitoring.coreos.com/")
DYNAMIC = yaml.safe_load((ROOT / "traefik" / "dynamic" / "llm-gateway.yml").read_text())["http"]
SET = RESOURCES["StatefulSet/gateway"]["spec"]
POD = SET["template"]["spec"]
CONTAINER = POD["containers"][0]
JOBS = RESOURCES["Deployment/gateway-jobs"]["spec"]["template"]
ONCE = RESOURCES["CronJob/gateway-jobs"]["spec"]["jobTemplate"]["spec"]["template"]
PODS = {"replica": POD, "jobs": JOBS["spec"], "once": ONCE["spec"]}
ALERTS = {group["name"]: group["rules"] for group in RESOURCES["PrometheusRule/gateway"]["spec"]["groups"]}
WITHOUT = {"vouch", "per-certificate"}
"""Middlewares of the file provider that need a secret, which a Middleware cannot read."""


# --- by the API's schemas ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, one in RESOURCES.items() if not one["apiVersion"].startswith(CUSTOM)])
@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_resource_is_one_of_the_api(name: str, version: str) -> None:
    assert kubernetes.validate(RESOURCES[name], version, strict=True)


def test_misspelt_field_would_be_found() -> None:
    wrong = copy.deepcopy(RESOURCES["StatefulSet/gateway"])
    wrong["spec"]["template"]["spec"]["terminationGraceSeconds"] = 60
    with pytest.raises(kubernetes.ValidationError):
        kubernetes.validate(wrong, "1.37", strict=True)


def test_every_file_is_applied() -> None:
    assert {*KUSTOMIZATION["resources"], "kustomization.yaml"} == {file.name for file in FOLDER.glob("*.yaml")}


def test_there_is_what_high_availability_needs() -> None:
    kinds = {name.partition("/")[0] for name in RESOURCES}
    needed = {"StatefulSet", "PodDisruptionBudget", "HorizontalPodAutoscaler", "IngressRoute", "Middleware"}
    assert kinds >= needed | {"ServiceMonitor", "NetworkPolicy", "CronJob", "Service"}


# --- with the configuration that they carry ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The container's /config, and the overlay beside it as `overlay.yaml`, as the volumes put them there."""
    folder = tmp_path_factory.mktemp("mounted")
    for file in (ROOT / "config").glob("*.yaml"):
        shutil.copy(file, folder)
    (projected,) = (volume["projected"] for volume in POD["volumes"] if volume["name"] == "config")
    of = {"gateway-environments": "environments", "gateway-prices": "prices"}
    for source in projected["sources"]:
        for item in source["configMap"].get("items", ()):
            (folder / item["path"]).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / "config" / of[source["configMap"]["name"]] / item["key"], folder / item["path"])
    (folder / "overlay").mkdir()
    (folder / "overlay" / "overlay.yaml").write_text(RESOURCES["ConfigMap/gateway-overlay"]["data"]["overlay.yaml"])
    return folder


def test_configuration_that_is_mounted_loads(mounted: Path) -> None:
    config = load(mounted, "prod", [mounted / "overlay" / "overlay.yaml"], require_secrets=False)
    assert config.aliases


def test_every_price_table_is_mounted(mounted: Path) -> None:
    names = [file.name for file in (ROOT / "config" / "prices").iterdir()]
    assert sorted(file.name for file in (mounted / "prices").iterdir()) == sorted(names)


def test_grace_period_is_longer_than_the_longest_stream(mounted: Path) -> None:
    drain = yaml.safe_load((mounted / "gateway.yaml").read_text())["gateway"]["drain"]
    shipping_seconds = 10
    longest = drain["delay_seconds"] + drain["limit_seconds"] + shipping_seconds
    assert POD["terminationGracePeriodSeconds"] > longest


def test_shares_while_redis_is_away_are_of_as_many_replicas_as_may_run(mounted: Path) -> None:
    overlay = yaml.safe_load((mounted / "overlay" / "overlay.yaml").read_text())
    autoscaler = RESOURCES["HorizontalPodAutoscaler/gateway"]["spec"]
    assert overlay["gateway"]["redis"]["replicas"] == autoscaler["maxReplicas"]
    assert autoscaler["minReplicas"] >= 2


@pytest.mark.parametrize("pod", PODS)
def test_arguments_are_ones_of_the_command_line(pod: str) -> None:
    assert _parser().parse_args(PODS[pod]["containers"][0]["args"]).run


def test_spool_is_on_a_claim_that_outlives_the_replica() -> None:
    (spool,) = (one["metadata"]["name"] for one in SET["volumeClaimTemplates"])
    (path,) = (mount["mountPath"] for mount in CONTAINER["volumeMounts"] if mount["name"] == spool)
    assert f"--spool-dir={path}" in CONTAINER["args"]
    assert set(SET["persistentVolumeClaimRetentionPolicy"].values()) == {"Retain"}


def test_everything_that_is_mounted_is_a_volume() -> None:
    volumes = {
        volume["name"] for volume in [*POD["volumes"], *(one["metadata"] for one in SET["volumeClaimTemplates"])]
    }
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == volumes


def test_secrets_that_are_read_are_the_ones_that_the_head_makes() -> None:
    head = (FOLDER / "kustomization.yaml").read_text()
    made = set(re.findall(r"--from-literal=([\w-]+)=", head))
    by_name = set(re.findall(r"secretKeyRef: \{name: gateway, key: ([\w-]+)\}", _text()))
    by_file = set(re.findall(r"file:/run/secrets/gateway/([\w-]+)", _text()))
    monitored = RESOURCES["ServiceMonitor/gateway"]["spec"]["endpoints"][0]["authorization"]["credentials"]["key"]
    assert by_name | by_file | {monitored} == made


def _text() -> str:
    return "\n".join((FOLDER / name).read_text() for name in KUSTOMIZATION["resources"])


# --- with each other --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "selector",
    [
        SET["selector"]["matchLabels"],
        RESOURCES["PodDisruptionBudget/gateway"]["spec"]["selector"]["matchLabels"],
        RESOURCES["NetworkPolicy/gateway"]["spec"]["podSelector"]["matchLabels"],
        *(one["spec"]["selector"] for one in RESOURCES.values() if one["kind"] == "Service"),
        *(one["labelSelector"]["matchLabels"] for one in POD["topologySpreadConstraints"]),
    ],
)
def test_selector_finds_the_replicas(selector: dict[str, str]) -> None:
    assert selector.items() <= SET["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("template", [JOBS, ONCE], ids=["jobs", "once"])
def test_jobs_are_no_replicas(template: dict[str, Any]) -> None:
    labels = template["metadata"]["labels"]
    assert not SET["selector"]["matchLabels"].items() <= labels.items()
    assert RESOURCES["NetworkPolicy/gateway"]["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


def test_monitor_finds_the_admin_service_alone() -> None:
    wanted = RESOURCES["ServiceMonitor/gateway"]["spec"]["selector"]["matchLabels"]
    found = [
        name
        for name, one in RESOURCES.items()
        if one["kind"] == "Service" and wanted.items() <= one["metadata"]["labels"].items()
    ]
    assert found == ["Service/gateway-admin"]


def test_the_process_that_runs_the_jobs_is_scraped_and_the_hourly_one_is_not() -> None:
    spec = RESOURCES["PodMonitor/gateway-jobs"]["spec"]
    wanted = spec["selector"]["matchLabels"].items()
    assert wanted <= JOBS["metadata"]["labels"].items()
    assert not wanted <= ONCE["metadata"]["labels"].items()
    (port,) = JOBS["spec"]["containers"][0]["ports"]
    assert [endpoint["port"] for endpoint in spec["podMetricsEndpoints"]] == [port["name"]]
    assert f"--port={port['containerPort']}" in JOBS["spec"]["containers"][0]["args"]
    allowed = [port["port"] for rule in RESOURCES["NetworkPolicy/gateway"]["spec"]["ingress"] for port in rule["ports"]]
    assert port["containerPort"] in allowed


def test_invoices_are_read_from_the_claim() -> None:
    (mount,) = JOBS["spec"]["containers"][0]["volumeMounts"]
    (volume,) = JOBS["spec"]["volumes"]
    assert f"--invoices={mount['mountPath']}" in JOBS["spec"]["containers"][0]["args"]
    assert f"PersistentVolumeClaim/{volume['persistentVolumeClaim']['claimName']}" in RESOURCES


def test_alerts_on_money_are_those_of_the_runbook() -> None:
    page = (ROOT / "runbooks" / "money.md").read_text()
    assert re.findall(r"^\| `(Gateway\w+)` \| `(.*?)` \|", page, re.MULTILINE) == [
        (rule["alert"], rule["expr"]) for rule in ALERTS["gateway-money"]
    ]


def test_ports_that_are_named_are_the_container_s() -> None:
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    probes = [CONTAINER[probe]["httpGet"]["port"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")]
    services = [one["spec"]["ports"] for one in RESOURCES.values() if one["kind"] == "Service"]
    named = [port["targetPort"] for some in services for port in some]
    assert {*probes, *named} == set(ports)
    assert [f"--port={ports['calls']}", f"--admin-port={ports['admin']}"] == CONTAINER["args"][2:4]


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
def test_pod_has_no_rights_that_it_does_not_need(pod: dict[str, Any]) -> None:
    container = pod["containers"][0]["securityContext"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["readOnlyRootFilesystem"]
    assert not container["allowPrivilegeEscalation"]
    assert container["capabilities"] == {"drop": ["ALL"]}
    assert not pod["automountServiceAccountToken"]


# --- with the front door of the other stacks --------------------------------------------------------------------------


def _as_file(spec: dict[str, Any]) -> dict[str, Any]:
    """A Middleware as the file provider writes it: chains name their parts."""
    if "chain" in spec:
        return {"chain": {"middlewares": [part["name"] for part in spec["chain"]["middlewares"]]}}
    return spec


def test_middlewares_are_those_of_the_file_provider() -> None:
    ours = {one["metadata"]["name"]: _as_file(one["spec"]) for one in RESOURCES.values() if one["kind"] == "Middleware"}
    theirs = {
        name: spec
        for name, spec in DYNAMIC["middlewares"].items()
        if "certificate" not in name and name not in ("vouch", "edge-secret")
    }
    assert ours == theirs


def test_routes_are_those_of_the_file_provider() -> None:
    routes = [
        (
            re.fullmatch(r"Host\(`llm-gateway\.internal`\) && \((.*)\)", route["match"])[1],
            route["priority"],
            [one["name"] for one in route["middlewares"]],
            [service["name"] for service in route["services"]],
        )
        for route in RESOURCES["IngressRoute/gateway"]["spec"]["routes"]
    ]
    assert routes == [
        (one["rule"], one["priority"], [m for m in one["middlewares"] if m not in WITHOUT], [one["service"]])
        for one in DYNAMIC["routers"].values()
    ]


def test_routes_lead_to_services_and_transports_that_exist() -> None:
    for route in RESOURCES["IngressRoute/gateway"]["spec"]["routes"]:
        (service,) = route["services"]
        ports = RESOURCES[f"Service/{service['name']}"]["spec"]["ports"]
        assert service["port"] in [port["name"] for port in ports]
        assert f"ServersTransport/{service['serversTransport']}" in RESOURCES


def test_transport_is_that_of_the_file_provider() -> None:
    assert RESOURCES["ServersTransport/replicas"]["spec"] == DYNAMIC["serversTransports"]["replicas"]
