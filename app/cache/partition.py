"""What may be kept, and under which name: pure. Two calls share an entry only if everything but the stream is the same.

An entry's key names its tenant and alias in plain words; the rest is in a digest. A *partition* is the same without the
last user turn: within one, and nowhere else, a question may be answered with the answer to one that means the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

import msgspec
from msgspec import Raw, Struct

from app.config import Alias, AliasCache, CacheMode, Tenant, TenantCache
from app.core import Call, Wishes
from app.wire import ABSENT, Request

SEMANTIC = ("shadow", "static", "verified")
"""Modes that look for questions which mean the same."""
UNSAID_TEMPERATURE = 1.0
"""What vendors take where a request names none."""
FREE = frozenset({"model", "stream", "stream_options"})
"""Members that do not change an answer: the alias stands in the key, and an entry serves whole answers and streams."""
CANONICAL_BYTES = 65_536
"""Of a request that is read and written again for its key: 0.2 ms of the event loop."""
NO_WISHES = Wishes()
NO_TAGS: Mapping[str, str] = {}
_encode = msgspec.json.encode
_decode = msgspec.json.decode
_ROLE_MEMBERS = ("role", "content", "type", "id", "status")
_NOT_REPLAYABLE = frozenset({"logprobs", "top_logprobs", "audio"})
_TOOL_TURN = re.compile(
    rb'"(?:tool_calls|tool_call_id|function_call(?:_output)?|tool_use|tool_result)"|"role"\s*:\s*"tool"'
)
"""Where one of these stands in a conversation, tools are in play; quoted by a user they would have backslashes."""
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Turn(Struct, frozen=True):
    """The last user turn of a conversation: its text, what came before it in the client's words, and how many turns.

    `history` has each message before, and what the last one says beside its text. `turns` counts those of the user.
    """

    text: str
    history: tuple[bytes, ...]
    turns: int


class Ask(Struct, frozen=True, kw_only=True):
    """What a call asks of the cache. `why_not` says why nothing is kept of it; None: it may be.

    `key` is the Redis key of its entry, `partition` the digest of everything but `turn`, where the mode is a semantic
    one and the call has a question. `look`: an answer from before will do; `keep`: this one may be kept.

    `residency`: the regions that the tenant's texts stay in; `guarded`: guardrails look at the call after the cache.
    """

    tenant_id: str
    alias: str
    mode: CacheMode
    policy: AliasCache | None
    tenant: TenantCache
    wishes: Wishes
    dialect: str
    why_not: str | None = None
    key: str = ""
    digest: str = ""
    partition: str = ""
    turn: Turn | None = None
    tags: Mapping[str, str] = NO_TAGS
    residency: frozenset[str] | None = None
    guarded: bool = False

    @property
    def look(self) -> bool:
        return self.why_not is None and not self.wishes.fresh

    @property
    def keep(self) -> bool:
        return self.why_not is None


def prefix(tenant_id: str, alias: str) -> str:
    """What the keys of a tenant's answers of an alias begin with. The tenant is the hash tag: one slot has them all."""
    return f"sc:{{{tenant_id}}}:{alias}:"


def mode_of(alias: Alias, tenant: Tenant) -> CacheMode:
    """The tenant's word counts where the alias has a cache at all."""
    if alias.cache is None or not tenant.cache.store:
        return "off"
    mode = tenant.cache.mode or alias.cache.mode
    return "exact" if alias.serves != "chat" and mode in SEMANTIC else mode


def ask(
    call: Call,
    request: Request,
    tenant: Tenant,
    alias: Alias,
    rule: str | None = None,
    epoch: str = "",
    tags: Mapping[str, str] = NO_TAGS,
) -> Ask:
    """`alias` is the way that the call goes, by which `rule`; where weights share out users, whose way comes first.

    `epoch` is what has been invalidated of the call's tenant, alias and revision so far; `tags` the same by document.
    """
    wishes, policy, mode = call.wishes or NO_WISHES, alias.cache, mode_of(alias, tenant)
    why_not = reason(request, wishes, policy, mode)
    if why_not is not None or policy is None:
        return Ask(
            tenant_id=tenant.id, alias=alias.name, mode=mode, policy=policy, tenant=tenant.cache, wishes=wishes,
            dialect=call.dialect.name, why_not=why_not,
        )  # fmt: skip
    common = (
        call.dialect.name.encode(),
        policy.answers_by,
        (rule or "").encode(),
        alias.chain[0].encode() if alias.weights else b"",
        epoch.encode(),
        revision(wishes, policy).encode(),
        b"" if call.prompt_version is None else b"=" + call.prompt_version.encode(),
        *(f"{name}={value}".encode() for name, value in call.relayed),
    )
    guarded = False
    if alias.guardrails or tenant.guardrails:  # what others let through is not what these do
        guarded = any("input" in guardrail.checks for guardrail in (*alias.guardrails, *tenant.guardrails))
        common += (repr((alias.guardrails, tenant.guardrails)).encode(),)
    fields = {name: value for name, value in request.fields.items() if name not in FREE}
    key = digest((*common, canonical(fields)))
    turn = last_turn(call.dialect.name, fields) if mode in SEMANTIC else None
    partition = ""
    if turn is not None:
        rest = {name: value for name, value in fields.items() if name not in _CONVERSATIONS}
        partition = digest((*common, canonical(rest), *turn.history))
    return Ask(
        tenant_id=tenant.id, alias=alias.name, mode=mode, policy=policy, tenant=tenant.cache, wishes=wishes,
        dialect=call.dialect.name, key=prefix(tenant.id, alias.name) + "x:" + key, digest=key, partition=partition,
        turn=turn, tags=tags, residency=tenant.residency, guarded=guarded,
    )  # fmt: skip


