"""The shipped Traefik configuration: linted, and driven with the real Traefik in front of an echoing server."""

from __future__ import annotations

import contextlib
import copy
import http.client
import json
import os
import re
import shlex
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from loadtest import local_ca, services
from loadtest.processes import ROOT, Child, free_port
from tests.journey import patient_edge

STATIC = yaml.safe_load((ROOT / "traefik" / "traefik.yml").read_text())
DYNAMIC_FILE = ROOT / "traefik" / "dynamic" / "llm-gateway.yml"
DYNAMIC = yaml.safe_load(DYNAMIC_FILE.read_text())
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
GATEWAY = yaml.safe_load((ROOT / "config" / "gateway.yaml").read_text())["gateway"]

INTERNAL_HEADERS = DYNAMIC["http"]["middlewares"]["strip-internal-headers"]["headers"]["customRequestHeaders"]
EDGE_SECRET = "the-edge"
HOLDS_BACK = {"retry", "buffering", "compress", "circuitBreaker", "failover"}
"""Middlewares that repeat a call, or hold back a body or a stream."""


# --- the linter -----------------------------------------------------------------------------------------------------


def middlewares_of(dynamic: dict[str, Any], names: list[str]) -> dict[str, dict[str, Any]]:
    """The named middlewares with the members of chains, by name."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        definition = dynamic["http"]["middlewares"][name]
        found[name] = definition
        found.update(middlewares_of(dynamic, definition.get("chain", {}).get("middlewares", [])))
    return found


def lint(dynamic: dict[str, Any]) -> list[str]:
    """What is wrong with a dynamic configuration: one sentence for each fault."""
    faults = []
    for name, router in dynamic["http"]["routers"].items():
        used = middlewares_of(dynamic, router.get("middlewares", []))
        kinds = {kind for definition in used.values() for kind in definition}
        if not router.get("tls"):
            faults.append(f"router {name}: has no tls")
        # A rule without a path can match /v1 as well.
        if "/v1" in router["rule"] or "Path" not in router["rule"]:
            faults += [f"router {name}: {kind} on /v1" for kind in sorted(kinds & HOLDS_BACK)]
        criteria = [
            definition["rateLimit"]["sourceCriterion"] for definition in used.values() if "rateLimit" in definition
        ]
        if not any("ipStrategy" in criterion for criterion in criteria):
            faults.append(f"router {name}: no rate limit per IP")
        if "/v1" in router["rule"] and not any("requestHeaderName" in criterion for criterion in criteria):
            faults.append(f"router {name}: no rate limit per credential")
        if any(criterion.get("requestHeaderName") == "X-Tenant-Id" for criterion in criteria):
            faults.append(f"router {name}: a rate limit by a header that can be forged")
        if "/v1" in router["rule"] and "inFlightReq" not in kinds:
            faults.append(f"router {name}: no limit of calls in flight")
        if "strip-internal-headers" not in used:
            faults.append(f"router {name}: does not strip internal headers")
    for name, service in dynamic["http"]["services"].items():
        check = service["loadBalancer"].get("healthCheck", {})
        if check.get("interval") != "1s" or check.get("unhealthyInterval") != "1s":
            faults.append(f"service {name}: health is not checked every second")
        if "passiveHealthCheck" in service["loadBalancer"]:
            faults.append(f"service {name}: counts vendor errors against a replica")
    if dynamic["tls"]["options"]["default"].get("minVersion") not in ("VersionTLS12", "VersionTLS13"):
        faults.append("tls: allows versions before 1.2")
    return faults


def seconds(duration: str | int) -> float:
    units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
    return sum(float(n) * units[unit] for n, unit in re.findall(r"([\d.]+)(ms|s|m|h)", str(duration)))


def test_shipped_configuration_has_no_fault() -> None:
    assert lint(DYNAMIC) == []


@pytest.mark.parametrize("kind", sorted(HOLDS_BACK))
def test_lint_finds_what_holds_back_a_stream_also_in_a_chain(kind: str) -> None:
    broken = copy.deepcopy(DYNAMIC)
    broken["http"]["middlewares"]["bad"] = {kind: {}}
    broken["http"]["middlewares"]["per-ip"]["chain"]["middlewares"].append("bad")
    assert f"router v1: {kind} on /v1" in lint(broken)


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("http.routers.v1.tls", None, "router v1: has no tls"),
        ("http.routers.v1.middlewares", [], "router v1: no limit of calls in flight"),
        ("http.routers.health.middlewares", ["strip-internal-headers"], "router health: no rate limit per IP"),
        ("http.services.gateway.loadBalancer.healthCheck.interval", "30s", "service gateway: health is not checked"),
        ("http.services.gateway.loadBalancer.passiveHealthCheck", {}, "service gateway: counts vendor errors"),
        ("tls.options.default.minVersion", "VersionTLS10", "tls: allows versions before 1.2"),
        (
            "http.middlewares.rate-per-authorization.rateLimit.sourceCriterion.requestHeaderName",
            "X-Tenant-Id",
            "router v1-authorization: a rate limit by a header that can be forged",
        ),
    ],
)
def test_lint_finds_a_planted_fault(path: str, value: object, fault: str) -> None:
    broken = copy.deepcopy(DYNAMIC)
    *parents, last = path.split(".")
    place = broken
    for name in parents:
        place = place[name]
    place[last] = value
    assert any(found.startswith(fault) for found in lint(broken))


def test_every_client_facing_entry_point_has_tls() -> None:
    public = [point for name, point in STATIC["entryPoints"].items() if name != "internal"]
    assert [point["http"]["tls"] for point in public] == [{}]


def test_timeouts_let_a_stream_run_as_long_as_the_gateway_lets_it() -> None:
    transport = STATIC["entryPoints"]["websecure"]["transport"]
    assert seconds(transport["respondingTimeouts"]["writeTimeout"]) == 0
    assert seconds(transport["lifeCycle"]["graceTimeOut"]) > GATEWAY["drain"]["limit_seconds"]
    forwarding = DYNAMIC["http"]["serversTransports"]["replicas"]["forwardingTimeouts"]
    assert seconds(forwarding["responseHeaderTimeout"]) == 0


def test_replicas_drain_longer_than_traefik_needs_to_notice() -> None:
    check = DYNAMIC["http"]["services"]["gateway"]["loadBalancer"]["healthCheck"]
    assert GATEWAY["drain"]["delay_seconds"] >= 2 * seconds(check["interval"]) + seconds(check["timeout"])


def test_local_stack_changes_only_addresses_folder_and_the_time_for_a_load_balancer() -> None:
    local = services.local_static(copy.deepcopy(STATIC), 4000, 4001, Path("/dynamic"))
    assert set(differences(STATIC, local)) == {
        "entryPoints.websecure.address",
        "entryPoints.internal.address",
        "entryPoints.websecure.transport.lifeCycle.requestAcceptGraceTimeout",
        "entryPoints.internal.transport.lifeCycle.requestAcceptGraceTimeout",
        "providers.file.directory",
    }


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from differences(one.get(key), other.get(key), f"{path}.{key}" if path else key)
    elif one != other:
        yield path


def test_compose_mounts_the_shipped_files() -> None:
    mounts = COMPOSE["services"]["traefik"]["volumes"]
    assert "./traefik/traefik.yml:/etc/traefik/traefik.yml:ro" in mounts
    assert f"./traefik/dynamic:{STATIC['providers']['file']['directory']}:ro" in mounts


def test_compose_sets_every_variable_that_the_dynamic_file_reads() -> None:
    read = set(re.findall(r'env "(\w+)"', DYNAMIC_FILE.read_text()))
    traefik = COMPOSE["services"]["traefik"]
    assert read == set(traefik["environment"]) | set(re.findall(r"export (\w+)=", traefik["command"][-1]))


@pytest.mark.parametrize("authority", ["", "-----BEGIN CERTIFICATE-----"])
def test_traefik_of_compose_reads_its_secrets_and_asks_for_certificates_only_with_an_authority(
    tmp_path: Path, authority: str
) -> None:
    (tmp_path / "edge_secret").write_text("hush\n")
    (tmp_path / "client_ca").write_text(authority)
    script = COMPOSE["services"]["traefik"]["command"][-1].replace("$$", "$").replace("/run/secrets", str(tmp_path))
    ran = subprocess.run(
        ["sh", "-ec", script.replace("exec traefik", "exec env")], env={"PATH": os.environ["PATH"]},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "GATEWAY_EDGE_SECRET=hush\n" in ran.stdout
    assert ("GATEWAY_CLIENT_CA_FILE" in ran.stdout) == bool(authority)


def test_only_traefik_publishes_a_port_in_compose() -> None:
    """Grafana's, where it is asked for, is for this machine alone."""
    published = {name: service["ports"] for name, service in COMPOSE["services"].items() if "ports" in service}
    assert set(published) == {"traefik", "grafana"}
    assert all(port.startswith("127.0.0.1:") for port in published["grafana"])


