"""Guardrails: services of your own that are asked about a call's prompt before, and about its answer after a model.

One POST a check, and the text stays where it is until the answer says `allow`. A stream is checked a piece at a time,
at the end of a sentence or at a size, and every piece is held back until it has passed.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec import Struct

from app.ambient import Ambient
from app.config import Alias, Guardrail, Tenant
from app.core import Call, Exchange
from app.errors import GuardrailBlocked, GuardrailUnavailable, InvalidRequest, VendorBroke
from app.sse import DONE, FrameSplitter, data_of
from app.wire import Request

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

Stage = Literal["input", "output"]
Outcome = Literal["allowed", "blocked", "away"]

CONTEXT_CHARACTERS = 1000
"""How much of what has passed goes with a stream's next piece: what is wrong may begin in one and end in the other."""
SENTENCE_CHARACTERS = 40
"""A piece that is shorter waits for the next end of a sentence: "No." is not worth a question."""
MAX_ANSWER_BYTES = 65_536
MAX_REASON_CHARACTERS = 200
FAILURES = 3
REST_SECONDS = 5.0
"""After so many failures in a row a guardrail is not asked for so long: its policy holds at once, nobody waits."""
_SENTENCE_END = re.compile(r"[.!?\u2026][\"'\u2019\u201d)\]]*\s|[\u3002\uff01\uff1f\n]")
_NO_TEXT = frozenset(
    {
        *("id", "type", "role", "object", "index", "call_id", "tool_call_id", "tool_use_id", "item_id", "model"),
        *("signature", "encrypted_content", "data", "b64_json", "status", "finish_reason", "media_type", "format"),
    }
)
"""Members whose strings nobody reads: names of things, and bytes in base64."""
_UNSAID = frozenset({"embeddings", "count_tokens", "moderations", "speech", "delete"})
"""Operations whose answers are numbers or sound, or say nothing."""
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError, AttributeError)
_decode = msgspec.json.decode


class _Verdict(Struct, frozen=True):
    action: Literal["allow", "block"]
    reason: str = ""


class Guardrails:
    """Asks. `on_checked` is told each check's guardrail, stage and outcome."""

    def __init__(
        self,
        open_client: Callable[[], httpx.AsyncClient],
        on_checked: Callable[[str, Stage, Outcome], None],
        ambient: Ambient,
    ) -> None:
        self._open_client = open_client
        self._client: httpx.AsyncClient | None = None
        self._on_checked = on_checked
        self._ambient = ambient
        self._failures: dict[str, int] = {}
        self._rests_until: dict[str, float] = {}

    def over(self, exchange: Exchange, alias: Alias, tenant: Tenant) -> Guarding:
        """What checks one call, the alias's guardrails before the tenant's."""
        return Guarding(self, exchange, tuple(dict.fromkeys((*alias.guardrails, *tenant.guardrails))))

    async def check(self, guardrail: Guardrail, stage: Stage, question: dict[str, Any], call: Call) -> None:
        """Raises GuardrailBlocked, and GuardrailUnavailable where it does not answer and must."""
        verdict = await self._verdict(guardrail, question, call)
        if verdict is None:
            self._on_checked(guardrail.name, stage, "away")
            if guardrail.fails_open:
                return
            raise GuardrailUnavailable(
                f"The guardrail {guardrail.name!r} does not answer, and nothing passes without it. Try again later."
            )
        if verdict.action == "block":
            self._on_checked(guardrail.name, stage, "blocked")
            log.warning("guardrail %s blocked the %s of a call", guardrail.name, stage, extra=call.named)
            what = "request" if stage == "input" else "answer"
            reason = "".join(c for c in verdict.reason[:MAX_REASON_CHARACTERS] if c.isprintable())
            raise GuardrailBlocked(f"The guardrail {guardrail.name!r} blocked this {what}{reason and ': ' + reason}")
        self._on_checked(guardrail.name, stage, "allowed")

    async def _verdict(self, guardrail: Guardrail, question: dict[str, Any], call: Call) -> _Verdict | None:
        """None where there is no answer that can be read in time."""
        import httpx

        name = guardrail.name
        if self._rests_until.get(name, 0.0) > self._ambient.monotonic():
            return None
        try:
            async with asyncio.timeout(guardrail.timeout_seconds):
                verdict = await self._ask(guardrail, question)
        except (httpx.HTTPError, httpx.InvalidURL, msgspec.DecodeError, ValueError, TimeoutError) as error:
            log.error("guardrail %s gave no answer (%s)", name, type(error).__name__, extra=call.named)
            self._failures[name] = failures = self._failures.get(name, 0) + 1
            if failures >= FAILURES:
                self._rests_until[name] = self._ambient.monotonic() + REST_SECONDS
            return None
        self._failures.pop(name, None)
        return verdict

    async def _ask(self, guardrail: Guardrail, question: dict[str, Any]) -> _Verdict:
        if self._client is None:
            self._client = self._open_client()
        headers = {"content-type": "application/json"}
        if guardrail.token is not None:
            headers["authorization"] = f"Bearer {guardrail.token.reveal()}"
        content = msgspec.json.encode(question)
        async with self._client.stream("POST", guardrail.url, content=content, headers=headers) as answer:
            if answer.status_code != 200:
                raise ValueError(f"status {answer.status_code}")
            body = b""
            async for part in answer.aiter_bytes():
                body += part
                if len(body) > MAX_ANSWER_BYTES:
                    raise ValueError("too large")
        return _decode(body, type=_Verdict)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()


def client() -> httpx.AsyncClient:
    """The address is the configuration's, so no redirect leads elsewhere. Each check has its own deadline."""
    import httpx

    return httpx.AsyncClient(follow_redirects=False, timeout=None)


