"""The composition root: a replica is one process with one event loop, made, run and drained here."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import uvloop
from msgspec import Struct

from app import admin, api, cache_door, guardrails, status_page, usage_pages
from app.ambient import Ambient, timestamp
from app.archive import ArchiveError
from app.auth import Callers, KeySets, Tokens, jwks
from app.cache import INVALIDATED, SEMANTIC, VERIFIER, Cache, Embedders, Learning, Questions
from app.config import PRIORITIES, Config, ConfigError, ConfigSource, Secret, utc_day
from app.content import Content
from app.control import REVOKED, Control, Entry
from app.cooldowns import COOLDOWN, Cooldowns, is_resting
from app.credentials import Credentials, client
from app.dialogue import Dialogue
from app.gateway import Gateway
from app.guardrails import Guardrails
from app.ledger import Spool
from app.limits import Limits
from app.limits.budgets import ReadSpent
from app.modes import STRICTNESS, Modes
from app.overload import Overload
from app.redis_pipe import RedisPipe
from app.reports.period import UsageReader
from app.reports.spent import SpentReader
from app.server import Server
from app.telemetry import MAX_TENANTS, JsonLog, Lines, Telemetry, open_spans
from app.upstream import engine
from app.warnings import Warnings
from app.warnings import client as warnings_client

log = logging.getLogger("gateway")

RELOAD_SECONDS = 2.0
"""How often the configuration's files are looked at: with the load itself, every replica follows within 5 s."""
SHIP_SECONDS = 10.0
"""How long the drain waits for the shipper; what remains is adopted by a living replica."""
LAKE_RESERVES = 2
"""Segments that only the lake still waits for are let go at so many times the spool's reserve, before calls suffer."""
CUT_SECONDS = 5.0
"""How long calls that the drain's limit cut may take to leave."""


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


class LakeStatus(Struct):
    """The part of it that is about the lake, where there is one."""

    files: int = 0
    backlog_bytes: int = 0
    dropped_segments: int = 0
    error: str | None = None


class ShipperStatus(Struct):
    """The shipper's last word: a line of JSON on its standard output."""

    postgres: str = "down"
    shipped_rows: int = 0
    dead_letters: int = 0
    backlog_bytes: int = 0
    lag_seconds: float = 0.0
    adopted_segments: int = 0
    error: str | None = None
    lake: LakeStatus | None = None