def test_compose_waits_longer_than_every_drain() -> None:
    lifecycle = STATIC["entryPoints"]["websecure"]["transport"]["lifeCycle"]
    grace = seconds(lifecycle["graceTimeOut"]) + seconds(lifecycle["requestAcceptGraceTimeout"])
    assert seconds(COMPOSE["services"]["traefik"]["stop_grace_period"]) > grace
    drain = GATEWAY["drain"]["delay_seconds"] + GATEWAY["drain"]["limit_seconds"]
    for name in ("gateway-1", "gateway-2"):
        assert seconds(COMPOSE["services"][name]["stop_grace_period"]) > drain


def test_redis_has_the_same_settings_in_compose_and_the_local_stack() -> None:
    words = shlex.split(COMPOSE["services"]["redis"]["command"][-1].replace("\\\n", " "))
    given = {words[i].removeprefix("--"): words[i + 1] for i, word in enumerate(words) if word.startswith("--")}
    assert services.REDIS_SETTINGS.items() <= given.items()


# --- the real Traefik -----------------------------------------------------------------------------------------------


class Echo(BaseHTTPRequestHandler):
    """Answers with the request's headers as JSON; /v1/stream answers in chunks as the test lets it."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    """An answer is one write: of one that begins at once Traefik cuts what comes after a first write now and then."""
    server: EchoServer

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        while length:
            length -= len(self.rfile.read(min(length, 65536)))
        if self.path == "/v1/stream":
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for chunk in (b"data: first\n\n", b"data: [DONE]\n\n"):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                self.wfile.flush()
                self.server.may_go_on.wait(60)
            self.wfile.write(b"0\r\n\r\n")
            return
        body = json.dumps({"name": self.server.name, "headers": self.headers.items()}).encode()
        self.send_response(200 if self.path != "/health/ready" or self.server.is_ready else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


class EchoServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, name: str) -> None:
        super().__init__(("127.0.0.1", 0), Echo)
        self.name = name
        self.is_ready = True
        self.may_go_on = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Edge:
    """A running Traefik with two echoing replicas behind it."""

    def __init__(self, folder: Path, dynamic: Path) -> None:
        self.replicas = [EchoServer("one"), EchoServer("two")]
        certificates = local_ca.ensure(folder)
        self.port = free_port()
        self.tls = ssl.create_default_context(cafile=str(certificates.ca_file))
        self._spawner = ThreadPoolExecutor(1)
        service = services.traefik(
            folder,
            self.port,
            free_port({self.port}),
            [server.url for server in self.replicas],
            certificates,
            dynamic,
            EDGE_SECRET,
        )
        self.certificates = certificates
        self._child = Child(service, folder, self._spawner)
        self.log = self._child.log
        try:
            self._child.start()
            until(lambda: self._child.answers() and self._is_configured(), seconds=60)
        except BaseException:
            self.close()
            raise

    def _is_configured(self) -> bool:
        """Until its dynamic files are read, Traefik answers with a certificate of its own, or with none of its routes.

        Only while it starts: later a handshake that fails is a failure.
        """
        try:
            return self.call("/health")[0] == 200
        except OSError:
            return False

    def call(
        self,
        path: str,
        headers: dict[str, str] | None = None,
        body: bytes | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Status, and the echoed request: `name` of the server and `headers`; empty when none was reached."""
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=60, context=tls or self.tls)
        try:
            connection.request("POST" if body else "GET", path, body, headers or {})
            response = connection.getresponse()
            content = response.read()
            return response.status, json.loads(content) if content.startswith(b"{") else {}
        except ConnectionRefusedError:
            return 0, {}
        finally:
            connection.close()

    def client_tls(self, cert_file: Path, key_file: Path) -> ssl.SSLContext:
        """A context that shows a client certificate."""
        context = ssl.create_default_context(cafile=str(self.certificates.ca_file))
        context.load_cert_chain(cert_file, key_file)
        return context

    def headers_at_replica(self, headers: dict[str, str], tls: ssl.SSLContext | None = None) -> dict[str, str]:
        """What a replica is sent when a client sends `headers`; names in lower case."""
        status, echo = self.call("/v1/echo", headers, tls=tls)
        assert status == 200
        return {name.lower(): value for name, value in echo["headers"]}

    def close(self) -> None:
        for server in self.replicas:
            server.may_go_on.set()
            server.shutdown()
            server.server_close()
        self._child.end()
        self._spawner.shutdown()


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    folder = tmp_path_factory.mktemp("edge")
    running = Edge(folder, patient_edge(folder))
    yield running
    running.close()


