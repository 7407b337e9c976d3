"""The runbooks: their form, their commands, and for those that can be broken here, that they mend the real stack."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import pytest

from app.cli import _parser
from loadtest import local_ca, services
from loadtest.processes import free_port, has_ended
from loadtest.stack import Stack
from tests.journey import patient_edge, sees_all, until

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runbooks"
SECTIONS = ["Symptom", "Check", "Act", "Verify", "Undo", "Escalate"]
PAGES = {file.stem: file.read_text() for file in sorted(FOLDER.glob("*.md")) if "\n## Symptom\n" in file.read_text()}
INDEX = (FOLDER / "README.md").read_text()
SETUP = re.findall(r"^```sh\n(.*?)^```$", INDEX, re.DOTALL | re.MULTILINE)[1]


def section(name: str, title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGES[name], re.DOTALL | re.MULTILINE)[1]


def commands(text: str) -> str:
    return "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))


# --- their form -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_runbook_has_its_sections_in_order(name: str) -> None:
    assert re.findall(r"^## (.*)$", PAGES[name], re.MULTILINE) == SECTIONS
    assert all(section(name, title).strip() for title in SECTIONS)


@pytest.mark.parametrize("name", PAGES)
def test_check_act_and_verify_are_commands(name: str) -> None:
    assert all(commands(section(name, title)) for title in ("Check", "Act", "Verify"))


@pytest.mark.parametrize("name", PAGES)
def test_runbook_fits_on_a_screen(name: str) -> None:
    assert len(PAGES[name].splitlines()) <= 50


@pytest.mark.parametrize("name", PAGES)
def test_index_names_the_runbook(name: str) -> None:
    assert f"]({name}.md)" in INDEX


def test_every_page_that_is_linked_is_there() -> None:
    linked = {link for text in [INDEX, *PAGES.values()] for link in re.findall(r"\]\(([\w-]+\.md)\)", text)}
    assert [link for link in linked if not (FOLDER / link).exists()] == []


@pytest.mark.parametrize("name", PAGES)
def test_commands_are_shell(name: str) -> None:
    ran = subprocess.run(["bash", "-n"], input=commands(PAGES[name]), text=True, capture_output=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("name", PAGES)
def test_gateway_commands_are_ones(name: str) -> None:
    written = re.findall(r"^(gateway [^|\n]+)", commands(PAGES[name]), re.MULTILINE)
    for line in written:
        dated = re.sub(r"\$\w+_DAY", "2026-01-01", line)
        assert _parser().parse_args(shlex.split(dated)[1:]).run


@pytest.mark.parametrize("name", PAGES)
def test_metrics_are_ones(name: str) -> None:
    """Those that the README names are checked against the code there, others are looked for here."""
    source = "\n".join(file.read_text() for file in [ROOT / "README.md", *(ROOT / "app").rglob("*.py")])
    named = set(re.findall(r"\bgateway_(?!models|smoke)\w+", PAGES[name]))
    assert [metric for metric in named if not re.search(rf"{metric.removesuffix('_total')}", source)] == []


# --- broken, and mended ---------------------------------------------------------------------------------------------


LATE = {"gateway": {"overload": {"max_delay_ms": 60_000}, "redis": {"timeout_ms": 5_000}}}
"""On a busy machine a replica is late, and not overloaded; Redis slow, and not away."""


class Site:
    """A stack with a configuration of its own, and a shell as runbooks/README.md sets it up."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self.stack = stack
        self.checkout = folder / "checkout"
        self.config = folder / "config"
        self.start_url = ""
        self.environ = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")} | {
            "PATH": f"{folder}:{Path(services.postgres_program('psql')).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "LLM_GATEWAY_URL": stack.url,
            "CURL_CA_BUNDLE": str(stack.ca_file),
            "HELLO_SHIP_GATEWAY_KEY": stack.key,
            "TENANT": "acme-corp",
            "ADMIN_URLS": " ".join(replica.admin_url for replica in stack.replicas),
            "GATEWAY_ADMIN_TOKEN": stack.admin_token,
            "REDIS_URL": stack.redis_url,
            "DATABASE_URL": stack.postgres_url,
            "CONFIG": str(self.config),
            "SPOOL_DIR": str(stack.state_dir / "spool"),
            "JOBS_URL": f"http://127.0.0.1:{free_port()}",
        }
        self.jobs: subprocess.Popen[bytes] | None = None

    def bash(self, script: str, patient: bool = True, **environ: str) -> subprocess.CompletedProcess[str]:
        start = f'start() {{ for name in "$@"; do curl -sf -X POST {self.start_url}/$name; done; }}'
        hasty = "" if patient else 'within() { shift; "$@"; }'
        return subprocess.run(
            ["bash", "-c", f"{start}\n{SETUP}\n{hasty}\nset -euo pipefail\n{script}"],
            cwd=self.checkout,
            env=self.environ | environ,
            capture_output=True,
            text=True,
            timeout=100,
        )

    def mend(self, name: str, **environ: str) -> None:
        """Runs the page on what is broken: Verify fails, Check runs, Act succeeds, Verify passes."""
        verify = commands(section(name, "Verify"))
        assert self.bash(verify, patient=False, **environ).returncode != 0, "Verify passes on what is broken"
        checked = self.bash("set +e\n" + commands(section(name, "Check")), **environ)
        assert "command not found" not in checked.stderr
        acted = self.bash(commands(section(name, "Act")), **environ)
        assert acted.returncode == 0, acted.stderr
        verified = self.bash("set -x\n" + verify, **environ)
        assert verified.returncode == 0, verified.stdout + verified.stderr

    def headers(self, tenant: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.stack.key}", "x-tenant-id": tenant}

    def start(self, name: str) -> None:
        """As `docker compose up` does with a container of another image: what runs is stopped in its orderly way."""
        if name == "jobs":
            port = self.environ["JOBS_URL"].rpartition(":")[2]
            with (self.stack.log_dir / "jobs.log").open("wb") as log:
                command = [sys.executable, "-m", "app.cli", "jobs", "--port", port]
                self.jobs = subprocess.Popen(command, cwd=ROOT, env=self.environ, stdout=log, stderr=log)
            return
        name = name.replace("gateway-", "replica-")
        if not has_ended(self.stack.pid(name)):
            self.stack.stop(name)
        self.stack.start(name)

    def close(self) -> None:
        if self.jobs is not None:
            self.jobs.terminate()
            self.jobs.wait()

    def says(self, text: str) -> bool:
        """Whether every replica's status has `text`."""
        return self.bash(f"all {shlex.quote(text)}").returncode == 0

    def statuses(self) -> list[dict[str, Any]]:
        """What the replicas say of themselves; empty while one does not."""
        token = {"authorization": f"Bearer {self.stack.admin_token}"}
        with contextlib.suppress(httpx.TransportError):
            return [
                httpx.get(f"{each.admin_url}/status", headers=token, timeout=60).json() for each in self.stack.replicas
            ]
        return []

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Whatever became of the test: configuration and vendors are what they were, replicas have what they need."""
        before = self._files()
        whole = [(status["config_version"], "up", "up", "whole") for status in self.statuses()]
        try:
            yield
        finally:
            for file in self._files().keys() - before.keys():
                file.unlink()
            for file, content in before.items():
                if not file.exists() or file.read_bytes() != content:
                    file.write_bytes(content)
            httpx.delete(f"{self.stack.simulator_url}/_sim/faults", timeout=60).raise_for_status()
            parts = ("config_version", "redis", "postgres", "budgets")
            until(lambda: [tuple(status[part] for part in parts) for status in self.statuses()] == whole)
            until(lambda: sees_all(self.stack))

    def _files(self) -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in self.config.rglob("*") if file.is_file()}

    def figures(self, metric: str) -> list[float]:
        """What each replica says of it."""
        lines = self.bash(f"metric {shlex.quote(metric)}").stdout.splitlines()
        return [float(line.rpartition(" ")[2]) for line in lines]

    def each(self, tenant: str = "acme-corp") -> list[httpx.Response]:
        """What each replica answers a call with: each takes a changed file, and what the channel tells, by itself."""
        headers = self.headers(tenant)
        asked = {"model": "support-fast", "max_tokens": 60, "messages": [{"role": "user", "content": "ping"}]}
        return [
            httpx.post(f"{replica.url}/v1/chat/completions", json=asked, headers=headers, timeout=60)
            for replica in self.stack.replicas
        ]

    def fault(self, vendor: str, **fault: Any) -> None:
        httpx.put(f"{self.stack.simulator_url}/_sim/faults/{vendor}", json=fault, timeout=60).raise_for_status()


@pytest.fixture
def site(shared: Site) -> Iterator[Site]:
    with shared.restored():
        yield shared


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "config", folder / "config")
    command = folder / "gateway"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m app.cli "$@"\n')
    command.chmod(0o755)
    environ = {name: value for name, value in os.environ.items() if not name.endswith(("_API_KEY", "_ACCESS_KEY"))}
    with (
        Stack(
            folder / "state", config=folder / "config", dynamic=_checkout(folder), environ=environ, overlay=LATE
        ) as stack,
        contextlib.closing(Site(stack, folder)) as site,
        _starter(site.start) as site.start_url,
    ):
        until(lambda: site.says('"budgets":"whole"'))  # a Redis that was never used gets them from the ledger
        yield site


def _checkout(folder: Path) -> Path:
    """What the pages' commands find where they run: the repository, but for files of Traefik of this stack's own."""
    made = folder / "checkout"
    (made / "traefik").mkdir(parents=True)
    for entry in [*ROOT.iterdir(), *(ROOT / "traefik").iterdir()]:
        if entry not in (ROOT / "traefik", ROOT / "traefik" / "dynamic"):
            (made / entry.relative_to(ROOT)).symlink_to(entry)
    return patient_edge(made / "traefik")


class _starter:
    """What the operator's `start` is here: POST /NAME starts a service of the stack."""

    def __init__(self, start: Callable[[str], None]) -> None:
        class Door(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                start(self.path[1:])
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Door)

    def __enter__(self) -> str:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_redis_down_is_mended(site: Site) -> None:
    site.stack.kill("redis")
    until(lambda: site.bash("code").stdout == "200" and site.says('"redis":"down"'))
    assert site.figures('gateway_dependency_up{name="redis"}') == [0, 0]
    site.mend("redis-down")


