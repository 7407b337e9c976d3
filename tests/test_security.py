"""What strangers can do to the doors: nothing without a credential, no growth of memory, no 500."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from litestar import Litestar

from app.ambient import Ambient, Patience
from app.api import FrontDoor
from app.asgi import Options, Replica
from app.auth import Callers
from app.bodies import Bodies
from app.config import ConfigSource
from app.dialects import BELOW, ROUTES
from app.dialects.openai_responses import kept
from app.errors import InvalidRequest, Overloaded, RequestTooLarge
from app.server import Server
from app.telemetry.lines import Lines
from loadtest.processes import ROOT
from loadtest.stack import Stack
from tests.gateway_parts import ALIAS, STREAM, Rooms, ScriptedAnswer, completion, config
from tests.journey import KEY, OTHER_KEY, Journey, token
from tests.test_auth import CONFIG, NoTokens
from tests.test_front_door import Client, Source, headers
from tests.test_responses_relay import streamed as streamed_response
from tests.test_responses_relay import whole as whole_response

# --- the route table --------------------------------------------------------------------------------------------------

OPEN = {
    ("main", "GET", "/health"): "says only that the process lives",
    ("main", "GET", "/health/live"): "the same",
    ("main", "GET", "/health/liveliness"): "the same",
    ("main", "GET", "/health/ready"): "Traefik asks it",
    ("main", "GET", "/health/readiness"): "the same",
    ("main", "GET", "/status"): "mode and health, without names",
    ("main", "GET", "/schema"): "says what the routes are",
    ("main", "GET", "/usage/usage.css"): "a style sheet",
    ("main", "POST", "/usage/sign-out"): "ends a session, or none",
    ("admin", "GET", "/health"): "says only that the process lives",
    ("admin", "GET", "/usage/usage.css"): "a style sheet",
    ("admin", "POST", "/usage/sign-out"): "ends a session, or none",
}
"""Routes that ask for no credential, and why."""
SIGN_IN = "/usage/sign-in"
"""Takes its credential from a form, so that it is a wrong one at worst."""


def table(port: str, app: Any) -> Iterator[tuple[str, str, str]]:
    assert isinstance(app, Litestar)
    for route in app.routes:
        yield from ((port, method, route.path) for method in route.methods if method not in ("OPTIONS", "HEAD"))


def all_routes() -> list[tuple[str, str, str]]:
    """The routes of a replica as it is put together to run."""
    options = Options(
        host="127.0.0.1", port=0, admin_port=0, config=ROOT / "config", environment="ci", overlays=(),
        spool_dir=Path("spool"), name="r", redis_url=None, database_url=None, admin_token=None,
    )  # fmt: skip

    async def doors() -> tuple[Server, Server]:
        source = ConfigSource(
            options.config, options.environment, (), {"SIMULATOR_API_KEY": "x", "GATEWAY_USER_SALT": "y"}
        )
        return Replica(options, source, Ambient(), Lines()).doors()

    main, control = asyncio.run(doors())
    calls = [(port, "POST", path.decode()) for port, at in (("main", main), ("admin", control)) for path in at._calls]
    calls = [call for call in calls if call[2] not in BELOW]
    calls += [("main", method, "/v1/responses/" + path) for method, path in kept.ROUTES]
    return [*calls, *table("main", main._app), *table("admin", control._app)]


GUARDED = [route for route in all_routes() if route not in OPEN]


def ask(stack: Stack, route: tuple[str, str, str], **sent: Any) -> int:
    port, method, path = route
    replica = stack.replicas[0]
    url = (replica.url if port == "main" else replica.admin_url) + path.replace("{name:str}", "support-fast").replace(
        "{id}", "resp_1"
    )
    return httpx.request(method, url, follow_redirects=False, timeout=60, **sent).status_code


def test_open_routes_are_real_ones() -> None:
    assert set(OPEN) <= set(all_routes())


def test_both_ports_have_guarded_routes() -> None:
    assert {route[0] for route in GUARDED} == {"main", "admin"}
    assert {path for _, _, path in GUARDED} >= {"/v1/chat/completions", "/v1/models", "/metrics", "/status"}


@pytest.mark.parametrize("route", GUARDED, ids=" ".join)
def test_no_credential_is_401_everywhere(stack: Stack, route: tuple[str, str, str]) -> None:
    expected = {401, 403} if route[2] == SIGN_IN and route[0] == "admin" else {401}
    assert ask(stack, route) in expected


WRONG = [
    {"authorization": "Bearer wrong"},
    {"authorization": "Bearer"},
    {"authorization": f"Basic {KEY}"},
    {"authorization": "\xff\xfe"},
    {"x-api-key": "sk-gw-suitekey0001-" + "x" * 43},
    {"cookie": "__Secure-gateway-usage=suitekey0001.99999999999.00; gateway-admin-usage=admin.99999999999.00"},
    {"x-forwarded-tls-client-cert-info": "Subject%3D%22CN%3Dlocal-dev%22", "x-gateway-edge": "guess"},
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: " ".join(wrong))
@pytest.mark.parametrize("route", GUARDED, ids=" ".join)
def test_wrong_credential_opens_nothing(stack: Stack, route: tuple[str, str, str], wrong: dict[str, str]) -> None:
    sent = {name: value.encode("latin-1") for name, value in wrong.items()}
    form = {"key": "wrong"} if route[2] == SIGN_IN else None
    assert ask(stack, route, headers=sent, data=form) in (401, 403)


@pytest.mark.parametrize("route", [r for r in GUARDED if r[0] == "admin"], ids=" ".join)
@pytest.mark.parametrize("credential", [KEY, OTHER_KEY, token()], ids=["key", "other key", "token"])
def test_gateway_credential_opens_nothing_on_the_admin_port(
    stack: Stack, route: tuple[str, str, str], credential: str
) -> None:
    sent = {"authorization": f"Bearer {credential}", "x-tenant-id": "tenant-a"}
    form = {"key": credential} if route[2] == SIGN_IN else None
    assert ask(stack, route, headers=sent, data=form) in (401, 403)


@pytest.mark.parametrize("route", [r for r in GUARDED if r[0] == "main" and r[2] != SIGN_IN], ids=" ".join)
def test_admin_token_opens_nothing_on_the_main_port(stack: Stack, route: tuple[str, str, str]) -> None:
    assert ask(stack, route, headers={"authorization": f"Bearer {stack.admin_token}"}) == 401


@pytest.mark.parametrize("route", [r for r in GUARDED if r[0] == "main" and r[2].startswith("/v1/")], ids=" ".join)
def test_tenant_of_another_is_403_everywhere(stack: Stack, route: tuple[str, str, str]) -> None:
    assert ask(stack, route, headers={"authorization": f"Bearer {OTHER_KEY}", "x-tenant-id": "tenant-a"}) == 403


# --- bodies -----------------------------------------------------------------------------------------------------------

SMALL = msgspec.structs.replace(CONFIG.settings, max_body_bytes=100, max_bodies_bytes=250)


class Upload:
    """A client that sends these parts; None hangs up."""

    def __init__(self, *parts: bytes | None) -> None:
        self._parts = list(parts)

    async def __call__(self) -> dict[str, Any]:
        part = self._parts.pop(0)
        if part is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": bool(self._parts)}


async def _read(bodies: Bodies, *parts: bytes | None) -> bytes | None:
    return await bodies.read({}, Upload(*parts), SMALL, Patience())


def test_bodies_are_counted_while_they_are_held() -> None:
    async def scenario() -> None:
        bodies = Bodies()
        assert await _read(bodies, b"x" * 50, b"y" * 40) == b"x" * 50 + b"y" * 40
        assert bodies.held == 90

    asyncio.run(scenario())


def test_a_body_for_which_there_is_no_room_is_refused_and_not_held() -> None:
    async def scenario() -> None:
        bodies = Bodies()
        for _ in range(2):
            await _read(bodies, b"x" * 100)
        with pytest.raises(Overloaded):
            await _read(bodies, b"x" * 40, b"x" * 40)
        assert bodies.held == 200
        assert await _read(bodies, b"x" * 50) == b"x" * 50

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("parts", "error"), [((b"x" * 60, b"x" * 60), RequestTooLarge), ((b"x" * 60, None), None), ((b"x" * 300,), None)]
)
def test_a_body_that_is_not_taken_is_not_held(
    parts: tuple[bytes | None, ...], error: type[RequestTooLarge] | None
) -> None:
    async def scenario() -> None:
        bodies = Bodies()
        try:
            assert await _read(bodies, *parts) is None
        except RequestTooLarge:
            assert error is RequestTooLarge or len(parts) == 1
        assert bodies.held == 0

    asyncio.run(scenario())


def test_a_body_that_never_ends_in_time_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.bodies.UPLOAD_SECONDS", 0.02)

    async def scenario() -> None:
        bodies, first = Bodies(), Upload(b"x" * 50, b"")

        async def slowly() -> dict[str, Any]:
            message = await first()
            if not message["body"]:
                await asyncio.Event().wait()
            return message

        with pytest.raises(InvalidRequest, match="did not arrive"):
            await bodies.read({}, slowly, SMALL, Patience())
        assert bodies.held == 0

    asyncio.run(scenario())


def test_a_call_gives_its_body_back_when_it_is_over(tmp_path: Path) -> None:
    rooms = Rooms(tmp_path, ScriptedAnswer(completion()), ambient=Ambient())
    door = FrontDoor(Source(config()), rooms.gateway, Callers(NoTokens()), rooms.ambient)
    client = Client(json.dumps({"model": ALIAS, "messages": []}).encode(), headers())
    asyncio.run(client.visit(door))
    rooms.spool.close()
    assert (client.status, door.bodies.held) == (200, 0)


DEEP = b"[" * 100_000


UNREADABLE = {
    "deep model": b'{"model": ' + DEEP,
    "deep messages": b'{"model":"a","messages":' + DEEP,
    "deep lists": DEEP,
    "deep objects": b'{"a":' * 100_000,
    "not utf-8": b"\xff\xfe{}",
    "half a surrogate": b'{"model":"\xed\xa0\x80"}',
}


@pytest.mark.parametrize("path", list(ROUTES))
@pytest.mark.parametrize("body", UNREADABLE.values(), ids=UNREADABLE)
def test_body_that_cannot_be_read_is_400_and_says_why(journey: Journey, path: str, body: bytes) -> None:
    answer = journey.post(body, path=path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")


# --- heads ------------------------------------------------------------------------------------------------------------


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def exchange(port: int, *parts: bytes) -> bytes:
    """What comes back for these bytes, until the other end closes."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        try:
            for part in parts:
                connection.sendall(part)
            while received := connection.recv(65_536):
                answer += received
        except (TimeoutError, ConnectionError):
            pass
    return answer