@pytest.fixture(scope="module")
def narrow_edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """The shipped configuration with credentials limited to 5 requests at once, so that a test can reach it."""
    folder = tmp_path_factory.mktemp("narrow")
    dynamic = patient_edge(folder)
    file = dynamic / DYNAMIC_FILE.name
    file.write_text(file.read_text().replace("average: 2000", "average: 1").replace("burst: 4000", "burst: 5"))
    running = Edge(folder, dynamic)
    yield running
    running.close()


@pytest.mark.parametrize("name", INTERNAL_HEADERS)
def test_internal_header_from_outside_reaches_no_replica(edge: Edge, name: str) -> None:
    assert "forged" not in edge.headers_at_replica({name: "forged"}).values()


# --- client certificates ----------------------------------------------------------------------------------------------

CERTIFICATE_HEADER = "x-forwarded-tls-client-cert-info"
SUBJECT = "Subject%3D%22CN%3Dlocal-dev%22%2CSubject%3D%22CN%3DLLM+gateway%2C+local+CA+of+this+machine%22"
"""The client's own, then that of the authority, which OpenSSL sends along."""


@pytest.fixture(scope="module")
def with_certificate(edge: Edge) -> ssl.SSLContext:
    return edge.client_tls(edge.certificates.client_cert_file, edge.certificates.client_key_file)


