"""The composition root: a replica is one process with one event loop, made, run and drained here."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import uvloop
from msgspec import Struct

from app import admin, api, cache_door, guardrails, heap, status_page, usage_pages, vitals
from app.ambient import Ambient
from app.archive import ArchiveError
from app.auth import Callers, KeySets, Tokens, jwks
from app.cache import INVALIDATED, SEMANTIC, VERIFIER, Cache, Embedders, Learning, Questions
from app.config import Config, ConfigError, ConfigSource, Secret
from app.content import Content
from app.control import REVOKED, Control, Entry
from app.cooldowns import COOLDOWN, Cooldowns
from app.credentials import Credentials, client
from app.dialogue import Dialogue
from app.errands import Errands
from app.gateway import Gateway
from app.guardrails import Guardrails
from app.ledger import Spool
from app.limits import Limits
from app.limits.budgets import ReadSpent
from app.modes import Modes
from app.overload import Overload
from app.redis_cluster import pipe_to
from app.reports.period import UsageReader
from app.reports.spent import SpentReader
from app.server import Server
from app.shipping import Shipper
from app.telemetry import JsonLog, Lines, Telemetry, open_spans
from app.upstream import engine
from app.warnings import Warnings
from app.warnings import client as warnings_client

log = logging.getLogger("gateway")

RELOAD_SECONDS = 2.0
"""How often the configuration's files are looked at: with the load itself, every replica follows within 5 s."""
LAKE_RESERVES = 2
"""Segments that only the lake still waits for are let go at so many times the spool's reserve, before calls suffer."""
CUT_SECONDS = 5.0
"""How long calls that the drain's limit cut may take to leave."""


def load_what_it_asks_for(config: Config) -> None:
    """Loads httpx, 8 MB and a tenth of a cold start, where the configuration names somebody to ask beside vendors.

    The rooms that use it import it where they ask, so that a replica without any does without; done here, with the
    configuration, no call waits for it.
    """
    accounts = any(target.provider.account for target in config.targets.values())
    owners = (*config.aliases.values(), *config.tenants.values(), *config.plans.values())
    guarded = any(owner.guardrails for owner in owners)
    if config.issuers or config.settings.warnings_webhook or accounts or guarded:
        import httpx  # noqa: F401


class Options(Struct, frozen=True):
    """`gateway serve`'s options. `name` tells this replica's segments from others' on the same disk."""

    host: str
    port: int
    admin_port: int
    config: Path
    environment: str
    overlays: tuple[Path, ...]
    spool_dir: Path
    name: str
    redis_url: str | None
    database_url: str | None
    admin_token: Secret | None


