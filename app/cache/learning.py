"""What all replicas learn of a tenant together: observations in a stream, one learner at a time, the newest model.

Everything of a tenant lies in Redis and is bounded: WINDOW observations of about 160 bytes, one model, a day's figures.
A replica that has no model serves nothing; one that has an old one goes on with it while Redis is away.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from app.ambient import Ambient, timestamp
from app.cache.learner import REFIT, WINDOW, Observation, fit
from app.cache.partition import Ask
from app.cache.verifier import FEATURES, Model
from app.control import Control
from app.redis_pipe import RedisAway, RedisPipe, RedisRefused

log = logging.getLogger("gateway")

LOOK_SECONDS = 2.0
"""How often a replica looks for new models, writes its figures, and learns what is to be learned."""
LEASE_MS = 20_000
PAGE = 500
TENANTS = 1_000
"""Tenants whose models a replica holds; those longest without a call go first."""
FIGURES_SECONDS = 40 * 86_400
WORST = 50
"""Answers of a tenant that are remembered for having been wrong."""
VERIFIER = "verifier"
"""The kind of the control channel's entries that tell each tenant's newest model."""

_observed = struct.Struct(f"<bBBff{len(FEATURES)}f")
_encode = msgspec.msgpack.encode
_model = msgspec.msgpack.Decoder(Model)


class Tally(Struct):
    """What happened of one tenant and alias since it was last written down.

    looks              calls that looked; each was a hit, vetoed, one of the next six, or in mode shadow would have hit
    no_vector, away    no vector in time; Redis had no answer
    alone, untaught    no neighbour; nothing is learned of the tenant yet
    unsure, ended      not sure enough; the answer was there no more
    hits, checks, wrong  served, asked again, and found wrong then
    shadow_right, shadow_wrong  would have been served, by what the vendor answered
    vetoes, vetoed_right  kept apart by a guard, and those of them whose answer would have been right
    """

    looks: int = 0
    no_vector: int = 0
    away: int = 0
    alone: int = 0
    untaught: int = 0
    unsure: int = 0
    ended: int = 0
    hits: int = 0
    checks: int = 0
    wrong: int = 0
    shadow_right: int = 0
    shadow_wrong: int = 0
    vetoed_right: int = 0
    vetoes: dict[str, int] = {}
    worst: list[str] = []

    def vetoed(self, guard: str) -> None:
        self.vetoes[guard] = self.vetoes.get(guard, 0) + 1

    def shadowed(self, right: bool) -> None:
        if right:
            self.shadow_right += 1
        else:
            self.shadow_wrong += 1

    def checked(self, right: bool, key: str) -> None:
        self.checks += 1
        if not right:
            self.wrong += 1
            self.worst.append(key)

    def add(self, other: Tally) -> None:
        for name in _FIGURES:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for guard, count in other.vetoes.items():
            self.vetoes[guard] = self.vetoes.get(guard, 0) + count

    def figures(self) -> dict[str, int]:
        """What there is to write down, by name."""
        figures = {name: value for name in _FIGURES if (value := getattr(self, name))}
        return figures | {f"veto:{guard}": count for guard, count in self.vetoes.items()}


MISSES = ("no_vector", "away", "alone", "untaught", "unsure", "ended")
_FIGURES = ("looks", *MISSES, "hits", "checks", "wrong", "shadow_right", "shadow_wrong", "vetoed_right")


class _Known(Struct):
    """What this replica knows of one tenant. `new`: observations that it made since the tenant was last fitted;
    `behind`: those of all replicas that no model has learned from, when it last looked.
    """

    max_wrong: float = 0.01
    model: Model | None = None
    heard: str = ""
    new: int = 0
    behind: int = 0
    read_to: bytes = b"-"
    window: deque[Observation] = msgspec.field(default_factory=lambda: deque(maxlen=WINDOW))


class Learning:
    """Of all tenants that this replica has served lately."""

    def __init__(self, pipe: RedisPipe, control: Control, ambient: Ambient, replica: str) -> None:
        self._put = pipe.script(Path(__file__).with_name("learned.lua").read_text())
        self._pipe = pipe
        self._control = control
        self._ambient = ambient
        self._replica = replica
        self._known: dict[str, _Known] = {}
        self._tallies: dict[tuple[str, str], Tally] = {}
        self.totals: dict[tuple[str, str], Tally] = {}
        """What happened since the start, by tenant and alias, as far as it is written down."""
        self._due = asyncio.Event()
        self.fitted = 0

    def model(self, tenant_id: str, max_wrong: float) -> Model | None:
        known = self._of(tenant_id)
        known.max_wrong = max_wrong
        return known.model

    def tally(self, tenant_id: str, alias: str) -> Tally:
        tally = self._tallies.get((tenant_id, alias))
        if tally is None:
            tally = self._tallies[tenant_id, alias] = Tally()
        return tally

    def note(self, ask: Ask, observation: Observation) -> None:
        """Never waits: with Redis away it is lost."""
        right = -1 if observation.right is None else int(observation.right)
        packed = _observed.pack(
            right, observation.compared, observation.agreed, observation.weight, observation.chance,
            *observation.features,
        )  # fmt: skip
        try:
            self._pipe.send("XADD", _stream(ask.tenant_id), "MAXLEN", "~", WINDOW, "*", "o", packed)
        except RedisAway:
            return
        known = self._of(ask.tenant_id)
        known.new += 1
        if known.new >= REFIT:
            self._due.set()

    def _of(self, tenant_id: str) -> _Known:
        known = self._known.pop(tenant_id, None) or _Known()
        self._known[tenant_id] = known
        if len(self._known) > TENANTS:
            del self._known[next(iter(self._known))]
        return known

    def looks(self) -> Iterator[tuple[tuple[str, ...], float]]:
        """Looks by tenant, alias and outcome."""
        for name, tally in self.totals.items():
            yield (*name, "hit"), tally.hits
            yield (*name, "vetoed"), sum(tally.vetoes.values())
            for miss in MISSES:
                yield (*name, miss), getattr(tally, miss)

    def judged(self) -> Iterator[tuple[tuple[str, ...], float]]:
        """Answers whose outcome is known, by tenant, alias, whether they were served, and whether they were right."""
        for name, tally in self.totals.items():
            yield (*name, "true", "right"), tally.checks - tally.wrong
            yield (*name, "true", "wrong"), tally.wrong
            yield (*name, "false", "right"), tally.shadow_right
            yield (*name, "false", "wrong"), tally.shadow_wrong

    def thresholds(self) -> Iterator[tuple[tuple[str, ...], float]]:
        for tenant_id, known in self._known.items():
            if known.model is not None:
                yield (tenant_id,), known.model.threshold

    def waiting(self) -> Iterator[tuple[tuple[str, ...], float]]:
        for tenant_id, known in self._known.items():
            yield (tenant_id,), known.behind

    # --- the loop -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        while True:
            self._due.clear()
            await self.run_once()
            waiting = asyncio.ensure_future(self._due.wait())
            pause = asyncio.ensure_future(self._ambient.sleep(LOOK_SECONDS))
            await asyncio.wait((waiting, pause), return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            pause.cancel()

    async def run_once(self) -> int:
        """Takes new models, writes figures, learns; returns how many tenants were fitted."""
        fitted = 0
        try:
            await self._write_figures()
            for tenant_id, known in list(self._known.items()):
                await self._take_newest(tenant_id, known)
                if known.new and await self._learn(tenant_id, known):
                    fitted += 1
        except RedisAway:
            pass
        except RedisRefused as error:
            log.error("redis does not do what the semantic cache's learner asks: %s", error)
        self.fitted += fitted
        return fitted

    async def _take_newest(self, tenant_id: str, known: _Known) -> None:
        told = self._control.kind(VERIFIER).get(tenant_id)
        version = told.value if told is not None else "first"
        if version == known.heard:
            return
        found = await self._pipe.execute("HGET", _model_key(tenant_id), "model")
        known.heard = version
        self._take(known, found)

    def _take(self, known: _Known, found: bytes | None) -> None:
        """A model of other features, of a release before or after this one, is none."""
        try:
            model = None if found is None else _model.decode(found)
        except msgspec.DecodeError:
            model = None
        if model is not None and len(model.weights) == len(FEATURES):
            known.model = model

    async def _learn(self, tenant_id: str, known: _Known) -> bool:
        """Fits a tenant's model where there is enough that is new, and no other replica does."""
        lease, stream = f"sc:{{{tenant_id}}}:_learner", _stream(tenant_id)
        length = await self._pipe.execute("XLEN", stream)
        if not length:
            known.new = 0
            return False
        added = await self._added(stream)
        before = 0 if known.model is None else known.model.seen
        if before > added:  # Redis came back empty: what was learned before counts on, from new observations
            before = 0
        known.behind = added - before
        if added - before < max(REFIT, min(length, added) // 20):
            known.new = 0 if added - before < REFIT // 2 else known.new
            return False
        if await self._pipe.execute("SET", lease, self._replica, "NX", "PX", LEASE_MS) is None:
            return False
        try:
            await self._read(stream, known)
            version = int((await self._pipe.execute("HGET", _model_key(tenant_id), "version")) or 0)
            model = await asyncio.to_thread(_fit, list(known.window), known.max_wrong, version + 1, added)
            known.new = 0
            if model is None:
                return False
            known.behind = 0
            if not await self._pipe.execute(
                "EVALSHA", self._put, 1, _model_key(tenant_id), version, version + 1, _encode(model)
            ):
                return False
            known.model, known.heard = model, str(version + 1)
            await self._control.put(VERIFIER, tenant_id, str(version + 1), self._replica)
            return True
        finally:
            self._pipe.send("DEL", lease)

    async def _added(self, stream: str) -> int:
        """How many observations there have ever been."""
        told = await self._pipe.execute("XINFO", "STREAM", stream)
        return dict(zip(told[::2], told[1::2], strict=True))[b"entries-added"]

    async def _read(self, stream: str, known: _Known) -> None:
        """What came since this replica last read it."""
        while True:
            start = known.read_to if known.read_to == b"-" else b"(" + known.read_to
            page = await self._pipe.execute("XRANGE", stream, start, "+", "COUNT", PAGE)
            for _, fields in page:
                if (observation := _observation(fields[1])) is not None:
                    known.window.append(observation)
            if page:
                known.read_to = page[-1][0]
            if len(page) < PAGE:
                return

    async def _write_figures(self) -> None:
        tallies, self._tallies = self._tallies, {}
        day = timestamp(self._ambient.now())[:10]
        for (tenant_id, alias), tally in tallies.items():
            if len(self.totals) < TENANTS or (tenant_id, alias) in self.totals:
                self.totals.setdefault((tenant_id, alias), Tally()).add(tally)
            key = figures_key(tenant_id, day)
            for name, count in tally.figures().items():
                self._pipe.send("HINCRBY", key, f"{alias}:{name}", count)
            self._pipe.send("EXPIRE", key, FIGURES_SECONDS)
            for entry_key in tally.worst:
                self._pipe.send("ZINCRBY", worst_key(tenant_id), 1, entry_key)
                self._pipe.send("ZREMRANGEBYRANK", worst_key(tenant_id), 0, -WORST - 1)


def _fit(observations: list[Observation], max_wrong: float, version: int, seen: int) -> Model | None:
    """The judge's error is estimated from answers that say something else and that it took for the same."""
    compared = sum(one.compared for one in observations)
    agreed = sum(one.agreed for one in observations)
    error = min(0.9, (agreed + 1.0) / (compared + 100.0))
    return fit(observations, max_wrong, error, version, seen)


def _observation(packed: bytes) -> Observation | None:
    """None for what another release wrote."""
    if len(packed) != _observed.size:
        return None
    right, compared, agreed, weight, chance, *features = _observed.unpack(packed)
    return Observation(tuple(features), None if right < 0 else bool(right), weight, chance, compared, agreed)


def _stream(tenant_id: str) -> str:
    return f"sc:{{{tenant_id}}}:_observed"


def _model_key(tenant_id: str) -> str:
    return f"sc:{{{tenant_id}}}:_model"


def figures_key(tenant_id: str, day: str) -> str:
    """A day's figures of a tenant: a hash of `<alias>:<figure>`."""
    return f"sc:{{{tenant_id}}}:_figures:{day}"


def worst_key(tenant_id: str) -> str:
    """Entries whose answers were wrong, by how often."""
    return f"sc:{{{tenant_id}}}:_worst"