def test_every_request_carries_the_edge_s_secret(edge: Edge) -> None:
    assert edge.headers_at_replica({"X-Gateway-Edge": "forged"})["x-gateway-edge"] == EDGE_SECRET


def test_subject_of_a_client_certificate_reaches_the_replica(edge: Edge, with_certificate: ssl.SSLContext) -> None:
    assert edge.headers_at_replica({}, with_certificate)[CERTIFICATE_HEADER] == SUBJECT


def test_subject_that_a_client_with_a_certificate_forges_is_replaced(
    edge: Edge, with_certificate: ssl.SSLContext
) -> None:
    sent = {"X-Forwarded-Tls-Client-Cert-Info": "Subject%3D%22CN%3Dadmin%22"}
    assert edge.headers_at_replica(sent, with_certificate)[CERTIFICATE_HEADER] == SUBJECT


def test_client_without_a_certificate_has_no_subject(edge: Edge) -> None:
    assert CERTIFICATE_HEADER not in edge.headers_at_replica({})


@pytest.mark.parametrize("named", ["X-Gateway-Edge", "X-Forwarded-Tls-Client-Cert-Info"])
def test_what_the_edge_vouches_for_cannot_be_removed_by_naming_it_in_connection(
    edge: Edge, with_certificate: ssl.SSLContext, named: str
) -> None:
    seen = edge.headers_at_replica({"Connection": named}, with_certificate)
    assert (seen["x-gateway-edge"], seen[CERTIFICATE_HEADER]) == (EDGE_SECRET, SUBJECT)


