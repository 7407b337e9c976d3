"""The front door: HTTP in, `Call` made, the reply sent by our own loop, hang-ups noticed."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import msgspec
from litestar import Litestar, MediaType, Request, Response, get
from litestar.exceptions import HTTPException
from litestar.handlers import HTTPRouteHandler
from litestar.plugins import PluginProtocol
from litestar.types import ASGIApp

from app import openapi
from app.ambient import Ambient, timestamp
from app.answer_headers import retry_headers
from app.auth import Callers, allow, allowed, authorize, header_map, scope_headers
from app.bodies import Bodies
from app.cache import wishes
from app.config import NAME, Config, ConfigSource, ServiceKey, Tenant
from app.content import Content, Kept
from app.core import Call, Cut, Dialect, Exchange, Reply
from app.dialects import BELOW, ROUTES, named, words_for
from app.errors import (
    Draining,
    GatewayError,
    InternalError,
    InvalidApiKey,
    InvalidRequest,
    IssuerUnavailable,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    RequestTooLarge,
    TenantNotAllowed,
)
from app.gateway import Gateway
from app.visits import Handler, Visit

log = logging.getLogger("gateway")

STALLED_SECONDS = 30.0
"""A call that is not over so long after the longest deadline has a client that does not read: it is ended."""
ONE_PIECE_BYTES = 16_384
"""A larger answer may reach Traefik in pieces, between which it cuts one now and then that began at once (of 100 KB one
in 3,000 to 20,000): Go's server closes a request's body when the answer begins, while Go's client may still look for
the body's end (traefik issue 11767, golang/go issue 40747). One write of so few bytes was never cut, however soon."""
LARGE_SECONDS = 0.01
"""So long after its request came such a large answer begins at the earliest; 3 ms were enough. Vendors take longer."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_USER_HASH = re.compile(r"[A-Za-z0-9:._-]{1,128}")
_VERSION = re.compile(r"[\x20-\x7e]{1,128}")
_NAMES = {
    b"x-feature-id": ("feature_id", NAME, "X-Feature-Id"),
    b"x-user-id-hash": ("user_id_hash", _USER_HASH, "X-User-Id-Hash"),
    b"x-prompt-version": ("prompt_version", _VERSION, "X-Prompt-Version"),
}
"""By name the member of a call, what it must match, and the name as a refusal has it."""
_TOLD = frozenset({*_NAMES, b"x-user-id", b"x-est-tokens"})
_OF_SOME = _TOLD | wishes.HEADERS | {b"traceparent"}
"""What not every call says."""
_TRACESTATE = re.compile(r"[\x20-\x7e]{1,512}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class FrontDoor:
    """Reception and departure. `in_flight` holds every call that is being served, by its task."""

    def __init__(self, source: ConfigSource, gateway: Gateway, callers: Callers, ambient: Ambient) -> None:
        self.source = source
        self.callers = callers
        self.gateway = gateway
        self.ambient = ambient
        self.in_flight: dict[asyncio.Task[None], Exchange] = {}
        self.bodies = Bodies()
        self.draining = False
        self.content: Content | None = None
        """Where content of tenants that asked for it goes; None: nowhere."""

    async def serve(self, dialect: Dialect, visit: Visit) -> None:
        """A call to a route of `dialects.ROUTES`, from the first byte in to the last byte out.

        A hang-up or the drain's limit cancels the visit's task; `exchange.cut` says which.
        """
        exchange = await self._received(dialect, visit)
        if exchange is None:
            return
        task, call = visit.task, exchange.call
        self.in_flight[task] = exchange
        kept = None if self.content is None else Kept()
        visit.on_hang_up = hang_up = partial(_cut, exchange, task, "client_closed")
        if visit.gone:
            hang_up()
        visit.patience.last(
            call.config.settings.longest_seconds + STALLED_SECONDS, partial(_cut, exchange, task, "deadline")
        )
        try:
            await self.gateway.serve(exchange, partial(self._depart, exchange, visit, kept))
        except asyncio.CancelledError:
            if exchange.cut is None:
                raise
            task.uncancel()
            if exchange.cut == "drain":
                self._send_drained(exchange, visit)
        except Exception:
            log.exception("defect in a call", extra=call.named)
            error = InternalError("The gateway has a defect; its log has it under this request id.")
            if not visit.started:
                self._refuse(visit, call.dialect, error, call.request_id)
            elif exchange.request is not None and exchange.request.stream:
                visit.write(call.dialect.error_frames(error, call.request_id, exchange.sent))
        finally:
            visit.on_hang_up = exchange.send = None
            del self.in_flight[task]
            self.bodies.held -= len(call.body)
            if kept is not None and kept.size:
                self.content.take(exchange, kept)

    async def serve_below(self, path: bytes, dialect: Dialect, visit: Visit) -> None:
        """The same to a path below `path`, of `dialects.BELOW`."""
        target, _, query = visit.target.partition(b"?")
        name = target.partition(path)[2].decode("latin-1")
        await self.serve(named(dialect, visit.method, name, query.decode("latin-1")), visit)

    async def _received(self, dialect: Dialect, visit: Visit) -> Exchange | None:
        """The call, its body counted in `bodies`; None where it is none, or over already. Waits where it has to."""
        received_at = self.ambient.now()
        config = self.source.current
        headers = header_map(visit.raw_headers)
        if visit.method not in dialect.methods:
            self._refuse(visit, dialect, MethodNotAllowed(f"This route takes {' and '.join(dialect.methods)}."))
            return None
        try:
            key = self.callers.known(config, headers, received_at)
            if key is None:  # a token that is new to this replica
                key = await self.callers.verified(config, headers, received_at)
        except (InvalidApiKey, IssuerUnavailable) as error:
            self.gateway.telemetry.unidentified(error)
            self._refuse(visit, dialect, error)
            return None
        fault: GatewayError | None = None
        body: bytes | None = b""
        try:
            if (whole := visit.at_once()) is not None:
                body = self.bodies.take(whole, config.settings)
            else:
                body = await self.bodies.read(headers, visit.receive, config.settings, visit.patience)
        except GatewayError as error:
            fault = error
        started = self.ambient.monotonic()  # the upload was the client's time
        call = self._call(config, key, dialect, headers, body or b"", fault, started, received_at)
        exchange = Exchange(call=call, patience=visit.patience)
        if body is None:
            exchange.cut = "client_closed"
            self.gateway.close(exchange)
            return None
        return exchange

    async def _depart(self, exchange: Exchange, visit: Visit, kept: Kept | None, reply: Reply) -> None:
        """Sends a reply as fast as it comes and the client reads."""
        if kept is not None and (exchange.tenant is None or not exchange.tenant.capture_content):
            kept = None
        if self.draining or isinstance(exchange.call.fault, RequestTooLarge | Overloaded):
            visit.keep_alive = False
        if reply.frames is None:
            if len(reply.first) > ONE_PIECE_BYTES:
                wait = visit.came_at + LARGE_SECONDS - self.ambient.monotonic()
                if wait > 0:
                    await self.ambient.sleep(wait)
            if kept is not None:
                kept.add(reply.first)
            visit.whole(reply.status, reply.head, reply.first)
            return
        visit.start(reply.status, reply.head)
        exchange.send = send = partial(_send, exchange, visit, kept)
        async with aclosing(reply.frames) as frames:
            async for frame in frames:
                if not send(frame):
                    await visit.drained()
        visit.end()

    def _send_drained(self, exchange: Exchange, visit: Visit) -> None:
        """What a call gets that the drain's limit cut: an error event in a stream, else an error."""
        error = Draining("This gateway replica stops. Send the request again.", retry_after_seconds=1.0)
        if not visit.started:
            self._refuse(visit, exchange.call.dialect, error, exchange.call.request_id)
        elif exchange.event is None or exchange.event.stream:
            visit.write(exchange.call.dialect.error_frames(error, exchange.call.request_id, exchange.sent))
            visit.end()

    def cut(self, why: Cut) -> int:
        """Ends every call in flight that has no row yet; returns how many."""
        cut = 0
        for task, exchange in self.in_flight.items():
            cut += _cut(exchange, task, why)
        return cut

    def _call(
        self,
        config: Config,
        key: ServiceKey,
        dialect: Dialect,
        headers: Mapping[bytes, str],
        body: bytes,
        fault: GatewayError | None,
        started: float,
        received_at: float,
    ) -> Call:
        """The call, with what its headers say. A header that cannot be used is a fault, never dropped in silence.

        It is made of what every call has; what only some have is put in where there is any.
        """
        event_id = self.ambient.event_id(received_at)
        request_id = headers.get(b"x-request-id")
        if request_id is None or not _REQUEST_ID.fullmatch(request_id):
            request_id = "req_" + event_id.replace("-", "")
        more: dict[str, Any] = {}
        parent: re.Match[str] | None = None
        says_more = not _OF_SOME.isdisjoint(headers)
        if says_more:
            more, wrong = _told(headers, config)
            fault = fault or wrong
            parent = _TRACEPARENT.fullmatch(headers.get(b"traceparent", ""))
        if dialect.relayed:
            relayed, wrong = _relayed(headers, dialect)
            fault = fault or wrong
            if relayed:
                more["relayed"] = relayed
        if says_more and not wishes.HEADERS.isdisjoint(headers):
            try:
                more["wishes"] = wishes.read(headers)
            except InvalidRequest as error:
                fault = fault or error
        if config.routing_headers:
            more["metadata"] = _picked(headers, config.routing_headers)
        if parent is not None:
            more |= {"parent_span_id": int(parent[2], 16) or None, "trace_state": _trace_state(headers)}
        call = Call(
            event_id=event_id,
            request_id=request_id,
            received_at=received_at,
            occurred_at=timestamp(received_at),
            started=started,
            config=config,
            key=key,
            dialect=dialect,
            body=body,
            fault=fault,
            tenant_claimed=(headers.get(b"x-tenant-id") or "")[:128] or None,
            trace_id=parent[1] if parent and parent[1].strip("0") else self.ambient.trace_id(),
            sampled=(
                bool(int(parent[3], 16) & 1) if parent else self.ambient.random() < config.settings.trace_sample_ratio
            ),
        )
        return msgspec.structs.replace(call, **more) if more else call

    def _refuse(self, visit: Visit, dialect: Dialect, error: GatewayError, request_id: str | None = None) -> None:
        """An error outside a call's journey."""
        request_id = request_id or "req_" + self.ambient.event_id(self.ambient.now()).replace("-", "")
        body = dialect.error_body(error, request_id)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            *[(name, request_id.encode()) for name in dialect.id_headers],
            *retry_headers(error, error.status),
        ]
        visit.whole(error.status, headers, body)