def test_postgres_down_is_mended(site: Site) -> None:
    site.stack.stop("postgres")
    until(lambda: site.bash("code").stdout == "200" and site.says('"postgres":"down"'))
    assert site.figures('gateway_dependency_up{name="postgres"}') == [0, 0]
    until(lambda: max(site.figures("gateway_spool_bytes")) > 0 and max(site.figures("gateway_ledger_lag_seconds")) > 0)
    site.mend("postgres-down")


def test_gateway_down_is_mended(site: Site) -> None:
    for name in ("replica-1", "replica-2"):
        site.stack.kill(name)
    site.mend("gateway-down")


def test_provider_outage_is_mended(site: Site) -> None:
    site.fault("openai", kind="status", status=503)
    site.mend("provider-outage")
    site.fault("openai", kind="latency", latency_ms=1)
    undone = site.bash(commands(section("provider-outage", "Undo")))
    assert undone.returncode == 0
    assert (site.config / "gateway_models.yaml").read_text() == (ROOT / "config" / "gateway_models.yaml").read_text()


def test_leaked_key_is_revoked(site: Site) -> None:
    made = site.bash('gateway keys new --config "$CONFIG" --service leaky --tenant acme-corp').stdout.strip()
    headers = {"authorization": f"Bearer {made}", "x-tenant-id": "acme-corp"}
    for replica in site.stack.replicas:  # each takes the changed file by itself
        until(lambda url=replica.url: httpx.get(f"{url}/v1/models", headers=headers, timeout=60).status_code == 200)
    site.mend("key-leak", HELLO_SHIP_GATEWAY_KEY=made, KEY_ID=made.split("-")[2])