class Shipper:
    """Keeps `ledger_shipper` running as a child, so that PostgreSQL never shares the hot loop."""

    def __init__(self, options: Options, ambient: Ambient, keep_free_bytes: int) -> None:
        """Below `keep_free_bytes` of free disk no segment waits for the lake."""
        self.status = ShipperStatus()
        self._keep_free_bytes = keep_free_bytes
        self._options = options
        self._ambient = ambient
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = self._renewing = False

    async def run(self) -> None:
        while not self._stopping:
            await self.run_once()
            if self._renewing:
                self._renewing = False
            elif not self._stopping:
                self.status = ShipperStatus(error="the shipper process ended")
                log.error("the shipper process ended; it is started again")
                await self._ambient.sleep(1.0)

    async def run_once(self) -> int:
        """One life of the child: returns how many status lines it wrote."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "app.ledger_shipper",
            "--spool-dir", str(self._options.spool_dir), "--replica", self._options.name,
            "--keep-free-bytes", str(self._keep_free_bytes),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        lines = 0
        async for line in self._process.stdout:
            with contextlib.suppress(msgspec.DecodeError):
                self.status = msgspec.json.decode(line, type=ShipperStatus)
                lines += 1
        await self._process.wait()
        return lines

    def keep_free(self, keep_free_bytes: int) -> None:
        """Has the child begin anew where it changes; it ends as in a drain."""
        if keep_free_bytes != self._keep_free_bytes:
            self._keep_free_bytes = keep_free_bytes
            self._renewing = True
            if self._process is not None and self._process.returncode is None:
                self._process.stdin.close()

    async def stop(self) -> None:
        """Closes its standard input: it ships what it can and exits; past the limit it is ended."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.stdin.close()
        try:
            async with asyncio.timeout(SHIP_SECONDS + 1):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


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
        self.pipe = RedisPipe(
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
            Shipper(options, ambient, LAKE_RESERVES * settings.spool.reserve_bytes) if options.database_url else None
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
        self.overload = Overload(lambda: source.current, ambient)
        self.guardrails = Guardrails(guardrails.client, self.telemetry.guarded, ambient)
        self.embedders = Embedders()
        self.learning = Learning(self.pipe, self.control, ambient, options.name)
        questions = Questions(
            self.pipe, ambient, self.embedders.of, self.learning,
            lambda ask, key, data: self.cache.opened(ask, data, key),
        )  # fmt: skip
        self.cache = Cache(self.pipe, self.control, ambient, questions)
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
        self._started = ambient.monotonic()
        self._config_fault: str | None = None
        self._gauges()

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
                *(self.warnings.run, self.telemetry.run, self.overload.run),
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
        pages.append(status_page.route(token, self.status))
        for_admins = usage_pages.admin_routes(self.source, self.usage, self.ambient, token, self.telemetry)
        for_admins.append(cache_door.route(token, self.cache, self.telemetry))
        main = Server(api.app(self.door, pages), options.host, options.port, api.calls(self.door))
        control = admin.app(token, self.telemetry, self.status, for_admins)
        return main, Server(control, options.host, options.admin_port)

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
        except ConfigError as error:
            self._config_fault = str(error)
            self.telemetry.config_refused()
            log.error("configuration refused, %s keeps serving: %s", self.source.current.version, error)
            return 0
        self._config_fault = None
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

    def _price_age_days(self) -> float:
        checked = self.source.current.prices_checked_on
        return 0.0 if checked is None else float((utc_day(self.ambient) - checked).days)

    def status(self) -> dict[str, object]:
        """What the admin port's /status says."""
        now = self.ambient.monotonic()
        config, resting = self.source.current, self.cooldowns.resting()
        mode, told = self.modes.told(config)
        return {
            "replica": self.options.name,
            "environment": self.source.current.environment,
            "config_version": self.source.current.version,
            "config_fault": self._config_fault,
            "uptime_seconds": round(now - self._started, 1),
            "mode": mode,
            "mode_until": None if told is None or told.until is None else timestamp(told.until),
            "tenant_modes": {
                name: {"mode": entry.value, "until": None if entry.until is None else timestamp(entry.until)}
                for name, entry in self.modes.tenants().items()
            },
            "draining": self.door.draining,
            "in_flight": len(self.door.in_flight),
            "overload": {
                "calls": self.overload.calls,
                "level": round(self.overload.level, 2),
                "delay_ms": round(self.overload.delay_seconds * 1000, 1),
            },
            "redis": "up" if self.pipe.up else "down",
            "budgets": "whole" if self.gateway.limits.budgets.made_good else "not whole",
            "postgres": self.shipper.status.postgres if self.shipper else "not configured",
            "control_age_seconds": round(self.control.age_seconds, 1),
            "resting": sorted(resting),
            "targets": {
                target.name: "resting" if is_resting(target, resting) else "ok"
                for alias in config.aliases.values()
                for target in alias.targets
            },
            "vendor_errors": self.telemetry.vendor_errors(),
            "spool": {
                "available": self.spool.available,
                "open_intents": self.spool.open_intents,
            },
            "shipper": msgspec.to_builtins(self.shipper.status) if self.shipper else None,
        }

    def _targets_up(self) -> Iterator[tuple[tuple[str, str], float]]:
        resting = self.cooldowns.resting()
        for target in self.source.current.targets.values():
            yield (target.provider.name, target.name), not is_resting(target, resting)

    def _keys_up(self) -> Iterator[tuple[tuple[str, str], float]]:
        """A key that rests at one target only is up."""
        resting = self.cooldowns.resting()
        providers = {target.provider.name: target.provider for target in self.source.current.targets.values()}
        for provider in providers.values():
            for key in provider.keys:
                yield (provider.name, key.name), f"key:{key.name}" not in resting

    def _budgets(self) -> Iterator[tuple[tuple[str, str], float]]:
        """The fullest by name; of the others the fullest, as `other`."""
        used = self.gateway.limits.budgets_used()
        for owner, limit, ratio in used[:MAX_TENANTS]:
            yield (owner, limit), ratio
        if len(used) > MAX_TENANTS:
            yield ("other", used[MAX_TENANTS][1]), used[MAX_TENANTS][2]

    def _gauges(self) -> None:
        gauge, shipper, limits = self.telemetry.gauge, self.shipper, self.gateway.limits
        gauge("gateway_inflight", "Calls being served.", lambda: len(self.door.in_flight))
        gauge("gateway_tasks", "Tasks of the event loop.", lambda: len(asyncio.all_tasks()))
        gauge("gateway_body_bytes", "Request bodies in memory.", lambda: self.door.bodies.held)
        overload = self.overload
        gauge("gateway_overload_level", "Classes of tenants that are shed for it.", lambda: overload.level)
        for place, priority in enumerate(PRIORITIES):
            gauge(
                "gateway_shed_calls", "Calls refused in an overload.", lambda place=place: overload.shed[place],
                priority=priority,
            )  # fmt: skip
        gauge(
            "gateway_mode", "0 normal, 1 cache-only, 2 read-only, for everybody.",
            lambda: STRICTNESS[self.modes.told(self.source.current)[0]],
        )  # fmt: skip
        gauge("gateway_draining", "1 while this replica drains.", lambda: self.door.draining)
        gauge("gateway_dependency_up", "1 when the dependency answers.", lambda: self.pipe.up, name="redis")
        gauge("gateway_dependency_changes", "Turns between up and down.", lambda: self.pipe.changes, name="redis")
        cache = self.cache
        gauge("gateway_cache_lost", "Answers that Redis did not keep.", lambda: cache.lost)
        gauge("gateway_cache_damaged", "Entries that were none: deleted.", lambda: cache.damaged)
        gauge("gateway_cache_flights", "Answers under way that others may join.", lambda: len(cache.flights))
        gauge("gateway_control_age_seconds", "Since the control channel was read.", lambda: self.control.age_seconds)
        gauge("gateway_price_age_days", "Days since the oldest price in use was checked.", self._price_age_days)
        gauge("gateway_spool_available", "0 when the spool cannot take rows.", lambda: self.spool.available)
        gauge("gateway_spool_open_intents", "Calls at a vendor.", lambda: self.spool.open_intents)
        gauge(
            "gateway_spool_unsynced_seconds", "Age of the oldest line not on disk.", lambda: self.spool.unsynced_seconds
        )
        gauge("gateway_log_lines_dropped", "Lines its consumer was too slow for.", lambda: self.lines.dropped)
        gauge("gateway_limits_local_calls", "Calls judged here alone: Redis was away.", lambda: limits.local_calls)
        gauge("gateway_limits_budgets_whole", "0 while Redis lacks what was used.", lambda: limits.budgets.whole)
        gauge("gateway_limits_lost_settlements", "Settlements given up.", lambda: limits.lost_settlements)
        states = self.telemetry.states
        states("gateway_target_up", "0 while a target rests.", ("provider", "target"), self._targets_up)
        states("gateway_vendor_key_up", "0 while a vendor's key rests.", ("provider", "key"), self._keys_up)
        states(
            "gateway_budget_used_ratio", "Of a day's or month's budget; 1 is all.", ("tenant", "limit"), self._budgets
        )
        warnings, warned = self.warnings, "Warnings of budgets nearly used up, by what became of them."
        gauge("gateway_budget_warnings", warned, lambda: warnings.sent, outcome="sent")
        gauge("gateway_budget_warnings", warned, lambda: warnings.left, outcome="left")
        gauge("gateway_budget_warnings", warned, lambda: warnings.dropped, outcome="dropped")
        gauge("gateway_webhook_failures", "Failed attempts to send a warning.", lambda: warnings.failed)
        gauge("gateway_spool_rows", "Rows written by this process.", lambda: self.spool.rows)
        gauge("gateway_spool_write_failures", "Rows that could not be written.", lambda: self.spool.write_failures)
        if self.content is not None:
            content = self.content
            gauge("gateway_content_captured", "Calls whose content was handed to its writer.", lambda: content.taken)
            gauge("gateway_content_dropped", "Calls whose content it could not take.", lambda: content.dropped)
        if shipper is None:
            return
        gauge(
            "gateway_dependency_up", "1 when the dependency answers.", lambda: shipper.status.postgres == "up",
            name="postgres",
        )  # fmt: skip
        gauge("gateway_spool_bytes", "Bytes not shipped yet.", lambda: shipper.status.backlog_bytes)
        gauge("gateway_ledger_lag_seconds", "Age of the oldest unshipped row.", lambda: shipper.status.lag_seconds)
        gauge("gateway_ledger_shipped_rows", "Rows shipped.", lambda: shipper.status.shipped_rows)
        gauge("gateway_ledger_dead_letters", "Undecodable lines set aside.", lambda: shipper.status.dead_letters)

        def lake() -> LakeStatus:
            return shipper.status.lake or LakeStatus()

        gauge("gateway_lake_files", "Files written to the lake.", lambda: lake().files)
        gauge("gateway_lake_backlog_bytes", "Bytes of segments that wait for the lake.", lambda: lake().backlog_bytes)
        gauge("gateway_lake_dropped_segments", "Let go, the disk being short.", lambda: lake().dropped_segments)
        gauge("gateway_lake_up", "0 while the lake takes no files.", lambda: lake().error is None)


def serve(options: Options) -> int:
    """Runs a replica to its end: 0 after a drain, 1 when it could not start (the reason is on standard error)."""
    ambient = Ambient()
    try:
        source = ConfigSource(options.config, options.environment, options.overlays, os.environ)
    except ConfigError as error:
        sys.stderr.write(f"The configuration is not valid:\n{error}\n")
        return 1
    lines = Lines()
    level = os.environ.get("LOG_LEVEL", "INFO").upper()
    if level not in logging.getLevelNamesMapping():
        sys.stderr.write(f"LOG_LEVEL is {level!r}; it may be DEBUG, INFO, WARNING, ERROR or CRITICAL.\n")
        return 1
    logging.basicConfig(level=level, handlers=[JsonLog(lines, ambient)], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)

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