def test_client_certificate_of_another_authority_ends_the_handshake(edge: Edge, tmp_path: Path) -> None:
    foreign = local_ca.ensure(tmp_path)
    with pytest.raises(ssl.SSLError):
        edge.call("/v1/echo", tls=edge.client_tls(foreign.client_cert_file, foreign.client_key_file))


def test_requests_without_a_certificate_fill_no_log(edge: Edge) -> None:
    edge.headers_at_replica({"X-Request-Id": "no-certificate"})
    until(lambda: "no-certificate" in edge.log.read_text())
    assert "without mutual TLS" not in edge.log.read_text()


def test_flood_without_a_credential_leaves_certificates_alone(narrow_edge: Edge) -> None:
    assert 429 in statuses(narrow_edge, lambda n: {})
    certificates = narrow_edge.certificates
    tls = narrow_edge.client_tls(certificates.client_cert_file, certificates.client_key_file)
    assert narrow_edge.call("/v1/echo", tls=tls)[0] == 200


# --- the rest of the headers ------------------------------------------------------------------------------------------


def test_forwarded_address_is_the_connections_not_the_clients_claim(edge: Edge) -> None:
    seen = edge.headers_at_replica({"X-Forwarded-For": "6.6.6.6", "X-Real-Ip": "6.6.6.6"})
    assert (seen["x-forwarded-for"], seen["x-real-ip"]) == ("127.0.0.1", "127.0.0.1")


def test_header_that_looks_like_another_reaches_no_replica(edge: Edge) -> None:
    assert not {"x_tenant_id", "x.tenant.id"} & edge.headers_at_replica({"X_Tenant_Id": "a"}).keys()


def test_headers_of_the_contract_pass(edge: Edge) -> None:
    sent = {
        "authorization": "Bearer k",
        "x-api-key": "k",
        "x-tenant-id": "t",
        "x-feature-id": "f",
        "x-request-id": "r",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "idempotency-key": "i",
        "x-est-tokens": "5",
    }
    assert sent.items() <= edge.headers_at_replica(sent).items()


def test_credential_named_in_connection_is_gone_for_everybody(edge: Edge) -> None:
    seen = edge.headers_at_replica({"Connection": "Authorization", "Authorization": "Bearer k"})
    assert "authorization" not in seen


def test_forwarded_address_cannot_be_removed_by_naming_it_in_connection(edge: Edge) -> None:
    assert edge.headers_at_replica({"Connection": "X-Forwarded-For"})["x-forwarded-for"] == "127.0.0.1"


def test_first_event_of_a_stream_passes_while_the_next_is_not_there_yet(edge: Edge) -> None:
    for server in edge.replicas:
        server.may_go_on.clear()
    connection = http.client.HTTPSConnection("127.0.0.1", edge.port, timeout=60, context=edge.tls)
    with contextlib.closing(connection):
        # Without a body: an answer that begins before Traefik has seen a body's end is cut now and then.
        connection.request("GET", "/v1/stream", headers={"Accept-Encoding": "gzip"})
        response = connection.getresponse()
        first = response.readline()
        for server in edge.replicas:
            server.may_go_on.set()
        assert (first, response.read()) == (b"data: first\n", b"\ndata: [DONE]\n\n")