def test_certificate_that_ends_soon_is_renewed_without_a_restart(site: Site, tmp_path: Path) -> None:
    tls = site.stack.ca_file.parent
    new = shutil.copytree(tls, tmp_path / "new")
    for name in ("server.pem", "client.pem"):
        (tls / name).unlink()
    local_ca.ensure(tls, datetime.now(UTC) - timedelta(days=local_ca.LEAF_DAYS - 5))
    (site.stack.dynamic / "llm-gateway.yml").touch()
    expiring = (tls / "server.pem").read_text()
    until(lambda: ssl.get_server_certificate(("127.0.0.1", site.stack.port)).strip() in expiring)
    site.mend(
        "certificate-expiry",
        NEW_CERTIFICATE=str(new / "server.pem"),
        NEW_KEY=str(new / "server.key"),
        CERTIFICATE=str(tls / "server.pem"),
        KEY=str(tls / "server.key"),
    )


def test_lost_ledger_is_restored_from_its_backup(site: Site, tmp_path: Path) -> None:
    def rows() -> str:
        return site.bash('psql "$DATABASE_URL" -Atc "SELECT count(*) FROM ledger"').stdout.strip()

    assert site.bash("answers 200").returncode == 0
    until(lambda: rows() not in ("", "0"))
    backup = tmp_path / "ledger.dump"
    made = site.bash('pg_dump --format custom --file "$BACKUP" "$DATABASE_URL"', BACKUP=str(backup))
    assert made.returncode == 0, made.stderr
    lost = site.bash('psql "$DATABASE_URL" -c "DROP SCHEMA public CASCADE" -c "CREATE SCHEMA public"')
    assert lost.returncode == 0, lost.stderr
    site.mend("restore-from-backup", BACKUP=str(backup))
    before = int(rows())
    assert site.bash("answers 200").returncode == 0
    until(lambda: int(rows()) > before)