def revision(wishes: Wishes, policy: AliasCache) -> str:
    """The knowledge that the answer comes from: the call's word before the alias's."""
    return wishes.kb_revision or policy.kb_revision or ""


def canonical(fields: Mapping[str, Raw]) -> bytes:
    """The same bytes for the same JSON, however it was written. A large request counts as it was written."""
    if sum(len(memoryview(value)) for value in fields.values()) <= CANONICAL_BYTES:
        try:
            return _encode({name: _decode(value) for name, value in fields.items()}, order="deterministic")
        except _UNREADABLE:
            pass  # it is nested too deeply
    return b"as written" + b"".join(b"%d:%b" % (len(v), v) for n, w in sorted(fields.items()) for v in (n.encode(), w))


def digest(parts: Iterable[bytes]) -> str:
    """Of parts with their lengths: no two lists of parts read the same."""
    return hashlib.sha256(b"".join([b"%d:%b" % (len(part), part) for part in parts])).hexdigest()[:40]


def reason(request: Request, wishes: Wishes, policy: AliasCache | None, mode: CacheMode) -> str | None:
    """Why nothing of a call is looked up or kept; None where it may be."""
    if policy is None or mode == "off":
        return "off"
    if not wishes.store:
        return "no_store"
    if request.operation == "embeddings":
        return None
    if request.operation != "chat":
        return "operation"
    fields = request.fields
    if request.stored:
        return "stored"
    if request.choices != 1:
        return "choices"
    if _temperature(fields) > policy.max_temperature:
        return "sampling"
    if not _NOT_REPLAYABLE.isdisjoint(fields) and any(_asked(fields, name) for name in _NOT_REPLAYABLE):
        return "not_replayable"
    for name in _CONVERSATIONS:
        if (written := fields.get(name)) is not None:
            conversation = bytes(written)
            if (b"tool" in conversation or b"function_call" in conversation) and _TOOL_TURN.search(conversation):
                return "tool_turn"
    return None


def _temperature(fields: dict[str, Raw]) -> float:
    written = fields.get("temperature")
    if written is None:
        return UNSAID_TEMPERATURE
    try:
        found = _number.decode(written)
    except _UNREADABLE:
        return float("inf")  # the vendor may say what is wrong with it
    return UNSAID_TEMPERATURE if found is None else found


def _asked(fields: dict[str, Raw], name: str) -> bool:
    return bytes(fields.get(name) or b"null") not in (b"null", b"false", b"0")


# --- the last user turn -----------------------------------------------------------------------------------------------

_CONVERSATIONS = ("messages", "input")


class _Part(Struct):
    type: str
    text: str | None = None


class _LastPart(_Part, forbid_unknown_fields=True):
    cache_control: Raw = ABSENT


class _Said(Struct):
    """A message; of the Responses dialect an item, which is one where it has a role."""

    role: str | None = None
    content: str | list[_Part] | None = None


class _Asked(Struct):
    """The last one: what its part holds beside a text would change the answer."""

    role: str | None = None
    content: str | list[_LastPart] | None = None


_number = msgspec.json.Decoder(float | None)
_listed = msgspec.json.Decoder(list[Raw])
_text = msgspec.json.Decoder(str)
_said = msgspec.json.Decoder(_Said)
_last = msgspec.json.Decoder(_Asked)
_members = msgspec.json.Decoder(dict[str, Raw])
_TEXTS = ("text", "input_text")


def last_turn(dialect: str, fields: dict[str, Raw]) -> Turn | None:
    """The question of a chat that is text and no more: None for images, audio, files, or a last word that is not the
    user's. A conversation that cannot be read is the vendor's to refuse.
    """
    written = fields.get("input" if dialect == "responses" else "messages")
    if written is None:
        return None
    try:
        if dialect == "responses" and memoryview(written)[:1] == b'"':
            return Turn(_text.decode(written), (), 1)
        messages = _listed.decode(written)
        if not messages:
            return None
        heard = [_said.decode(message) for message in messages]
        last = _last.decode(messages[-1])
        if last.role != "user":
            return None
        if not all(_plain(said) for said in heard):
            return None
        text = _text_of(last.content)
        beside = _members.decode(messages[-1])
    except _UNREADABLE:
        return None
    if text is None:
        return None
    history = [*(bytes(message) for message in messages[:-1])]
    history += [name.encode() + b"=" + value for name, value in sorted(beside.items()) if name not in _ROLE_MEMBERS]
    return Turn(text, tuple(history), sum(1 for said in heard if said.role == "user"))


def _plain(said: _Said) -> bool:
    """Whether a message is text alone."""
    return said.role is not None and (
        not isinstance(said.content, list) or all(part.type in (*_TEXTS, "output_text") for part in said.content)
    )


def _text_of(content: str | list[_LastPart] | None) -> str | None:
    if isinstance(content, str):
        return content or None
    texts = [part.text for part in content or () if part.text]
    return texts[0] if len(texts) == 1 and len(content or ()) == 1 else None