def memory_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("admin_port", [False, True], ids=["main", "admin"])
@pytest.mark.parametrize(
    "flood",
    [b"x-h: " + b"v" * 1_000 + b"\r\n", b"v" * 1_000, b"a:b\r\n" * 200],
    ids=["many headers", "one header", "small headers"],
)
def test_flood_of_headers_ends_in_413_and_bounded_memory(stack: Stack, flood: bytes, admin_port: bool) -> None:
    replica = stack.replicas[0]
    port = port_of(replica.admin_url if admin_port else replica.url)
    before = memory_bytes(replica.pid)
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        try:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-first: ")
            for _ in range(100_000):  # 100 MB, if it were let in
                connection.sendall(flood)
        except (BrokenPipeError, ConnectionResetError):
            pass
        else:
            pytest.fail("took it all")
        with contextlib.suppress(ConnectionResetError):  # it closed while we were writing
            answer = connection.recv(65_536)
    assert not answer or (b" 413 " in answer.partition(b"\r\n")[0] and b'"code":"request_too_large"' in answer)
    assert memory_bytes(replica.pid) - before < 30_000_000


def test_head_that_is_too_large_is_told_so(stack: Stack) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
    answer = exchange(port_of(stack.replicas[0].url), head, *[b"x-h: " + b"v" * 60_000 + b"\r\n"] * 2)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"request_too_large"' in answer


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=300),
        st.tuples(
            st.sampled_from([b"GET", b"POST", b"PRI", b"\x16\x03\x01", b"G\x00T"]),
            st.sampled_from(
                [b"/", b"*", b"//x", b"/v1/models", b"/v1/chat/completions", b"/status", b"/%00", b"/\xff"]
            ),
            st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/9.9", b""]),
            st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=40)), max_size=5),
            st.binary(max_size=60),
        ).map(lambda p: b" ".join(p[:3]) + b"\r\n" + b"".join(b"%b: %b\r\n" % h for h in p[3]) + b"\r\n" + p[4]),
    ),
    st.booleans(),
)
def test_no_bytes_on_a_port_are_answered_500(stack: Stack, data: bytes, admin_port: bool) -> None:
    replica = stack.replicas[0]
    with socket.create_connection(
        ("127.0.0.1", port_of(replica.admin_url if admin_port else replica.url)), timeout=60
    ) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(4_096)
        except (TimeoutError, ConnectionError):
            answer = b""
    assert not answer.startswith(b"HTTP/1.1 5")