def test_body_of_20_mb_passes(edge: Edge) -> None:
    assert edge.call("/v1/files", body=b"x" * 20_000_000)[0] == 200


@pytest.mark.parametrize("path", ["/", "/metrics", "/v1", "/v2/models", "/v1/../metrics", "/status/x", "/healthz"])
def test_path_outside_the_routes_reaches_nobody(edge: Edge, path: str) -> None:
    assert edge.call(path) == (404, {})


@pytest.mark.parametrize("path", ["/v1/models%2fx", "/v1/a%00", "/v1/%2e%2e%2fmetrics"])
def test_path_that_can_be_read_in_two_ways_is_refused(edge: Edge, path: str) -> None:
    assert edge.call(path) == (400, {})


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/health/ready", "/usage", "/status", "/schema", "/models"])
def test_route_leads_to_a_replica(edge: Edge, path: str) -> None:
    assert edge.call(path)[1]["name"] in ("one", "two")


def test_http_2_is_offered(edge: Edge) -> None:
    context = ssl.create_default_context(cadata=ssl.DER_cert_to_PEM_cert(edge.tls.get_ca_certs(binary_form=True)[0]))
    context.set_alpn_protocols(["h2", "http/1.1"])
    with context.wrap_socket(socket.create_connection(("127.0.0.1", edge.port)), server_hostname="localhost") as end:
        assert end.selected_alpn_protocol() == "h2"


def test_tls_1_1_is_refused(edge: Edge) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", edge.port)) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain)


def test_replica_that_is_not_ready_gets_no_calls(edge: Edge) -> None:
    def names() -> set[str]:
        return {edge.call("/v1/echo")[1]["name"] for _ in range(20)}

    edge.replicas[0].is_ready = False
    try:
        until(lambda: names() == {"two"})
    finally:
        edge.replicas[0].is_ready = True
    until(lambda: names() == {"one", "two"})


def test_access_log_has_the_request_id_and_no_credential(edge: Edge) -> None:
    edge.call("/v1/echo", {"X-Request-Id": "req-7", "Authorization": "Bearer canary", "X-Api-Key": "canary"})
    until(lambda: "req-7" in edge.log.read_text())
    assert "canary" not in edge.log.read_text()


def statuses(edge: Edge, headers: Callable[[int], dict[str, str]]) -> list[int]:
    return [edge.call("/v1/echo", headers(n))[0] for n in range(10)]


@pytest.mark.parametrize("header", ["Authorization", "X-Api-Key"])
def test_flood_by_one_credential_is_answered_429(narrow_edge: Edge, header: str) -> None:
    assert 429 in statuses(narrow_edge, lambda n: {header: "flood"})


@pytest.mark.parametrize("header", ["Authorization", "X-Api-Key"])
def test_flood_by_one_credential_leaves_another_alone(narrow_edge: Edge, header: str) -> None:
    statuses(narrow_edge, lambda n: {header: "flooding"})
    assert narrow_edge.call("/v1/echo", {header: f"honest {header}"})[0] == 200


@pytest.mark.parametrize(("fixed", "changing"), [("Authorization", "X-Api-Key"), ("X-Api-Key", "Authorization")])
def test_limit_is_not_evaded_by_changing_the_other_credential(narrow_edge: Edge, fixed: str, changing: str) -> None:
    assert 429 in statuses(narrow_edge, lambda n: {fixed: "evader", changing: f"other {n}"})


def test_forged_tenants_flood_does_not_slow_that_tenant(narrow_edge: Edge) -> None:
    statuses(narrow_edge, lambda n: {"Authorization": "attacker", "X-Tenant-Id": "acme-corp"})
    assert narrow_edge.call("/v1/echo", {"Authorization": "acme's own", "X-Tenant-Id": "acme-corp"})[0] == 200