def _send(exchange: Exchange, visit: Visit, kept: Kept | None, frames: bytes) -> bool:
    """Sends frames of a stream. Whether there is room for more: else the client has to read first."""
    visit.write(frames)
    if frames.find(b"data:") != -1:  # a keep-alive has no number that an error could follow
        exchange.sent = frames
    if kept is not None:
        kept.add(frames)
    return not visit.blocked


def _told(headers: Mapping[bytes, str], config: Config) -> tuple[dict[str, Any], InvalidRequest | None]:
    """What a call's own headers say, as members of `Call`, and what of it cannot be used."""
    said: dict[str, Any] = {}
    fault: InvalidRequest | None = None
    for name, (member, pattern, written) in _NAMES.items():
        if value := headers.get(name):
            if pattern.fullmatch(value):
                said[member] = value
            else:
                fault = fault or _unusable(written, pattern)
    hint = headers.get(b"x-est-tokens") or "0"
    if not (hint.isascii() and hint.isdigit() and len(hint) < 10):
        fault = fault or InvalidRequest("X-Est-Tokens must be a whole number of tokens.", param="X-Est-Tokens")
        hint = "0"
    if tokens := int(hint):
        said["tokens_hint"] = tokens
    if (user := headers.get(b"x-user-id")) and not headers.get(b"x-user-id-hash"):
        salt = config.settings.user_id_salt.reveal()
        said["user_id_hash"] = "sha256:" + hashlib.sha256(f"{salt}:{user}".encode()).hexdigest()
    return said, fault