def test_replicas_noted_no_defect_from_all_this(stack: Stack) -> None:
    for replica in stack.replicas:
        assert "defect" not in (stack.log_dir / f"{replica.name}.log").read_text()


# --- calls, made up ---------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=12),
    lambda of: st.lists(of, max_size=4) | st.dictionaries(st.text(max_size=8), of, max_size=4),
    max_leaves=12,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]) | JSON},
    optional={"content": st.text(max_size=20) | JSON, "tool_calls": JSON, "name": JSON},
)
MEMBERS = {
    "model": st.just(ALIAS) | JSON,
    "messages": st.lists(MESSAGE, max_size=3) | JSON,
    "input": JSON,
    "stream": st.booleans() | JSON,
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": JSON}) | JSON,
    "max_tokens": st.integers(-1, 200) | JSON,
    "max_completion_tokens": JSON,
    "n": JSON,
    "tools": JSON,
    "temperature": JSON,
    "response_format": JSON,
    "service_tier": JSON,
    "user": JSON,
}
BODY = st.fixed_dictionaries({}, optional=MEMBERS).map(lambda body: json.dumps(body).encode()) | st.binary(max_size=200)
NAMES = [
    b"x-tenant-id", b"x-feature-id", b"x-user-id", b"x-user-id-hash", b"x-prompt-version", b"x-request-id",
    b"traceparent", b"x-est-tokens", b"idempotency-key", b"cache-control", b"content-type", b"content-length",
    b"x-api-key", b"authorization", b"x-gateway-edge", b"x-forwarded-tls-client-cert-info", b"cookie", b"accept",
]  # fmt: skip
HEADERS = st.lists(st.tuples(st.sampled_from(NAMES), st.binary(max_size=40)), max_size=4)


