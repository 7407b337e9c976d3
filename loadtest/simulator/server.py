"""The simulator as a server: vendors and their faults under `/{vendor}/...`, admin calls under `/_sim/...`."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import msgspec

from loadtest.simulator import compatible, faults
from loadtest.simulator.anthropic import ANTHROPIC
from loadtest.simulator.azure import AZURE
from loadtest.simulator.bedrock import BEDROCK
from loadtest.simulator.content import BOOK, misheard
from loadtest.simulator.gemini import GEMINI, VERTEX
from loadtest.simulator.http import Connection, Reply, Request
from loadtest.simulator.openai import OPENAI
from loadtest.simulator.openrouter import OPENROUTER
from loadtest.simulator.shape import Problem, Shape, Stream, Unary
from loadtest.simulator.state import Grant, Vendor

# A name that is not here speaks its first word's shape (azure-eu), else OpenAI's, with faults and counts of its own.
SHAPES = {
    "openai": OPENAI,
    "anthropic": ANTHROPIC,
    "azure": AZURE,
    "bedrock": BEDROCK,
    "gemini": GEMINI,
    "vertex": VERTEX,
    "openrouter": OPENROUTER,
    **compatible.SHAPES,
}

_VENDOR_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_BATCH_EVENTS = 64
_COMMENT_SECONDS = 1.0
_NOT_JSON = b'data: {"id": "chatcmpl-malformed", "choices": [{"delta": {"cont\n\n'


class Simulator:
    """All vendors behind one port. `api_key` is the only key accepted; None accepts any that is not `bad-…`.

    `latency_ms` is waited before every vendor answer, as real vendors never answer at once.
    """

    def __init__(self, api_key: str | None = None, latency_ms: float = 0) -> None:
        self._api_key = api_key
        self._latency_seconds = latency_ms / 1000
        self._vendors: dict[str, Vendor] = {}
        self._grant: Grant | None = None
        self._connections: set[Connection] = set()

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Listen, and return the base URL. Port 0 takes a free one."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(self.answer, self._connections), host, port, backlog=1024
        )
        return f"http://{host}:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Stop at once: open answers are cut."""
        self._server.close()
        for connection in list(self._connections):
            connection.abort()
        await self._server.wait_closed()

    async def answer(self, request: Request, reply: Reply) -> None:
        """Answer one request of any kind."""
        first, _, rest = request.path.removeprefix("/").partition("/")
        if first == "_sim":
            status, document = self._admin(request, rest)
            reply.send(status, [("content-type", "application/json")], msgspec.json.encode(document))
        elif not _VENDOR_NAME.fullmatch(first):
            reply.send(404, [("content-type", "text/plain")], b"Ask for /{vendor}/v1/..., or /_sim/counts.")
        else:
            vendor = self._vendors.get(first) or self._vendors.setdefault(first, Vendor(self._grant))
            request = msgspec.structs.replace(request, path="/" + rest)
            with vendor.call(request, reply):
                shape = SHAPES.get(first) or SHAPES.get(re.split("[-_]", first)[0], OPENAI)
                await self._answer_as(vendor, shape, request, reply)

    async def _answer_as(self, vendor: Vendor, shape: Shape, request: Request, reply: Reply) -> None:
        if self._latency_seconds:
            await asyncio.sleep(self._latency_seconds)
        problem = shape.authorize(request, self._api_key)
        if problem is not None:
            return _send(reply, shape.error(problem))
        # Where tokens come from is another service: faults are of those who take them.
        fault = None if request.path == "/token" else vendor.faults.take(shape.model(request))
        replaced = vendor.faults.replaced
        refusal = _refusal(shape, fault)
        if refusal is not None or isinstance(fault, faults.Reset | faults.Hang):
            await asyncio.sleep(fault.latency_ms / 1000)
            if refusal is not None:
                return _send(reply, refusal)
            if isinstance(fault, faults.Reset):
                return reply.reset()
            await asyncio.Event().wait()
        if isinstance(fault, faults.Wrong):
            request = msgspec.structs.replace(request, body=misheard(request.body))
        if not vendor.admits():
            return _send(reply, _throttled(shape, faults.Throttle()))
        answer = shape.answer(request, vendor.quota())
        vendor.spend(answer.tokens)
        latency_ms = answer.latency_ms + (fault.latency_ms if fault else 0)
        if isinstance(answer, Stream):
            vendor.stream_begins()
            await _send_stream(reply, answer, fault, latency_ms / 1000, replaced)
            return None
        if latency_ms:
            await asyncio.sleep(latency_ms / 1000)
        if answer.status != 200:
            return _send(reply, answer)
        return await _send_unary(reply, shape, answer, fault)

    def _admin(self, request: Request, path: str) -> tuple[int, Any]:
        """Status and JSON document of an admin call."""
        match request.method, path.rstrip("/").split("/"):
            case "GET", ["health"]:
                return 200, {"status": "ok"}
            case "GET", ["faults"]:
                return 200, {name: vendor.faults.listing() for name, vendor in sorted(self._vendors.items())}
            case "PUT", ["faults", name] if _VENDOR_NAME.fullmatch(name):
                try:
                    wanted = faults.decode(request.body)
                except faults.BadFault as error:
                    return 400, {"error": str(error)}
                vendor = self._vendors.setdefault(name, Vendor(self._grant))
                vendor.faults.put(wanted)
                return 200, {name: vendor.faults.listing()}
            case "DELETE", ["faults", *names]:
                for vendor in self._chosen(names):
                    vendor.faults.put([])
                return 200, {}
            case "PUT", ["grants"]:
                try:
                    self._grant = msgspec.json.decode(request.body, type=Grant)
                except msgspec.DecodeError as error:
                    return 400, {"error": f"The grant cannot be read: {error}."}
                for vendor in self._vendors.values():
                    vendor.grant(self._grant)
                return 200, msgspec.to_builtins(self._grant)
            case "DELETE", ["grants"]:
                self._grant = None
                for vendor in self._vendors.values():
                    vendor.grant(None)
                return 200, {}
            case "PUT", ["answers"]:
                try:
                    told = msgspec.json.decode(request.body, type=dict[str, str])
                except msgspec.DecodeError as error:
                    return 400, {"error": f"The answers cannot be read: {error}."}
                BOOK.update(told)
                return 200, {"answers": len(BOOK)}
            case "DELETE", ["answers"]:
                BOOK.clear()
                return 200, {}
            case "GET", ["counts"]:
                return 200, {name: vendor.counts() for name, vendor in sorted(self._vendors.items())}
            case "GET", ["requests"]:
                wanted_name = request.query.get("vendor")
                kept = [
                    entry
                    for name, vendor in self._vendors.items()
                    if wanted_name in (None, name)
                    for entry in vendor.requests(name)
                ]
                return 200, sorted(kept, key=lambda entry: entry["received_ms"])
            case "DELETE", ["requests"]:
                for vendor in self._vendors.values():
                    vendor.reset()
                return 200, {}
        return 404, {"error": f"There is no admin call {request.method} /_sim/{path}."}

    def _chosen(self, names: list[str]) -> list[Vendor]:
        if not names:
            return list(self._vendors.values())
        return [self._vendors[name] for name in names if name in self._vendors]