def _relayed(
    headers: Mapping[bytes, str], dialect: Dialect
) -> tuple[tuple[tuple[str, str], ...], InvalidRequest | None]:
    """Those of its headers that a vendor of the same dialect gets too, and what of them cannot be used."""
    relayed = []
    fault: InvalidRequest | None = None
    for name, pattern in dialect.relayed.items():
        if value := headers.get(name):
            relayed.append((name.decode(), value))
            if not pattern.fullmatch(value):
                fault = fault or _unusable(name.decode(), pattern)
    return tuple(relayed), fault


def _unusable(name: str, pattern: re.Pattern[str]) -> InvalidRequest:
    return InvalidRequest(f"{name} must match {pattern.pattern}.", param=name)


def _trace_state(headers: Mapping[bytes, str]) -> str | None:
    """Other systems' part of the trace context: carried on as it came, where it can stand in a header."""
    state = headers.get(b"tracestate")
    return state if state is not None and _TRACESTATE.fullmatch(state) else None


def _picked(headers: Mapping[bytes, str], names: frozenset[bytes]) -> dict[bytes, str]:
    return {name: headers[name] for name in names if name in headers}


def _cut(exchange: Exchange, task: asyncio.Task[None], why: Cut) -> bool:
    """Ends a call, unless its row is written already, another has ended it, or others listen to its answer.

    Past the deadline the row is no reason to stay: the client does not read the end of its answer.
    """
    if exchange.cut is not None or (exchange.event is not None and why != "deadline"):
        return False
    if why == "client_closed" and exchange.memory is not None:
        flight = exchange.memory.flight
        if flight is not None and flight.hold(partial(_cut, exchange, task, why)):
            exchange.left = True
            return False
    exchange.cut = why
    task.cancel()
    return True


def calls(door: FrontDoor) -> dict[bytes, Handler]:
    """The routes of calls, by path. They are met before Litestar, whose part would be a fifth of their time."""
    exactly = {path.encode(): partial(door.serve, dialect) for path, dialect in ROUTES.items()}
    below = {path.encode(): partial(door.serve_below, path.encode(), dialect) for path, dialect in BELOW.items()}
    return exactly | below