def test_runaway_spend_is_stopped(site: Site) -> None:
    site.mend("runaway-spend")
    undone = site.bash(commands(section("runaway-spend", "Undo")))
    assert undone.returncode == 0
    until(lambda: site.bash("code").stdout == "200")


def test_refused_reload_is_mended(site: Site, tmp_path: Path) -> None:
    good = shutil.copytree(site.config, tmp_path / "good")
    with (site.config / "tenant_policy.yaml").open("a") as policy:
        policy.write("tenats: {}\n")
    until(lambda: site.bash("metric gateway_config_refused").stdout.count(" 1.0") == 2)
    site.mend("reload-refused", LAST_GOOD=str(good))


def test_too_low_limit_is_raised(site: Site) -> None:
    policy = site.config / "tenant_policy.yaml"
    row = "plan: standard"
    policy.write_text(policy.read_text().replace("standard: {rpm: 120", "standard: {rpm: 2"))
    until(lambda: all(answer.status_code == 429 for answer in site.each("smoke-test")))
    site.mend("too-many-429", TENANT="smoke-test", ROW=row, RPM="600")
    assert site.bash(commands(section("too-many-429", "Undo")), TENANT="smoke-test", ROW=row, RPM="600").returncode == 0
    assert "rpm: 600}" not in policy.read_text()