class Replica:
    """One replica, from its first to its last breath."""

    def __init__(self, options: Options, source: ConfigSource, ambient: Ambient, lines: Lines) -> None:
        settings = source.current.settings
        self.options = options
        self.source = source
        self.ambient = ambient
        self.lines = lines
        self.spans = open_spans(options.name, options.environment)
        self.telemetry = Telemetry(lines, self.spans, ambient)
        self.pipe = pipe_to(
            options.redis_url or "redis://127.0.0.1:6379/0",
            ambient,
            timeout_ms=settings.redis.timeout_ms,
            probe_seconds=settings.redis.probe_seconds,
        )
        self.control = Control(self.pipe, ambient, self._told)
        self.spool = Spool(options.spool_dir, options.name, settings.spool, ambient)
        self.credentials = Credentials(client, ambient)
        self.upstream = engine(ambient)
        self.shipper = (
            Shipper(options.spool_dir, options.name, ambient, LAKE_RESERVES * settings.spool.reserve_bytes)
            if options.database_url
            else None
        )
        self.cooldowns = Cooldowns(ambient, self.control, options.name)
        limits = Limits(self.pipe, ambient, lambda: source.current, self._spent_reader())
        dialogue = Dialogue(
            limits=limits,
            spool=self.spool,
            credentials=self.credentials,
            cooldowns=self.cooldowns,
            upstream=self.upstream,
            telemetry=self.telemetry,
            ambient=ambient,
        )
        self.modes = Modes(self.control, ambient)
        self.overload = Overload(lambda: source.current, ambient, self.telemetry.woke)
        self.guardrails = Guardrails(guardrails.client, self.telemetry.guarded, ambient)
        self.errands = Errands(
            lambda: source.current, lambda exchange, alias: self.gateway.own(exchange, alias), ambient
        )
        self.embedders = Embedders(self.errands.vectors)
        self.learning = Learning(self.pipe, self.control, ambient, options.name)
        self.questions = Questions(
            self.pipe, ambient, self.embedders.of, self.learning,
            lambda ask, key, data: self.cache.opened(ask, data, key), self.errands,
        )  # fmt: skip
        self.cache = Cache(self.pipe, self.control, ambient, self.questions)
        self.gateway = Gateway(
            modes=self.modes,
            overload=self.overload,
            guardrails=self.guardrails,
            dialogue=dialogue,
            limits=limits,
            cache=self.cache,
            spool=self.spool,
            telemetry=self.telemetry,
            ambient=ambient,
        )
        self.warnings = Warnings(lambda: source.current, self.pipe, warnings_client, ambient)
        self.gateway.limits.on_nearly_used.append(self.warnings.take)
        self.key_sets = KeySets(lambda: source.current, jwks.client, ambient)
        callers = Callers(Tokens(self.key_sets), self.control.kind(REVOKED))
        self.door = api.FrontDoor(source, self.gateway, callers, ambient)
        self.content = Content(settings.content, options.name, ambient) if settings.content.folder else None
        self.door.content = self.content
        self.usage = self._usage_reader()
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self.started = ambient.monotonic()
        self.config_fault: str | None = None
        vitals.gauges(self)

    async def run(self) -> None:
        """Serves until SIGTERM or SIGINT, then drains. A second signal ends open streams at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        self.spool.open()
        main, control = self.doors()
        loops = [
            asyncio.ensure_future(self._keep(run))
            for run in (
                *(self.pipe.run, self.spool.run, self.reload, self.control.run, self.key_sets.run),
                *(self.gateway.limits.run, self.gateway.limits.budgets.run, self.cache.run),
                *(self.learning.run, self._prepare_embedders),
                *(self.warnings.run, self.overload.run),
            )
        ]
        shipping = asyncio.ensure_future(self._keep(self.shipper.run)) if self.shipper else None
        capturing = asyncio.ensure_future(self._keep(self.content.run)) if self.content else None
        await control.start()
        await main.start()
        self.telemetry.config_loaded(self.source.current)
        log.info("serving on %s:%s, admin on %s", self.options.host, self.options.port, self.options.admin_port)
        gc.freeze()  # what start-up made stays: no collection needs to look at it again
        gc.set_threshold(20_000, 20, 50)  # calls make few cycles; at 700 looking for them was 6 % of the time
        await self.stop.wait()
        await self._drain(main)
        await self.gateway.shadows.close()
        await self.questions.close()  # it sends errands
        await self.errands.close()
        for task in loops:
            task.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        self.spool.close()
        if capturing:
            await self.content.stop()
            await capturing
        if shipping:
            await self.shipper.stop()
            await shipping
        await self.credentials.close()
        await self.upstream.close()
        if self.usage:
            await self.usage.close()
        await self.key_sets.close()
        await self.warnings.close()
        await self.guardrails.close()
        await control.close()
        if self.spans:
            await asyncio.to_thread(self.spans.close)
        log.info("stopped")

    def doors(self) -> tuple[Server, Server]:
        """The main port and the admin port, with all their routes."""
        options, token = self.options, self.options.admin_token
        pages = usage_pages.tenant_routes(self.source, self.usage, self.ambient, self.door.callers, self.telemetry)
        status = partial(vitals.status, self)
        pages.append(status_page.route(token, status))
        for_admins = usage_pages.admin_routes(self.source, self.usage, self.ambient, token, self.telemetry)
        for_admins.append(cache_door.route(token, self.cache, self.telemetry))
        main = Server(api.app(self.door, pages), options.host, options.port, self.ambient, api.calls(self.door))
        control = admin.app(token, self.telemetry, status, for_admins)
        return main, Server(control, options.host, options.admin_port, self.ambient)

    async def _prepare_embedders(self) -> None:
        """Loads the models that the configuration asks for, so that the first call does not miss for want of one."""
        config = self.source.current
        caches = [alias.cache for alias in config.aliases.values() if alias.cache is not None]
        tenants = any(tenant.cache.mode in SEMANTIC for tenant in config.tenants.values())
        await self.embedders.prepare({one.embedder for one in caches if tenants or one.mode in SEMANTIC})

    def _usage_reader(self) -> UsageReader | None:
        """Reads usage from PostgreSQL; None without one. A replica serves calls whatever DATABASE_URL says."""
        if not self.options.database_url:
            return None
        try:
            return UsageReader(self.options.database_url, self.ambient)
        except ArchiveError as error:
            log.error("usage cannot be read: %s", error)
            return None

    def _spent_reader(self) -> ReadSpent | None:
        """Sums the ledger where Redis lost its counters; None without PostgreSQL. A wrong URL is one that is away."""
        if not self.options.database_url:
            return None
        try:
            return SpentReader(self.options.database_url, lambda: self.source.current.environment, self.ambient)
        except ArchiveError as error:
            log.error("budgets could not be rebuilt: %s", error)

            async def away(*_: object) -> None:
                return None

            return away

    async def _keep(self, run: Callable[[], Awaitable[None]]) -> None:
        """Runs a loop, and again after a second should a defect end it: none of them may stop unseen."""
        while True:
            try:
                await run()
                return
            except Exception:
                log.exception("a loop ended with a defect: %s", run.__qualname__)
            await self.ambient.sleep(1.0)

    def _signalled(self) -> None:
        if self.stop.is_set():
            self.hurry.set()
        self.stop.set()

    async def _drain(self, main: Server) -> None:
        """Readiness off, accept for a while, close the listener, let calls finish, cut what outlasts the limit."""
        drain = self.source.current.settings.drain
        self.door.draining = True
        log.info("draining: still accepting for %g s", drain.delay_seconds)
        await self._unless_hurried(self.ambient.sleep(drain.delay_seconds), drain.delay_seconds)
        closing = asyncio.ensure_future(main.close())
        await self._unless_hurried(asyncio.shield(closing), drain.limit_seconds)
        if not closing.done():
            log.warning("the drain's limit cut %d calls", self.door.cut("drain"))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CUT_SECONDS):
                    await asyncio.shield(closing)
            main.abort()
            await closing

    async def _unless_hurried(self, work: object, seconds: float) -> None:
        hurry = asyncio.ensure_future(self.hurry.wait())
        done = asyncio.ensure_future(work)
        await asyncio.wait({hurry, done}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in (hurry, done):
            task.cancel()

    async def reload(self) -> None:
        while True:
            await self.ambient.sleep(RELOAD_SECONDS)
            await self.reload_once()

    async def reload_once(self) -> int:
        """1 when a new snapshot took effect, else 0. An invalid configuration is logged once and changes nothing."""
        if not await asyncio.to_thread(self.source.changed):
            return 0
        before = self.source.current
        try:
            swapped = await asyncio.to_thread(self.source.reload)
            await asyncio.to_thread(load_what_it_asks_for, self.source.current)
        except ConfigError as error:
            self.config_fault = str(error)
            self.telemetry.config_refused()
            log.error("configuration refused, %s keeps serving: %s", self.source.current.version, error)
            return 0
        self.config_fault = None
        if not swapped:
            self.telemetry.config_restored()
            return 0
        settings = self.source.current.settings
        self.pipe.timeout_ms = settings.redis.timeout_ms
        self.pipe.probe_seconds = settings.redis.probe_seconds
        self.spool.settings = settings.spool
        if self.shipper:
            self.shipper.keep_free(LAKE_RESERVES * settings.spool.reserve_bytes)
        self.telemetry.config_loaded(self.source.current)
        self._audit_reload(before, self.source.current)
        log.info("configuration %s took effect", self.source.current.version)
        return 1

    def _told(self, kind: str, name: str, entry: Entry) -> None:
        """An entry of the control channel that is new to this replica."""
        if kind == COOLDOWN:
            self.cooldowns.heard(name, entry)
            return
        if kind == VERIFIER:  # no instruction of anybody's: a model of a tenant's traffic
            return
        if kind == INVALIDATED:
            self.cache.epochs.heard(entry)
        self.telemetry.audit(entry.by, f"control.{kind}", name=name, value=entry.value, at=entry.at, until=entry.until)

    def _audit_reload(self, before: Config, now: Config) -> None:
        """Who may call is named in full; the rest of a change is in the files' own history."""
        old, new = ({(key.id, key.revoked) for key in config.keys.values()} for config in (before, now))
        self.telemetry.audit(
            "configuration files",
            "configuration.load",
            version=now.version,
            replaced=before.version,
            keys_added=sorted(id for id, revoked in new - old if not revoked),
            keys_revoked=sorted(id for id, revoked in new - old if revoked),
            keys_removed=sorted({id for id, _ in old} - {id for id, _ in new}),
        )