class Routes(Litestar):
    """Without what Litestar adds for models that none of ours is: pydantic, where it is installed, took 10 MB."""

    @staticmethod
    def _get_default_plugins(plugins: list[PluginProtocol]) -> list[PluginProtocol]:
        return plugins


def app(door: FrontDoor, more: Sequence[HTTPRouteHandler] = ()) -> ASGIApp:
    """The other routes of the main port, with `more` of other doors."""

    async def visitor(request: Request) -> tuple[Config, Tenant, dict[str, str]]:
        """The configuration, on whose behalf it is asked, and what the answer says of that tenant's limits."""
        config, now = door.source.current, door.ambient.now()
        headers = scope_headers(request.scope["headers"])
        try:
            key = await door.callers.identify(config, headers, now)
        except (InvalidApiKey, IssuerUnavailable) as error:
            door.gateway.telemetry.unidentified(error)
            raise
        try:
            tenant = authorize(config, key, headers.get(b"x-tenant-id"))
        except TenantNotAllowed:
            door.gateway.telemetry.audit(key.id, "tenant.forge", tenant=headers.get(b"x-tenant-id", "")[:128])
            raise
        rates = await door.gateway.limits.look(config, tenant, key)
        told = words_for(request.headers).rate_headers(rates, now).decode() if rates else ""
        return config, tenant, dict(line.split(": ", 1) for line in told.splitlines())

    @get("/v1/models", media_type=MediaType.JSON)
    async def models(request: Request) -> Response:
        """The aliases that the tenant may use, in the client's shape."""
        config, tenant, told = await visitor(request)
        listed = words_for(request.headers).models(allowed(config, tenant))
        return Response(listed, media_type=MediaType.JSON, headers=told)

    @get("/v1/models/{name:str}", media_type=MediaType.JSON)
    async def model(request: Request) -> Response:
        """One of them."""
        config, tenant, told = await visitor(request)
        alias = allow(config, tenant, request.path_params["name"])
        return Response(words_for(request.headers).model(alias.name), media_type=MediaType.JSON, headers=told)

    @get(["/health", "/health/live", "/health/liveliness"], media_type=MediaType.TEXT, sync_to_thread=False)
    def health() -> str:
        """Alive: touches no dependency."""
        return "ok"

    @get(["/health/ready", "/health/readiness"], media_type=MediaType.TEXT, sync_to_thread=False)
    def ready() -> Response[str]:
        """False while draining. A replica without a valid configuration does not start."""
        if door.draining:
            return Response("draining", status_code=503)
        return Response("ok")

    described = msgspec.json.encode(openapi.document())

    @get("/schema", media_type=MediaType.JSON, sync_to_thread=False)
    def schema() -> Response[bytes]:
        """What the routes are, for machines."""
        return Response(described, media_type=MediaType.JSON)

    return Routes(
        [models, model, health, ready, schema, *more],
        exception_handlers={GatewayError: answer_error, HTTPException: answer_http_error, Exception: _defect},
        openapi_config=None,
        logging_config=None,
    )


def answer_error(request: Request, error: GatewayError) -> Response:
    """An error of a route that takes no call, in the words of the client."""
    request_id = request.headers.get("x-request-id", "")
    return Response(
        words_for(request.headers).error_body(error, request_id if _REQUEST_ID.fullmatch(request_id) else None),
        status_code=error.status,
        media_type=MediaType.JSON,
        headers={name.decode(): value.decode() for name, value in retry_headers(error, error.status)},
    )


def answer_http_error(request: Request, error: HTTPException) -> Response:
    if error.status_code == 404:
        return answer_error(request, NotFound(f"There is no route {request.url.path}.{_meant(request.url.path)}"))
    if error.status_code == 405:
        return answer_error(request, MethodNotAllowed(f"{request.url.path} does not take {request.method}."))
    if error.status_code == 413:
        return answer_error(request, RequestTooLarge("The body is larger than this route takes."))
    return answer_error(request, InvalidRequest("The request cannot be read."))


def _meant(path: str) -> str:
    """What to mend where a client's base URL is wrong: OpenAI's clients want /v1 at its end, Anthropic's add it."""
    if path.startswith("/v1/v1/"):
        return " The client adds /v1 itself: its base URL ends without."
    if f"/v1{path}" in ROUTES or path == "/models":
        return f" There is /v1{path}: end the client's base URL with /v1."
    return ""


def _defect(request: Request, error: Exception) -> Response:
    log.error("defect in %s", request.url.path, exc_info=error)
    return answer_error(request, InternalError("The gateway has a defect; its log has the traceback."))