def test_dead_vendor_key_is_replaced(site: Site, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("bad-revoked")
    models, settings = site.config / "gateway_models.yaml", site.config / "gateway.yaml"
    address = f"{site.stack.simulator_url}/keyed/v1"
    written = models.read_text()
    for here, added in {
        "\nproviders:\n": f"  keyed: {{kind: openai_compatible, base_url: '{address}', api_key: 'file:{key}'}}\n",
        "\ntargets:\n": "  keyed/mini: {provider: keyed, model: gpt-4o-mini}\n",
        "targets: [": "keyed/mini, ",
    }.items():
        written = written.replace(here, here + added, 1)
    models.write_text(written)
    settings.write_text(settings.read_text().replace("cooldown_seconds: 30", "cooldown_seconds: 1"))
    refused = """call >/dev/null; metric gateway_target_misconfigured_total | grep '"keyed/mini".* [1-9]'"""
    until(lambda: len(site.bash(refused).stdout.splitlines()) == 2)  # on both replicas
    site.mend("vendor-key-dead", NEW_KEY="good-again", KEY_FILE=str(key))


def test_alias_whose_vendors_all_fail_gets_another(site: Site) -> None:
    for vendor in ("openai", "openrouter"):
        site.fault(vendor, kind="status", status=503)
    until(lambda: all(answer.status_code == 503 for answer in site.each()))
    facts = {"CHAIN": "openai/gpt-4o-mini, openrouter/gpt-4o-mini", "OTHER": "anthropic/claude-haiku-4-5"}
    site.mend("error-budget", **facts)
    assert site.bash(commands(section("error-budget", "Undo")), **facts).returncode == 0
    assert (site.config / "gateway_models.yaml").read_text() == (ROOT / "config" / "gateway_models.yaml").read_text()
    for vendor in ("openai", "openrouter"):
        site.fault(vendor, kind="latency", latency_ms=1)


def test_overload_is_mended(site: Site) -> None:
    settings = site.config / "gateway.yaml"
    versions = {status["config_version"] for status in site.statuses()}
    settings.write_text(settings.read_text().replace("max_calls: 2000", "max_calls: 4"))
    until(lambda: versions.isdisjoint(status["config_version"] for status in site.statuses()))
    flooder, caller = "smoke-test", "local-dev"  # of one priority, so that one takes the other's room
    body = {
        "model": "support-fast",
        "stream": True,
        "messages": [{"role": "user", "content": "tokens=1800 chunk_ms=100"}],  # until they are let go of
    }
    with contextlib.ExitStack() as held:
        for replica in site.stack.replicas:

            def is_full(url: str = replica.url) -> bool:
                client = held.enter_context(httpx.Client(base_url=url, headers=site.headers(flooder), timeout=60))
                stream = client.stream("POST", "/v1/chat/completions", json=body)
                return held.enter_context(stream).status_code == 503

            until(is_full)
        site.mend("overload", TENANT=caller, FLOODER=flooder, MAX_CALLS="100")
        refused = site.bash("call", TENANT=flooder).stdout
        assert '"gateway_read_only"' in refused
    assert site.bash(commands(section("overload", "Undo")), FLOODER=flooder).returncode == 0
    until(lambda: site.bash("code", TENANT=flooder).stdout == "200")


@pytest.mark.drill
def test_spool_that_is_full_lets_calls_in_again(site: Site) -> None:
    settings = site.config / "gateway.yaml"
    settings.write_text(settings.read_text().replace("reserve_bytes: 268_435_456", f"reserve_bytes: {2**62}"))
    until(lambda: all(answer.status_code == 503 for answer in site.each()))
    assert '"ledger_unavailable"' in site.bash("call").stdout
    site.mend("spool-full", RESERVE="67_108_864")


@pytest.mark.drill
def test_rows_that_were_refused_are_rows_after_all(site: Site) -> None:
    refusing = """CREATE FUNCTION suite_refuses() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF NEW.tenant_id = 'smoke-test' THEN RAISE EXCEPTION 'refused' USING ERRCODE = '22023'; END IF; RETURN NEW;
    END $$; CREATE TRIGGER suite BEFORE INSERT ON ledger FOR EACH ROW EXECUTE FUNCTION suite_refuses()"""
    until(lambda: site.bash('psql "$DATABASE_URL" -Atc "SELECT to_regclass(\'ledger\')"').stdout.strip() == "ledger")
    broken = site.bash('psql "$DATABASE_URL" -c "$SQL"', SQL=refusing)
    assert broken.returncode == 0, broken.stderr
    assert site.bash("code", TENANT="smoke-test").stdout == "200"
    until(lambda: re.search(r" [1-9]", site.bash("metric gateway_ledger_dead_letters").stdout))
    assert site.bash('psql "$DATABASE_URL" -c "DROP FUNCTION suite_refuses CASCADE"').returncode == 0
    site.mend("rows-unreadable")


def test_jobs_that_nobody_does_are_done(site: Site) -> None:
    site.mend("jobs-missed")


@pytest.mark.drill
def test_answers_that_are_kept_too_short_are_kept_longer(site: Site) -> None:
    models = site.config / "gateway_models.yaml"
    alias = "\naliases:\n  support-fast:\n"
    kept = "    cache: {mode: exact, max_temperature: 1, ttl_seconds: 1}\n"
    models.write_text(models.read_text().replace(alias, alias + kept))
    until(lambda: all("x-cache" in answer.headers for answer in site.each()))
    site.mend("cache-hits-low", TTL="600")


@pytest.mark.drill
def test_drift_by_an_old_price_is_mended(site: Site, tmp_path: Path) -> None:
    """A table with a hundredth of the price has come into force; the vendor's invoice has the whole of it."""
    right = (ROOT / "config" / "prices" / "2026-11-01.yaml").read_text()
    wrong = re.sub(
        r"(gpt-4o-mini-2024-07-18:\s*\{[^}]*?input: )([\d.]+)(.*?output: )([\d.]+)",
        lambda m: f"{m[1]}{float(m[2]) / 100:.6f}{m[3]}{float(m[4]) / 100:.6f}", right, flags=re.DOTALL,
    )  # fmt: skip
    assert wrong != right
    (site.config / "prices" / "2026-11-02.yaml").write_text(wrong)
    version = "event->'cost_usd'->>'price_table_version'"
    counted = f'psql "$DATABASE_URL" -Atc "SELECT count(*) FROM ledger WHERE {version} = \'2026-11-02\'"'
    body = {"model": "support-fast", "messages": [{"role": "user", "content": "tokens=20000"}]}

    def dear_calls() -> int:
        url = site.stack.replicas[0].url
        answer = httpx.post(f"{url}/v1/chat/completions", headers=site.headers("acme-corp"), json=body, timeout=60)
        made.append(answer.headers["x-request-id"])
        return int(site.bash(counted).stdout or 0)

    made: list[str] = []
    until(lambda: dear_calls() > 2, 60)
    shipped = "SELECT count(*) FROM ledger WHERE event->>'request_id' = ANY(string_to_array('{}', ' '))"
    told = 'psql "$DATABASE_URL" -Atc "$SQL"'
    until(lambda: site.bash(told, SQL=shipped.format(" ".join(made))).stdout.strip() == str(len(made)))
    rows = f"""SELECT event->>'model_resolved',
        sum((event->'cost_usd'->>'total')::numeric * CASE {version} WHEN '2026-11-02' THEN 100 ELSE 1 END)
        FROM ledger WHERE event->>'provider' = 'openai' AND event->>'model_resolved' IS NOT NULL GROUP BY 1"""
    told = site.bash('psql "$DATABASE_URL" -AtF " " -c "$ROWS"', ROWS=rows)
    results = [
        {"amount": {"value": float(cost), "currency": "usd"}, "line_item": f"{model}, output"}
        for model, cost in (line.split() for line in told.stdout.splitlines())
    ]
    midnight = int(datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0).timestamp())
    invoice, prices = tmp_path / "invoice.json", tmp_path / "2026-11-03.yaml"
    invoice.write_text(json.dumps({"data": [{"start_time": midnight, "results": results}]}))
    prices.write_text(right)
    today = datetime.now(UTC).date()
    days = {"FIRST_DAY": f"{today - timedelta(days=1)}", "LAST_DAY": f"{today + timedelta(days=1)}"}
    site.mend("ledger-drift", INVOICE=str(invoice), PRICES=str(prices), **days)