FILES_BESIDE_CALLS = 200
"""Redis, spans, the spool, the admin port, connections that wait for their next call."""


def take_files(calls: int) -> None:
    """Takes as many open files as may be had: with the 1,024 that programs often start with, 400 streams are all."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):  # macOS has less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    may = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    needed = 2 * calls + FILES_BESIDE_CALLS
    if may != resource.RLIM_INFINITY and may < needed:
        logging.getLogger(__name__).warning(
            "%d files may be open, and %d calls at once (gateway.overload.max_calls) take %d: raise the hard limit "
            "(ulimit -Hn, LimitNOFILE), or lower max_calls",
            may, calls, needed,
        )  # fmt: skip


def serve(options: Options) -> int:
    """Runs a replica to its end: 0 after a drain, 1 when it could not start (the reason is on standard error)."""
    ambient = Ambient()
    try:
        source = ConfigSource(options.config, options.environment, options.overlays, os.environ)
    except ConfigError as error:
        sys.stderr.write(f"The configuration is not valid:\n{error}\n")
        return 1
    load_what_it_asks_for(source.current)
    heap.share_one()
    lines = Lines()
    level = os.environ.get("LOG_LEVEL", "INFO").upper()
    if level not in logging.getLevelNamesMapping():
        sys.stderr.write(f"LOG_LEVEL is {level!r}; it may be DEBUG, INFO, WARNING, ERROR or CRITICAL.\n")
        return 1
    logging.basicConfig(level=level, handlers=[JsonLog(lines, ambient)], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    take_files(source.current.settings.overload.max_calls)

    async def run() -> None:
        await Replica(options, source, ambient, lines).run()

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run())
    except (OSError, ValueError) as error:
        sys.stderr.write(f"The replica cannot start: {error}\n")
        return 1
    finally:
        lines.close()
    return 0