def _refusal(shape: Shape, fault: Any) -> Unary | None:
    """The answer of a fault that is a whole error answer."""
    if isinstance(fault, faults.Throttle):
        return _throttled(shape, fault)
    if isinstance(fault, faults.Status):
        if fault.body is not None:
            return Unary(fault.status, [("content-type", fault.content_type)], fault.body.encode())
        kind = fault.type or ("server_error" if fault.status >= 500 else "invalid_request_error")
        return shape.error(Problem(fault.status, fault.message, type=kind, code=fault.code))
    return None


def _throttled(shape: Shape, fault: faults.Throttle) -> Unary:
    headers = []
    if fault.retry_after_seconds is not None:
        headers.append(("retry-after", f"{fault.retry_after_seconds:g}"))
    if fault.retry_after_ms is not None:
        headers.append(("retry-after-ms", str(fault.retry_after_ms)))
    spent = fault.code == "insufficient_quota"
    return shape.error(
        Problem(
            429,
            "Your account has no money left." if spent else "Too many requests a minute for this model: wait.",
            type=fault.code if spent else "requests",
            code=fault.code,
            headers=headers,
        )
    )


def _send(reply: Reply, answer: Unary) -> None:
    reply.send(answer.status, answer.headers, answer.body)


async def _send_unary(reply: Reply, shape: Shape, answer: Unary, fault: Any) -> None:
    match fault:
        case faults.Stall() | faults.Cut():
            reply.start(200, answer.headers, len(answer.body))
            reply.write(answer.body[: len(answer.body) // 2])
            if isinstance(fault, faults.Cut):
                return reply.cut()
            await asyncio.Event().wait()
        case faults.Malformed():
            return reply.send(200, answer.headers, answer.body[: len(answer.body) // 2])
        case faults.ErrorEvent():
            problem = Problem(200, fault.message, type="server_error", code=fault.code)
            return reply.send(200, answer.headers, shape.error(problem).body)
        case faults.Empty():
            return reply.send(200, answer.headers, b"")
    return _send(reply, answer)


async def _send_stream(
    reply: Reply, stream: Stream, fault: Any, latency_seconds: float, replaced: asyncio.Event
) -> None:
    if stream.comment:
        # This vendor opens its stream at once, and says until the first event that it is working.
        reply.start(200, stream.headers)
        await reply.chunks([stream.comment])
        while latency_seconds > 0:
            await asyncio.sleep(min(latency_seconds, _COMMENT_SECONDS))
            latency_seconds -= _COMMENT_SECONDS
            await reply.chunks([stream.comment])
    else:
        if latency_seconds:
            await asyncio.sleep(latency_seconds)
        reply.start(200, stream.headers)
    chunk_ms = stream.chunk_ms if fault is None or fault.chunk_ms is None else fault.chunk_ms
    if isinstance(fault, faults.Hold):
        await reply.chunks(list(islice(stream.events, fault.after_chunks)))
        await replaced.wait()
    events = _events(stream, fault)
    if chunk_ms:
        await _paced(reply, events, chunk_ms / 1000)
    else:
        while batch := list(islice(events, _BATCH_EVENTS)):
            await reply.chunks(batch)
            await asyncio.sleep(0)
    if isinstance(fault, faults.Stall):
        await asyncio.Event().wait()
    if isinstance(fault, faults.Cut):
        return reply.cut()
    return reply.finish()


async def _paced(reply: Reply, events: Iterator[bytes], interval_seconds: float) -> None:
    """Send one event an interval, on a schedule that does not drift; a late one is not made up for by a burst."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    for event in events:
        await asyncio.sleep(max(0.0, due - loop.time()))
        await reply.chunks([event])
        due = max(due + interval_seconds, loop.time())


def _events(stream: Stream, fault: Any) -> Iterator[bytes]:
    """What of the stream is sent, as the fault has it."""
    match fault:
        case faults.Stall() | faults.Cut():
            return islice(stream.events, fault.after_chunks)
        case faults.Malformed():
            return chain(islice(stream.events, fault.after_chunks), [_NOT_JSON], stream.events)
        case faults.ErrorEvent():
            return chain(islice(stream.events, fault.after_chunks), [stream.error_event(fault.message, fault.code)])
        case faults.Empty():
            return iter(deque(stream.events, maxlen=1) if fault.done else ())
    return stream.events