@pytest.mark.drill
def test_throttled_vendor_is_left_in_peace(site: Site) -> None:
    grants = f"{site.stack.simulator_url}/_sim/grants"
    httpx.put(grants, json={"rpm": 60, "tpm": 1_000_000}, timeout=60).raise_for_status()
    done = Event()

    def flood() -> None:
        body = {"model": "support-fast", "messages": [{"role": "user", "content": "tokens=2"}]}
        with httpx.Client(
            base_url=site.stack.replicas[0].url, headers=site.headers("smoke-test"), timeout=60
        ) as client:
            while not done.wait(0.1):
                client.post("/v1/chat/completions", json=body)

    thread = Thread(target=flood)
    thread.start()
    try:
        refused = "metric gateway_vendor_errors_total"
        until(lambda: 'class="throttled"' in site.bash(refused).stdout)
        site.mend("vendor-throttling", FLOODER="smoke-test", RPM="10")
    finally:
        done.set()
        thread.join()
        httpx.delete(grants, timeout=60).raise_for_status()
    undone = site.bash(commands(section("vendor-throttling", "Undo")), FLOODER="smoke-test", RPM="10")
    assert undone.returncode == 0
    assert (site.config / "tenant_policy.yaml").read_text() == (ROOT / "config" / "tenant_policy.yaml").read_text()