class Guarding:
    """The guardrails of one call, and what of its stream is held back for them."""

    def __init__(self, room: Guardrails, exchange: Exchange, guardrails: tuple[Guardrail, ...]) -> None:
        self._room = room
        self._exchange = exchange
        self._before = [guardrail for guardrail in guardrails if "input" in guardrail.checks]
        self._after = [guardrail for guardrail in guardrails if "output" in guardrail.checks]
        self._held: list[bytes] = []
        self._said: dict[int, str] = {}
        self._context = ""
        self._new = ""
        self._piece = min((guardrail.segment_characters for guardrail in self._after), default=0)

    @property
    def holds_streams(self) -> bool:
        return bool(self._after)

    async def prompt(self) -> None:
        """Asks about what the client sent. Raises GuardrailBlocked, GuardrailUnavailable, InvalidRequest."""
        if self._before:
            text = "\n".join(prompt_text(self._exchange.request))
            if text or not self._exchange.request.stored:
                await self._check(self._before, "input", text, final=True)

    async def answer(self, body: bytes) -> None:
        """Asks about a whole answer. Raises GuardrailBlocked, GuardrailUnavailable, and VendorBroke for no JSON."""
        if self._after and self._exchange.request.operation not in _UNSAID:
            await self._check(self._after, "output", "\n".join(answer_text(body)), final=True)

    async def passed(self, frames: bytes, done: bool) -> bytes:
        """Takes a stream's next frames; gives those back that have been checked.

        Raises GuardrailBlocked, GuardrailUnavailable, and VendorBroke for what cannot be read.
        """
        if frames:
            self._held.append(frames)
            for index, text in frame_texts(self._exchange.call.dialect.name, frames):
                self._said[index] = self._said.get(index, "") + text
                self._new = (self._new + text)[-len(text) - 4 :]
        size = sum(map(len, self._said.values()))
        ends = size >= SENTENCE_CHARACTERS and _SENTENCE_END.search(self._new) is not None
        if not (done or ends or size >= self._piece):
            return b""
        if size:
            text = "\n".join(self._said.values())
            await self._check(self._after, "output", text, final=done)
            self._context = (self._context + text)[-CONTEXT_CHARACTERS:]
            self._said.clear()
            self._new = ""
        out, self._held = b"".join(self._held), []
        return out

    async def _check(self, guardrails: list[Guardrail], stage: Stage, text: str, *, final: bool) -> None:
        call, exchange = self._exchange.call, self._exchange
        question = {
            "stage": stage,
            "text": text,
            "context": self._context,
            "final": final,
            "request_id": call.request_id,
            "tenant_id": exchange.tenant.id,
            "feature_id": call.feature_id,
            "user_id_hash": call.user_id_hash,
            "model_alias": exchange.request.alias,
            "environment": call.config.environment,
        }
        for guardrail in guardrails:
            await self._room.check(guardrail, stage, question, call)


# --- text in JSON of any dialect --------------------------------------------------------------------------------------


def strings(value: Any) -> Iterator[str]:
    """Every string that a person or a model may read, in order: vendors add members, so names say only what is none."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            if value and not value.startswith("data:"):
                yield value
        elif isinstance(value, list):
            waiting += reversed(value)
        elif isinstance(value, dict):
            waiting += reversed([inner for name, inner in value.items() if name not in _NO_TEXT])


def prompt_text(request: Request) -> Iterator[str]:
    """The text of what the client sent: of a form the fields, of files nothing. Raises InvalidRequest."""
    if form := getattr(request, "form", ()):
        return (field.value.decode("utf-8", "replace") for field in form if not field.file_name)
    try:
        return strings(_decode(request.body))
    except _UNREADABLE:
        raise InvalidRequest("The body cannot be read as a whole, so that no guardrail can judge it.") from None


def answer_text(body: bytes) -> Iterator[str]:
    """The text of a whole answer: `choices` of completions, `content` of Messages, `output` of Responses, else all.

    What is no JSON is a transcript as text. Raises VendorBroke.
    """
    try:
        if not body.lstrip().startswith((b"{", b"[")):
            return iter([body.decode()])
        whole = _decode(body)
        if "choices" in whole:
            parts = [[choice.get("message"), choice.get("text")] for choice in whole["choices"]]
        else:
            parts = [whole[name] for name in ("content", "output") if name in whole] or [whole]
    except _UNREADABLE:
        raise VendorBroke("the answer cannot be read, so that no guardrail can judge it") from None
    return strings(parts)


def frame_texts(dialect: str, frames: bytes) -> Iterator[tuple[int, str]]:
    """What a stream's frames add, by the choice that they add it to. Raises VendorBroke."""
    for one in FrameSplitter().feed(frames):
        data = data_of(one)
        if not data or one == DONE or data == b"[DONE]":
            continue
        try:
            found = list(_added(dialect, _decode(data)))
        except _UNREADABLE:
            raise VendorBroke("the stream cannot be read, so that no guardrail can judge it") from None
        yield from found


def _added(dialect: str, event: Any) -> Iterator[tuple[int, str]]:
    if dialect == "messages":
        if event["type"] in ("content_block_delta", "content_block_start"):
            for text in strings(event.get("delta") or event.get("content_block")):
                yield event["index"], text
    elif dialect == "responses":
        if event["type"].endswith(".delta"):
            for text in strings(event["delta"]):
                yield event.get("output_index", 0), text
    else:
        for choice in event.get("choices") or ():
            for text in strings([choice.get("delta"), choice.get("text")]):
                yield choice.get("index", 0), text
        for text in strings(event.get("delta")):  # a transcript's
            yield 0, text