class Endless:
    """Implements `upstream.Engine`: a good answer to everything."""

    async def open(self, outgoing: Any, connect_seconds: float) -> ScriptedAnswer:
        streams = msgspec.json.decode(outgoing.body, type=dict).get("stream")
        if outgoing.url.endswith("/responses"):
            return ScriptedAnswer(streamed_response() if streams else json.dumps(whole_response()).encode())
        return ScriptedAnswer(*STREAM) if streams else ScriptedAnswer(completion())

    async def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontDoor]:
    rooms = Rooms(tmp_path_factory.mktemp("fuzz"), ambient=Ambient())
    rooms.dialogue.upstream = Endless()
    with_issuer = msgspec.structs.replace(config(), issuers={})
    yield FrontDoor(Source(with_issuer), rooms.gateway, Callers(NoTokens()), rooms.ambient)
    rooms.spool.close()


@settings(max_examples=400, deadline=None)
@example(b'{"model": "support-fast", "input": []}', [], "/v1/responses", True)
@example(b'{"model": "support-fast", "input": "a", "stream": true}', [], "/v1/responses", True)
@given(body=BODY, sent=HEADERS, path=st.sampled_from(list(ROUTES)), credential=st.booleans())
def test_no_call_is_answered_500(
    door: FrontDoor, body: bytes, sent: list[tuple[bytes, bytes]], path: str, credential: bool
) -> None:
    client = Client(body, [*sent, *(headers() if credential else [])])

    async def scenario() -> None:
        async with asyncio.timeout(60):
            await client.visit(door, path)

    asyncio.run(scenario())
    assert client.status in (200, 400, 401, 403, 404, 413), client.body
    if client.status != 200:
        error = json.loads(client.body)["error"]
        assert error["message"]
        assert error["code"]
    assert door.bodies.held == 0