@pytest.mark.drill
def test_deploy_that_left_a_replica_out_is_finished(site: Site) -> None:
    before = {replica.name: replica.pid for replica in site.stack.replicas}
    site.stack.stop("replica-1")
    site.mend("deploy-and-rollback")
    assert all(replica.pid != before[replica.name] for replica in site.stack.replicas)


def test_incident_modes_are_turned_on_and_off_as_their_page_says(site: Site) -> None:
    page = (FOLDER / "incident-modes.md").read_text()
    ran = site.bash(commands(page), TENANT="acme-corp")
    assert ran.returncode == 0, ran.stderr
    assert "acme-corp                cache-only, by " in ran.stdout
    assert '"health":' in ran.stdout
    assert '"details":' in ran.stdout
    until(lambda: site.bash("code").stdout == "200")


def test_stale_answer_is_asked_for_again(site: Site) -> None:
    models = site.config / "gateway_models.yaml"
    before = models.read_text()
    kept = before.replace(
        "\naliases:\n  support-fast:\n", "\naliases:\n  support-fast:\n    cache: {mode: exact, max_temperature: 1}\n"
    )
    assert kept != before
    models.write_text(kept)
    until(lambda: "x-cache: HIT" in site.bash("call -D -").stdout)
    stale = json.loads(site.bash("call").stdout)["id"]
    site.mend("stale-cache")
    until(lambda: not any(stale in answer.text for answer in site.each()))
    assert stale not in site.bash("call").stdout


@pytest.mark.drill
def test_price_that_is_missing_or_old_is_written_and_charged(site: Site, tmp_path: Path) -> None:
    tables = sorted((site.config / "prices").iterdir())
    written = {table: table.read_text() for table in tables}
    today = datetime.now(UTC).date()  # before the calls: what holds from a day on is not for those of the day before
    right = re.sub(r"checked_on: [\d-]+", f"checked_on: {today}", written[tables[-1]])
    model = r"(?m)^    gpt-4o-mini-2024-07-18:\n(?:      .*\n)+"
    prices = tmp_path / f"{today}.yaml"
    prices.write_text(right)
    days = {"FIRST_DAY": f"{today - timedelta(days=1)}", "LAST_DAY": f"{today + timedelta(days=1)}"}
    unpriced = "metric gateway_unpriced_total | grep -v ' 0.0' && echo unpriced; code"
    for table, text in written.items():
        table.write_text(re.sub(model, "", re.sub(r"checked_on: [\d-]+", "checked_on: 2020-01-01", text)))
    until(lambda: "unpriced" in site.bash(unpriced).stdout)
    site.mend("prices", PRICES=str(prices), **days)
    by_it = f"event->'cost_usd'->>'price_table_version' = '{prices.stem}'"
    adjusted = f"SELECT count(*) > 0 FROM ledger WHERE event->>'adjusts' IS NOT NULL AND {by_it}"
    assert site.bash('psql "$DATABASE_URL" -Atc "$SQL"', SQL=adjusted).stdout.strip() == "t"
