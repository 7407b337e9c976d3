"""What a replica tells of itself: the gauges of its scrape, and what its /status says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from app.ambient import timestamp
from app.config import PRIORITIES, utc_day
from app.cooldowns import is_resting
from app.modes import STRICTNESS
from app.shipping import LakeReport
from app.telemetry import MAX_TENANTS, States

if TYPE_CHECKING:
    from app.asgi import Replica


def status(replica: Replica) -> dict[str, object]:
    """What the admin port's /status says."""
    now = replica.ambient.monotonic()
    config, resting = replica.source.current, replica.cooldowns.resting()
    mode, told = replica.modes.told(config)
    overload, shipper = replica.overload, replica.shipper
    return {
        "replica": replica.options.name,
        "environment": config.environment,
        "config_version": config.version,
        "config_fault": replica.config_fault,
        "uptime_seconds": round(now - replica.started, 1),
        "mode": mode,
        "mode_until": None if told is None or told.until is None else timestamp(told.until),
        "tenant_modes": {
            name: {"mode": entry.value, "until": None if entry.until is None else timestamp(entry.until)}
            for name, entry in replica.modes.tenants().items()
        },
        "draining": replica.door.draining,
        "in_flight": len(replica.door.in_flight),
        "overload": {
            "calls": overload.calls,
            "level": round(overload.level, 2),
            "delay_ms": round(overload.delay_seconds * 1000, 1),
        },
        "redis": "up" if replica.pipe.up else "down",
        "budgets": "whole" if replica.gateway.limits.budgets.made_good else "not whole",
        "postgres": shipper.status.postgres if shipper else "not configured",
        "control_age_seconds": round(replica.control.age_seconds, 1),
        "resting": sorted(resting),
        "targets": {
            target.name: "resting" if is_resting(target, resting) else "ok"
            for alias in config.aliases.values()
            for target in alias.targets
        },
        "vendor_errors": replica.telemetry.vendor_errors(),
        "spool": {
            "available": replica.spool.available,
            "open_intents": replica.spool.open_intents,
        },
        "shipper": msgspec.to_builtins(shipper.status) if shipper else None,
    }


def gauges(replica: Replica) -> None:
    """Has the replica's telemetry read all of them, whenever it is scraped."""
    _work(replica)
    _vendors(replica)
    _limits(replica)
    _memory(replica)
    _rows(replica)


def _work(replica: Replica) -> None:
    gauge, door, overload = replica.telemetry.gauge, replica.door, replica.overload
    gauge("gateway_inflight", "Calls being served.", lambda: len(door.in_flight))
    gauge("gateway_tasks", "Tasks of the event loop.", lambda: len(asyncio.all_tasks()))
    gauge("gateway_body_bytes", "Request bodies in memory.", lambda: door.bodies.held)
    gauge("gateway_overload_level", "Classes of tenants that are shed for it.", lambda: overload.level)
    for place, priority in enumerate(PRIORITIES):
        gauge(
            "gateway_shed_calls", "Calls refused in an overload.", lambda place=place: overload.shed[place],
            priority=priority,
        )  # fmt: skip
    gauge(
        "gateway_mode", "0 normal, 1 cache-only, 2 read-only, for everybody.",
        lambda: STRICTNESS[replica.modes.told(replica.source.current)[0]],
    )  # fmt: skip
    gauge("gateway_draining", "1 while this replica drains.", lambda: door.draining)
    gauge("gateway_log_lines_dropped", "Lines its consumer was too slow for.", lambda: replica.lines.dropped)


def _vendors(replica: Replica) -> None:
    def price_age_days() -> float:
        checked = replica.source.current.prices_checked_on
        return 0.0 if checked is None else float((utc_day(replica.ambient) - checked).days)

    def targets() -> Iterator[tuple[tuple[str, str], float]]:
        resting = replica.cooldowns.resting()
        for target in replica.source.current.targets.values():
            yield (target.provider.name, target.name), not is_resting(target, resting)

    def keys() -> Iterator[tuple[tuple[str, str], float]]:
        """A key that rests at one target only is up."""
        resting = replica.cooldowns.resting()
        providers = {target.provider.name: target.provider for target in replica.source.current.targets.values()}
        for provider in providers.values():
            for key in provider.keys:
                yield (provider.name, key.name), f"key:{key.name}" not in resting

    replica.telemetry.gauge("gateway_price_age_days", "Days since the oldest price in use was checked.", price_age_days)
    states = replica.telemetry.states
    states("gateway_target_up", "0 while a target rests.", ("provider", "target"), targets)
    states("gateway_vendor_key_up", "0 while a vendor's key rests.", ("provider", "key"), keys)


