"""A Redis Cluster that loses masters under load: calls go on, rows are whole, limits come back. `make drills`."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from loadtest.stack import Stack
from tests.journey import OVERLAY, Journey, until
from tests.redis_parts import RedisCluster, redis_cluster
from tests.traffic import Traffic, p95

pytestmark = [pytest.mark.drill, pytest.mark.timeout(600)]

RPM = 1_000_000


class OnCluster(Stack):
    """The stack, its replicas on a cluster in the place of the one Redis."""

    cluster: RedisCluster

    @property
    def redis_url(self) -> str:
        return self.cluster.url


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    with redis_cluster(tmp_path_factory.mktemp("cluster"), replicas=True, password="hush") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, cluster: RedisCluster) -> Iterator[Journey]:
    overlay: dict[str, Any] = {
        "gateway": OVERLAY["gateway"] | {"redis": {"timeout_ms": 500, "probe_seconds": 0.5}},
        "tenants": {"tenant-a": OVERLAY["tenants"]["tenant-a"] | {"rpm": RPM}},
        "service_keys": {"suitekey0001": OVERLAY["service_keys"]["suitekey0001"] | {"tenants": ["tenant-a"]}},
    }
    stack = OnCluster(tmp_path_factory.mktemp("stack"), overlay=overlay, environ={}, report=lambda line: None)
    stack.cluster = cluster
    with stack, Journey(stack) as journey:
        until(lambda: all(status(journey, n) == ("up", "whole") for n in range(2)), 60)
        yield journey


def status(journey: Journey, number: int) -> tuple[str, str]:
    told = journey.admin("/status", number).json()
    return told["redis"], told["budgets"]


def judged_alone(journey: Journey) -> int:
    """Calls that replicas judged by their own counts."""
    return sum(
        int(float(re.search(r"^gateway_limits_local_calls\S* (\S+)", journey.admin("/metrics", n).text, re.M)[1]))
        for n in range(2)
    )


def running(traffic: Traffic, calls: int) -> None:
    before = len(traffic.calls)
    until(lambda: len(traffic.calls) >= before + calls, 120)


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGSTOP])
def test_a_master_that_goes_under_load_fails_no_call_and_loses_no_row(
    here: Journey, cluster: RedisCluster, way: signal.Signals
) -> None:
    first = cluster.master("{tenant-a}")
    with Traffic(here) as traffic:
        running(traffic, 100)
        before = judged_alone(here)
        first.signal(way)
        until(lambda: all(status(here, n)[0] == "down" for n in range(2)), 30)
        running(traffic, 50)
        assert judged_alone(here) > before
        until(lambda: all(status(here, n) == ("up", "whole") for n in range(2)), 60)
        running(traffic, 20)  # those that were judged before it was up
        taken_over = judged_alone(here)
        running(traffic, 100)
        assert judged_alone(here) == taken_over
        assert cluster.master("{tenant-a}", without=first) is not first
        if way == signal.SIGKILL:
            first.kill()  # to be started again, as a replica now
            first.start()
        else:
            first.thaw()
        until(lambda: all(cluster.whole(node) for node in cluster.nodes), 60)
        running(traffic, 50)
    assert traffic.outcomes() == {"whole"}
    assert p95(traffic.calls) < 2
    assert {event["status"] for event in here.rows(traffic.whole()).values()} == {"success"}
    window = cluster.master("{tenant-a}").client.hgetall("rl:{tenant-a}:rpm")
    assert 0 < int(window["sum"]) <= RPM