def _limits(replica: Replica) -> None:
    limits, pipe, warnings = replica.gateway.limits, replica.pipe, replica.warnings

    def budgets() -> Iterator[tuple[tuple[str, str], float]]:
        """The fullest by name; of the others the fullest, as `other`."""
        used = limits.budgets_used()
        for owner, limit, ratio in used[:MAX_TENANTS]:
            yield (owner, limit), ratio
        if len(used) > MAX_TENANTS:
            yield ("other", used[MAX_TENANTS][1]), used[MAX_TENANTS][2]

    gauge = replica.telemetry.gauge
    gauge("gateway_dependency_up", "1 when the dependency answers.", lambda: pipe.up, name="redis")
    gauge("gateway_dependency_changes", "Turns between up and down.", lambda: pipe.changes, name="redis")
    gauge("gateway_control_age_seconds", "Since the control channel was read.", lambda: replica.control.age_seconds)
    gauge("gateway_limits_local_calls", "Calls judged here alone: Redis was away.", lambda: limits.local_calls)
    gauge("gateway_limits_budgets_whole", "0 while Redis lacks what was used.", lambda: limits.budgets.whole)
    gauge("gateway_limits_lost_settlements", "Settlements given up.", lambda: limits.lost_settlements)
    replica.telemetry.states(
        "gateway_budget_used_ratio", "Of a day's or month's budget; 1 is all.", ("tenant", "limit"), budgets
    )
    warned = "Warnings of budgets nearly used up, by what became of them."
    gauge("gateway_budget_warnings", warned, lambda: warnings.sent, outcome="sent")
    gauge("gateway_budget_warnings", warned, lambda: warnings.left, outcome="left")
    gauge("gateway_budget_warnings", warned, lambda: warnings.dropped, outcome="dropped")
    gauge("gateway_webhook_failures", "Failed attempts to send a warning.", lambda: warnings.failed)


def _memory(replica: Replica) -> None:
    gauge, cache = replica.telemetry.gauge, replica.cache
    gauge("gateway_cache_lost", "Answers that Redis did not keep.", lambda: cache.lost)
    gauge("gateway_cache_damaged", "Entries that were none: deleted.", lambda: cache.damaged)
    gauge("gateway_cache_flights", "Answers under way that others may join.", lambda: len(cache.flights))
    states, learning = replica.telemetry.states, replica.learning
    looked, judged = ("tenant", "alias", "outcome"), ("tenant", "alias", "served", "verdict")
    states("gateway_semantic_looks_total", "Looks for the same meaning.", looked, bounded(learning.looks))
    states("gateway_semantic_judged_total", "Answers known right or wrong.", judged, bounded(learning.judged))
    thresholds = bounded(learning.thresholds, sums=False)
    states("gateway_semantic_threshold", "The chance from which on.", ("tenant",), thresholds)
    states("gateway_semantic_unlearned", "Observations no model has.", ("tenant",), bounded(learning.waiting))


def _rows(replica: Replica) -> None:
    gauge, spool, content, shipper = replica.telemetry.gauge, replica.spool, replica.content, replica.shipper
    gauge("gateway_spool_available", "0 when the spool cannot take rows.", lambda: spool.available)
    gauge("gateway_spool_open_intents", "Calls at a vendor.", lambda: spool.open_intents)
    gauge("gateway_spool_unsynced_seconds", "Age of the oldest line not on disk.", lambda: spool.unsynced_seconds)
    gauge("gateway_spool_rows", "Rows written by this process.", lambda: spool.rows)
    gauge("gateway_spool_write_failures", "Rows that could not be written.", lambda: spool.write_failures)
    if content is not None:
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

    def lake() -> LakeReport:
        return shipper.status.lake or LakeReport()

    gauge("gateway_lake_files", "Files written to the lake.", lambda: lake().files)
    gauge("gateway_lake_backlog_bytes", "Bytes of segments that wait for the lake.", lambda: lake().backlog_bytes)
    gauge("gateway_lake_dropped_segments", "Let go, the disk being short.", lambda: lake().dropped_segments)
    gauge("gateway_lake_up", "0 while the lake takes no files.", lambda: lake().error is None)


def bounded(read: States, sums: bool = True) -> States:
    """By name of so many tenants only, that the scrape stays bounded; the sums of the others, if they have one, are
    `other`'s.
    """

    def some() -> Iterator[tuple[tuple[str, ...], float]]:
        tenants: set[str] = set()
        others: dict[tuple[str, ...], float] = {}
        for labels, value in read():
            if labels[0] in tenants or len(tenants) < MAX_TENANTS:
                tenants.add(labels[0])
                yield labels, value
            elif sums:
                folded = ("other", *labels[1:])
                others[folded] = others.get(folded, 0.0) + value
        yield from others.items()

    return some
