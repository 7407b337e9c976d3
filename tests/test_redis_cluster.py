"""A Redis Cluster behind the face of one Redis: what lies where, a journey over it, and what becomes of a lost node."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme
from hiredis import Reader, pack_command
from hypothesis import given
from hypothesis import strategies as st

from app.cache import Scope
from app.cache.learner import REFIT, Observation
from app.cache.once import Kept, once
from app.cache.shelf import tenants
from app.cache.verifier import FEATURES
from app.config import Credential, Quota, Secret, VendorKey
from app.control import tell, told
from app.core import Fetch
from app.errors import LimitError
from app.limits import Limits
from app.limits.budgets import Budgets
from app.limits.scopes import MOST, Scripts, grant_scope, make_scope, whole_mark
from app.redis_cluster import SLOTS, ClusterPipe, _Node, is_cluster, key_of, pipe_to, seeds, slot_of, slot_tags
from app.redis_pipe import Argument, OnError, RedisAway, RedisPipe, RedisRefused, RedisUnasked, Waiting
from tests.cache_parts import tenant
from tests.gateway_parts import Rooms, ScriptedAnswer, completion, headers_of
from tests.limits_parts import OPEN, SHARE, Caller, Counters, a_config, a_key, a_tenant, not_just_before_midnight
from tests.redis_parts import AMBIENT, RedisCluster, RedisServer, redis_cluster, redis_server, run, running, until, wire
from tests.test_cache_semantic import REFUND, REFUND_TOO, Replica, Words, entry_of, text_of
from tests.test_cache_semantic import of as question
from tests.test_limits_rebuild import Ledger, configured, spent
from tests.test_recall import CONFIG, Client

APP = Path(__file__).parents[1] / "app"
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
TIGHT = {"rpm": 3, "tpm": 1000, "concurrency": 50, "daily_tokens": 10_000, "daily_nanos": 10_000}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """A cluster that has lost nothing. Each test has owners of its own in it."""

    async def mark() -> None:
        async with running(opened(cluster)) as pipe:
            await Budgets(pipe, AMBIENT, None, None).run_once()

    # No test waits for a failover, and a busy machine may let a node stand still for a second.
    with redis_cluster(tmp_path_factory.mktemp("cluster"), password="hush", node_timeout_ms=5_000) as cluster:
        run(mark())
        yield cluster


def opened(cluster: RedisCluster, kind: type[ClusterPipe] = ClusterPipe, timeout_ms: float = 5000) -> ClusterPipe:
    return kind(cluster.url, AMBIENT, timeout_ms=timeout_ms, probe_seconds=0.05, probation_seconds=0)


# --- the address ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "nodes"),
    [
        ("redis://a:7000,b:7001", ["redis://a:7000/0", "redis://b:7001/0"]),
        ("rediss://me:hu,sh@a,b:1/0?x=y", ["rediss://me:hu,sh@a:6379/0?x=y", "rediss://me:hu,sh@b:1/0?x=y"]),
        ("rediss+cluster://one.name", ["rediss://one.name:6379/0"]),
        ("redis://[::1]:7000,[::2]", ["redis://[::1]:7000/0", "redis://[::2]:6379/0"]),
    ],
)
def test_a_cluster_is_named_by_its_addresses_or_by_its_scheme(url: str, nodes: list[str]) -> None:
    assert is_cluster(url)
    assert list(seeds(url).values()) == nodes
    assert isinstance(pipe_to(url, AMBIENT), ClusterPipe)


@pytest.mark.parametrize("url", ["redis://a:7000", "rediss://me:hu,sh@a/3", "unix:///run/redis.sock"])
def test_one_redis_is_no_cluster(url: str) -> None:
    assert not is_cluster(url)
    assert isinstance(pipe_to(url, AMBIENT), RedisPipe)


@pytest.mark.parametrize("url", ["redis://a,b/1", "unix+cluster:///x", "redis://,"])
def test_an_address_that_cannot_be_a_cluster_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="Redis Cluster"):
        pipe_to(url, AMBIENT)


def test_a_node_that_is_named_as_one_redis_is_told_of_once(
    cluster: RedisCluster, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with running(RedisPipe(f"redis://:hush@127.0.0.1:{cluster.nodes[0].port}", AMBIENT)) as pipe:
            answers = [await asyncio.gather(pipe.execute("GET", f"k{n}"), return_exceptions=True) for n in range(20)]
            assert sum(isinstance(answer, RedisRefused) for (answer,) in answers) > 1

    run(main())
    assert [line.getMessage() for line in caplog.records if "redis+cluster://" in line.getMessage()] == [
        "redis is a node of a cluster: name it as one, redis+cluster://HOST:PORT or redis://A,B,C"
    ]


# --- what lies where --------------------------------------------------------------------------------------------------


def test_commands_go_to_the_node_that_has_their_key(cluster: RedisCluster) -> None:
    async def main() -> list[bytes]:
        async with running(opened(cluster)) as pipe:
            await asyncio.gather(*(pipe.execute("SET", f"k{n}", n) for n in range(300)))
            return await asyncio.gather(*(pipe.execute("GET", f"k{n}") for n in range(300)))

    assert run(main()) == [b"%d" % n for n in range(300)]
    assert all(cluster.serving(f"k{n}").client.get(f"k{n}") == str(n) for n in range(300))


def test_every_slot_has_a_tag_of_its_own() -> None:
    assert [slot_of(whole_mark(slot)) for slot in range(SLOTS)] == list(range(SLOTS))
    assert len(set(slot_tags())) == SLOTS


SCRIPTS = Scripts(b"1" * 40, b"2" * 40, apart=True)


class Watched(ClusterPipe):
    """Keeps what was sent."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sent: list[tuple[str, ...]] = []

    def execute(self, *arguments: Argument) -> asyncio.Future[Any]:
        self.sent.append(unpacked(pack_command(arguments)))
        return super().execute(*arguments)

    def ask(self, command: bytes, key: Argument) -> asyncio.Future[Any]:
        self._keep(command, key)
        return super().ask(command, key)

    def send(self, *arguments: Argument, **more: Any) -> None:
        self.sent.append(unpacked(pack_command(arguments)))
        super().send(*arguments, **more)

    def tell(self, command: bytes, key: Argument, on_error: OnError | None = None) -> None:
        self._keep(command, key)
        super().tell(command, key, on_error)

    def _keep(self, command: bytes, key: Argument) -> None:
        arguments = unpacked(command)
        self.sent.append(arguments)
        assert slot_of(key) == slot_of(key_of(arguments))


def unpacked(command: bytes) -> tuple[str, ...]:
    """A command's arguments, as Redis reads them."""
    reader = Reader()
    reader.feed(command)
    arguments = tuple(argument.decode("latin-1") for argument in reader.gets())
    assert not reader.has_data()
    return arguments


async def everything(pipe: Watched, folder: Path, owner: str, key_id: str, vendor: str) -> None:
    """Has each room do each thing that it does with Redis, for these names."""
    who = a_tenant(
        owner, rpm=1000, tpm=10**6, concurrency=99, daily_tokens=10**6, daily_nanos=10**9, monthly_nanos=10**9
    )
    key = msgspec.structs.replace(a_key(rpm=999, concurrency=99, daily_nanos=10**9), id=key_id)
    limits = Limits(pipe, AMBIENT, configured(who), Ledger(spent(7, 7, 7, id=owner)))
    caller = Caller(limits, who, key=key, away=OPEN, rpm=10**6, tpm=10**9)
    ask = question(REFUND, who=owner, mode="verified")
    fetch = Fetch(ask.key, ask.key + ":lease", f"sc:{{{owner}}}:_used")
    held = await limits.reserve(caller.call(), who, 1, 1, fetch)
    limits.run_once()
    limits.settle(held, 5, 5)
    await limits.look(caller.call().config, who, key)
    await limits.grant(VendorKey(vendor, Credential(Secret("x")), 1, Quota(rpm=9, tpm=9)), f"{owner}-1", 1)
    limits.budgets.owe(make_scope(caller.call().config, who, key, AMBIENT.now(), SCRIPTS), 1, 1, int(AMBIENT.now()))
    await limits.budgets.run_once()
    await limits.budgets._restore_all(int(AMBIENT.now()))

    semantic = Replica(pipe, None, "r1", Words())  # type: ignore[arg-type]
    rooms = Rooms(folder, ambient=AMBIENT, pipe=pipe)
    rooms.spool.close()
    cache = rooms.cache
    cache.semantic = semantic.questions
    seen = await semantic.questions.find(ask)
    await cache.look(ask, "call-1")
    cache.hold_lease(ask, "call-1")
    cache.run_once()
    cache.let_go_lease(ask)
    made = caller.call()
    mark = once(made, "chat", owner, "key-1")
    await cache.marks.claim(mark)
    cache.hold_mark(mark)
    cache.finish(mark, owner, tenant(owner).cache, Kept(200, False, None, b"{}"))
    cache.keep(ask, seen, entry_of("Within 30 days."))
    await semantic.questions.settled()
    again = await semantic.questions.find(question(REFUND_TOO, who=owner, mode="static"))
    assert text_of(again) == "Within 30 days."
    semantic.questions.reverified(ask, again, entry_of("Not any more."))
    await semantic.questions.settled()
    for number in range(REFIT + 1):
        sign = 1.0 if number % 2 else -1.0
        semantic.learning.note(ask, Observation((sign,) * len(FEATURES), number % 2 == 0, 1.0, 0.5))
    semantic.learning.model(owner, 0.5)
    assert await semantic.learning.run_once() == 1
    await cache.invalidate(Scope(owner), "ann")
    await cache.invalidate(Scope(owner, tag="kb:7"), "ann")
    await asyncio.gather(*cache._sweeping)
    await semantic.questions.settled()
    assert owner in [name async for name in tenants(pipe)]
    await pipe.execute("SET", f"warned:{owner}", 1, "NX", "EX", 9)


def test_all_keys_of_a_command_are_in_one_slot(cluster: RedisCluster, tmp_path: Path) -> None:
    """Redis itself says which of its words are keys; every script of the product is among them."""

    async def main() -> Watched:
        async with running(opened(cluster, Watched)) as pipe:
            await everything(pipe, tmp_path, "acme-corp", "k3f9a0b1c2d4", "openai:main")
            await pipe.execute("PING")
            return pipe

    pipe = run(main())
    client = cluster.nodes[0].client
    shapes = {(each[0], each[1] if each[0] == "EVALSHA" else len(each)): each for each in pipe.sent}
    keyed = [command for command in shapes.values() if command[0] not in ("PING", "TIME")]
    for command in keyed:
        keys = client.command_getkeys(*command)
        assert len({slot_of(key) for key in keys}) == 1, (command[0], keys)
        assert str(key_of(command)) == keys[0]
    ran = {pipe.scripts[command[1].encode()] for command in keyed if command[0] == "EVALSHA"}
    assert [path.name for path in APP.rglob("*.lua") if path.read_text() not in ran] == []


@given(owner=NAMES, key_id=NAMES, vendor=NAMES)
def test_whatever_their_names_the_limits_of_one_owner_are_in_one_slot(owner: str, key_id: str, vendor: str) -> None:
    key = msgspec.structs.replace(a_key(**TIGHT), id=key_id)
    scope = make_scope(a_config(shared=Quota(rpm=1, tpm=1)), a_tenant(owner, **TIGHT), key, AMBIENT.now(), SCRIPTS)
    grant = grant_scope(VendorKey(vendor, Credential(Secret("x")), 1, Quota(rpm=9, tpm=9)), SCRIPTS)
    for each in (scope, *scope.apart, grant):
        for command in (each.reserve("call-1", 1, 1), each.settle("call-1", 1, MOST, MOST)):
            assert len(slots_of(command) | {slot_of(each.record)}) == 1
    assert [limit.key for limit in scope.limits] == [name for each in (scope, *scope.apart) for name in each.keys]
    fetch = Fetch(f"sc:{{{owner}}}:a:x:1", f"sc:{{{owner}}}:a:x:1:lease", f"sc:{{{owner}}}:_used")
    assert len(slots_of(scope.reserve("call-1", 1, 1, fetch))) == 1


def slots_of(command: bytes) -> set[int]:
    """Those of a script's keys."""
    arguments = unpacked(command)
    return {slot_of(name) for name in arguments[3 : 3 + int(arguments[2])]}


# --- limits -----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def limits_on(cluster: RedisCluster, timeout_ms: float = 5000, **options: Any) -> AsyncIterator[Limits]:
    async with running(opened(cluster, timeout_ms=timeout_ms)) as pipe:
        limits = Limits(pipe, AMBIENT, **options)  # type: ignore[arg-type]
        limits.pipe = pipe  # type: ignore[attr-defined]
        yield limits


def elsewhere(cluster: RedisCluster, *names: str) -> Iterator[str]:
    """Names whose keys are on none of the nodes that have these names' keys."""
    ports = {cluster.serving(f"{{{name}}}").port for name in names}
    return (name for n in range(10_000) if cluster.serving(f"{{{(name := f'team-{n}')}}}").port not in ports)


def key_elsewhere(cluster: RedisCluster, *names: str, **quota: Any) -> Any:
    ports = {cluster.serving(f"{{{name}}}").port for name in names}
    id = next(id for n in range(100) if cluster.serving(f"{{_key.{(id := f'{names[-1]}-{n}')}}}").port not in ports)
    return msgspec.structs.replace(a_key(**quota), id=id)


def test_limits_of_two_replicas_are_exact_on_three_nodes(cluster: RedisCluster) -> None:
    name = next(elsewhere(cluster, "_global"))
    who = a_tenant(name, rpm=40, tpm=100_000)
    key = key_elsewhere(cluster, "_global", name, rpm=30)

    async def main() -> list[bool]:
        async with limits_on(cluster) as one, limits_on(cluster) as other:
            callers = [Caller(one, who, key=key, rpm=10_000), Caller(other, who, key=key, rpm=10_000)]
            callers[1]._made = 1000  # ids of its own
            taken = await asyncio.gather(*(callers[n % 2].admitted(10) for n in range(100)))
            await asyncio.gather(*(one.pipe.execute("GET", f"{{{tag}}}") for tag in (name, f"_key.{key.id}")))
            await asyncio.gather(*(other.pipe.execute("GET", f"{{{tag}}}") for tag in (name, f"_key.{key.id}")))
            return taken

    assert sum(run(main())) == 30
    mine, keys = (Counters(cluster.serving(f"{{{tag}}}"), tag) for tag in (name, f"_key.{key.id}"))
    assert (mine.rpm, mine.tpm, keys.rpm) == (30, 300, 30)


def test_what_all_share_is_not_taken_by_what_a_tenant_is_refused(cluster: RedisCluster) -> None:
    who = a_tenant("refused-itself", rpm=1)
    shared = Counters(cluster.serving("{_global}"), "_global")

    async def main() -> tuple[int, str | None]:
        async with limits_on(cluster) as limits:
            caller = Caller(limits, who, rpm=10_000)
            await caller.reserve()
            before = shared.rpm
            refused = [await caller.refusal() for _ in range(3)]
            await limits.pipe.execute("GET", "{_global}")
            return shared.rpm - before, refused[0].limit

    assert run(main()) == (0, "tenant_rpm")


def test_what_the_last_refuses_is_given_back_by_the_first(cluster: RedisCluster) -> None:
    not_just_before_midnight(15)
    who = a_tenant("given-back", rpm=100, concurrency=100, daily_tokens=1000)
    key = key_elsewhere(cluster, "given-back", rpm=1)
    fetch = Fetch("sc:{given-back}:a:x:1", "sc:{given-back}:a:x:1:lease", "sc:{given-back}:_used")

    async def main() -> Any:
        async with limits_on(cluster) as limits:
            caller = Caller(limits, who, key=key)
            limits.settle(await caller.reserve(), 5, 0)
            with pytest.raises(LimitError) as caught:
                await limits.reserve(caller.call(), who, 7, 0, fetch)
            await limits.pipe.execute("GET", "{given-back}")
            return caught.value

    error = run(main())
    assert error.limit == "key_rpm"
    assert error.rates.remaining_requests == 0
    server = cluster.serving("{given-back}")
    assert Counters(server, "given-back").all[:4] == (1, 0, 0, 5)
    assert not server.client.exists(fetch.lease)


def test_a_refusal_names_the_last_owner_though_the_first_had_just_enough(cluster: RedisCluster) -> None:
    not_just_before_midnight(15)
    who = a_tenant("just-enough", rpm=9, tpm=100, daily_tokens=12)
    key = key_elsewhere(cluster, "just-enough", rpm=1)

    async def main() -> tuple[LimitError, float]:
        async with limits_on(cluster) as limits:
            caller = Caller(limits, who, key=key)
            await caller.reserve(5)
            refused = await caller.refusal(7)
            return refused, limits.budgets_used()[0][2]

    refused, used = run(main())
    assert refused.limit == "key_rpm"
    assert refused.rates.remaining_tokens == 7
    assert used == pytest.approx(5 / 12)


def test_an_answer_from_before_takes_one_request_of_each_owner_and_no_more(cluster: RedisCluster) -> None:
    not_just_before_midnight(15)
    who = a_tenant("answered", rpm=100, tpm=1000)
    key = key_elsewhere(cluster, "answered", rpm=100, tpm=10, concurrency=1, daily_tokens=10)
    fetch = Fetch("sc:{answered}:a:x:1", "sc:{answered}:a:x:1:lease", "sc:{answered}:_used")
    server, other = cluster.serving("{answered}"), cluster.serving(f"{{_key.{key.id}}}")
    server.client.set(fetch.entry, "an answer")

    async def main() -> Any:
        async with limits_on(cluster) as limits:
            caller = Caller(limits, who, key=key)
            running = await caller.reserve(10)  # the key's tokens and calls at once are used up
            held = await limits.reserve(caller.call(), who, 500, 0, fetch)
            limits.settle(held, 0, 0)
            shown = await limits.look(caller.call().config, who, key)
            limits.settle(running, 10, 0)
            await limits.pipe.execute("GET", f"{{_key.{key.id}}}")
            return held.fetched, shown

    fetched, shown = run(main())
    assert fetched == b"an answer"
    assert (shown.remaining_requests, shown.remaining_tokens) == (98, 0)
    assert Counters(server, "answered").all[:2] == (2, 10)
    assert Counters(other, f"_key.{key.id}").all[:4] == (2, 10, 0, 10)


def test_a_node_that_lost_its_counters_gets_them_from_the_ledger_and_the_others_keep_theirs(tmp_path: Path) -> None:
    not_just_before_midnight(30)
    with redis_cluster(tmp_path) as cluster:
        lost = next(elsewhere(cluster, "_global"))
        kept = next(elsewhere(cluster, "_global", lost))
        both = [a_tenant(name, daily_tokens=1000) for name in (lost, kept)]
        ledger = Ledger(spent(900, 0, 0, id=lost), spent(1, 0, 0, id=kept))

        async def main() -> tuple[list[bool], str | None]:
            async with limits_on(cluster, current=configured(*both), read_spent=ledger) as limits:
                budgets = asyncio.create_task(limits.budgets.run())
                await until(lambda: limits.budgets.made_good)
                callers = [Caller(limits, who, away=OPEN) for who in both]
                held = [await caller.reserve(50) for caller in callers]
                for each in held:
                    limits.settle(each, 50, 0)
                cluster.serving(f"{{{lost}}}").client.flushall()
                while (await callers[0].reserve(1)).held:  # by its own share from when the loss is seen
                    pass
                limits.settle(await callers[1].reserve(7), 7, 0)
                await until(lambda: limits.budgets.made_good)
                await limits.budgets.run_once()
                refused = await callers[0].refusal(200)
                budgets.cancel()
                await asyncio.gather(budgets, return_exceptions=True)
                return [each.held for each in held], refused.limit

        assert run(main()) == ([True, True], "tenant_daily_tokens")
        assert len(ledger.asked) == 2
        # What the ledger says of the one that was never lost is not believed; what it used meanwhile is charged.
        assert Counters(cluster.serving(f"{{{kept}}}"), kept).day_tokens == 58
        assert Counters(cluster.serving(f"{{{lost}}}"), lost).day_tokens >= 900


def test_a_node_that_comes_back_empty_is_not_begun_anew_by_what_was_used_without_it(tmp_path: Path) -> None:
    not_just_before_midnight(60)
    with redis_cluster(tmp_path) as cluster:
        lost = next(elsewhere(cluster, "_global"))
        node = cluster.serving(f"{{{lost}}}")
        who = a_tenant(lost, daily_tokens=1000)
        ledger = Ledger(spent(900, 0, 0, id=lost))

        async def main() -> tuple[bool, str | None]:
            async with limits_on(cluster, current=configured(who), read_spent=ledger) as limits:
                budgets = asyncio.create_task(limits.budgets.run())
                await until(lambda: limits.budgets.made_good)
                caller = Caller(limits, who, away=OPEN)
                node.kill()
                await until(lambda: not limits.pipe.up)
                held = await caller.reserve(30)
                limits.settle(held, 30, 0)
                shutil.rmtree(next(node.folder.glob("appendonly*")))
                node.start()
                await until(lambda: "cluster_state:ok" in node.client.execute_command("CLUSTER", "INFO"))
                await until(lambda: Counters(node, lost).day_tokens)
                await until(lambda: limits.pipe.up and limits.budgets.made_good)
                refused = await caller.refusal(200)
                budgets.cancel()
                await asyncio.gather(budgets, return_exceptions=True)
                return held.held, refused.limit

        assert run(main()) == (False, "tenant_daily_tokens")
        assert len(ledger.asked) == 2
        assert Counters(node, lost).day_tokens >= 900


# --- the journey ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def replica(cluster: RedisCluster, folder: Path, *script: Any, name: str) -> AsyncIterator[Client]:
    async with running(opened(cluster)) as pipe:
        rooms = Rooms(folder / name, *script, ambient=AMBIENT, pipe=pipe, limits=Limits(pipe, AMBIENT), replica=name)
        await rooms.channel.run_once()
        try:
            yield Client(rooms)
        finally:
            rooms.spool.close()


def test_two_replicas_serve_one_cache_one_budget_and_hear_one_channel(cluster: RedisCluster, tmp_path: Path) -> None:
    async def main() -> tuple[Any, ...]:
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
        answers = [ScriptedAnswer(completion())] * 2
        async with (
            replica(cluster, tmp_path, *answers, name="one") as one,
            replica(cluster, tmp_path, *answers, name="two") as two,
        ):
            first = await one.ask(config=CONFIG)
            entry = await _kept(cluster)
            second = await two.ask(config=CONFIG)
            await tell(cluster.url, AMBIENT, "revoked", "k1", "leaked", "ann@host")
            heard = [await each.rooms.channel.run_once() for each in (one, two)]
            revoked = await told(cluster.url, AMBIENT, "revoked")
            await one.rooms.cache.invalidate(Scope("acme-corp"), "ann@host")
            await until(lambda: not cluster.serving(entry).client.exists(entry))
            await two.rooms.channel.run_once()
            third = await two.ask(config=CONFIG)
            seen = [headers_of(reply)["x-cache"] for reply in (first, second, third)]
            return seen, heard, "k1" in revoked["revoked"], len(one.rooms.rows()), len(two.rooms.rows())

    seen, heard, revoked, *rows = run(main())
    assert seen == ["MISS", "HIT (exact)", "MISS"]
    assert min(heard) >= 1
    assert revoked
    assert rows == [1, 2]


async def _kept(cluster: RedisCluster) -> str:
    """The entry of the one answer that is kept."""
    client = cluster.serving("{acme-corp}").client
    await until(lambda: [key for key in client.keys("sc:{acme-corp}:*:x:*") if not key.endswith(":lease")])
    return next(key for key in client.keys("sc:{acme-corp}:*:x:*") if not key.endswith(":lease"))


# --- encrypted --------------------------------------------------------------------------------------------------------


def test_a_cluster_is_asked_by_verified_tls_at_the_names_that_it_announces(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Redis of the development dependencies is built without TLS: each node has an encrypted way to it of its own."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)  # for the name: not for 127.0.0.1
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))

    async def main(cluster: RedisCluster) -> None:
        async with AsyncExitStack() as ways:
            ports = [await ways.enter_async_context(wire(node.port, lambda: 0.0, context)) for node in cluster.nodes]
            for node, port in zip(cluster.nodes, ports, strict=True):
                node.client.config_set("cluster-announce-hostname", "localhost")
                node.client.config_set("cluster-preferred-endpoint-type", "hostname")
                node.client.config_set("cluster-announce-port", port)
            announced = {f"localhost:{port}" for port in ports}
            await until(lambda: all(node_addresses(node) == announced for node in cluster.nodes))
            url = f"rediss+cluster://:hush@localhost:{ports[0]}"
            async with running(pipe_to(url, AMBIENT, timeout_ms=5000, probe_seconds=0.05), up=False) as pipe:
                await until(lambda: "certificate verify failed" in caplog.text)
                assert not pipe.up
            async with running(pipe_to(f"{url}?ssl_ca_certs={ca_file}", AMBIENT, timeout_ms=5000)) as pipe:
                assert {node.name for node in pipe.nodes} == {f"redis {address}" for address in announced}
                pipe._slots = [pipe.nodes[-1]] * SLOTS  # so that it points elsewhere for most of them
                await asyncio.gather(*(pipe.execute("SET", f"k{n}", n) for n in range(100)))
                assert await asyncio.gather(*(pipe.execute("GET", f"k{n}") for n in range(100))) == [
                    b"%d" % n for n in range(100)
                ]

    with redis_cluster(tmp_path / "cluster", password="hush") as cluster:
        run(main(cluster))
        assert all(cluster.serving(f"k{n}").client.get(f"k{n}") == str(n) for n in range(100))


def node_addresses(node: RedisServer) -> set[str]:
    """Where this node says that all are to be asked."""
    return {f"{host}:{port}" for _, _, (host, port, *_) in node.client.execute_command("CLUSTER", "SLOTS")}


# --- slots that move, nodes that go -----------------------------------------------------------------------------------


def test_commands_follow_a_slot_that_moves(tmp_path: Path) -> None:
    with redis_cluster(tmp_path, masters=2) as cluster:
        source, target = (node.client for node in cluster.nodes)
        ids = [client.execute_command("CLUSTER", "MYID") for client in (source, target)]
        tag = slot_tags()[0]

        async def main() -> list[Any]:
            async with running(opened(cluster)) as pipe:
                sum_up = pipe.script("return redis.call('INCRBY', KEYS[1], 1) + redis.call('INCRBY', KEYS[2], 1)")
                keys = f"{{{tag}}}:a", f"{{{tag}}}:b"
                found = [await pipe.execute("EVALSHA", sum_up, 2, *keys)]
                target.execute_command("CLUSTER", "SETSLOT", 0, "IMPORTING", ids[0])
                source.execute_command("CLUSTER", "SETSLOT", 0, "MIGRATING", ids[1])
                found.append(await pipe.execute("SET", f"{{{tag}}}:new", 1))  # ASK
                source.execute_command("MIGRATE", "127.0.0.1", cluster.nodes[1].port, keys[0], 0, 1000)
                split = asyncio.ensure_future(pipe.execute("EVALSHA", sum_up, 2, *keys))  # TRYAGAIN
                await asyncio.sleep(0)
                source.execute_command("MIGRATE", "127.0.0.1", cluster.nodes[1].port, keys[1], 0, 1000)
                found.append(await split)
                for client in (target, source):
                    client.execute_command("CLUSTER", "SETSLOT", 0, "NODE", ids[1])
                found.append(await pipe.execute("EVALSHA", sum_up, 2, *keys))  # MOVED
                await until(lambda: pipe._slots[0].name.endswith(f":{cluster.nodes[1].port}"))
                return found

        assert run(main()) == [2, b"OK", 4, 6]


@pytest.mark.parametrize(
    ("said", "raised"),
    [
        ("MOVED nonsense", RedisRefused),
        ("MOVED 99999 a:1", RedisUnasked),
        ("MOVED 7 evil.example:6379", RedisUnasked),
        ("ASK 7 evil.example:6379", RedisUnasked),
        ("CLUSTERDOWN The cluster is down", RedisUnasked),
        ("LOADING Redis is loading", RedisUnasked),
        ("WRONGTYPE of value", RedisRefused),
    ],
)
def test_whatever_a_node_says_the_command_gets_its_answer(said: str, raised: type[Exception]) -> None:
    """It is sent to no address that the slot map does not have."""

    async def main() -> None:
        pipe = pipe_to("redis://a:1,b:1", AMBIENT)
        node = _Node(pipe, "a:1", "redis://a:1/0")
        pipe._by_address["a:1"] = node
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        pipe.refused(node, Waiting(0.0, pack_command(("GET", "x")), future, None), RedisRefused(said))
        with pytest.raises(raised):
            await future
        assert set(pipe._by_address) == {"a:1"}

    run(main())


@pytest.mark.parametrize(("serves", "up"), [(True, False), (False, True)])
def test_a_replica_that_loads_takes_no_slot_away(serves: bool, up: bool) -> None:
    async def main() -> bool:
        pipe = pipe_to("redis://a:1,b:1", AMBIENT)
        node = _Node(pipe, "b:1", "redis://b:1/0")
        node.up = pipe.up = True
        if serves:
            pipe._slots[7] = node
        node.refused(
            Waiting(0.0, pack_command(("PING",)), None, None), RedisRefused("LOADING Redis is loading the dataset")
        )
        return pipe.up

    assert run(main()) is up


@pytest.mark.parametrize("full_coverage", ["yes", "no"])
def test_a_node_that_knows_of_no_slots_is_not_believed(
    cluster: RedisCluster, tmp_path: Path, full_coverage: str
) -> None:
    options = ["--cluster-require-full-coverage", full_coverage]

    async def main(stray: RedisServer) -> tuple[bool, int]:
        url = cluster.url.replace("@", f"@127.0.0.1:{stray.port},")
        async with running(ClusterPipe(url, AMBIENT, timeout_ms=5000, probe_seconds=0.05, probation_seconds=0)) as pipe:
            await until(lambda: all(node.up for node in pipe._by_address.values()))
            changes = pipe.changes
            for address, node in list(pipe._by_address.items()):
                if not address.endswith(f":{stray.port}"):
                    pipe.came(node)  # so that the stray one is asked first
            await pipe.run_once()
            return pipe.up, pipe.changes - changes

    with redis_server(tmp_path, *options, password="hush", bus=True) as stray:
        assert run(main(stray)) == (True, 0)


def test_a_dead_node_is_away_for_its_own_keys_alone(cluster: RedisCluster) -> None:
    name = next(elsewhere(cluster, "_global"))
    dead = cluster.serving(f"{{{name}}}")

    async def main() -> tuple[Any, ...]:
        async with limits_on(cluster, timeout_ms=1500) as limits:
            both = [Caller(limits, a_tenant(each, rpm=50), away=SHARE) for each in (name, "_global-neighbour")]
            both[1].tenant = a_tenant(next(elsewhere(cluster, name)), rpm=50)
            before = [await caller.reserve() for caller in both]
            dead.freeze()
            try:
                held = [(await caller.reserve()).held for caller in both]
                for each in before:
                    limits.settle(each, 1, 0)
                away = limits.pipe.up, len(limits._unsettled)
            finally:
                dead.thaw()
            await until(lambda: limits.pipe.up)
            await until(lambda: (limits.run_once(), len(limits._unsettled))[1] == 0)
            return held, away, limits.pipe.changes

    held, (up, unsettled), changes = run(main())
    assert held == [False, True]
    assert (up, unsettled >= 1) == (False, True)
    assert changes >= 3


@pytest.mark.parametrize("dead", ["_global", "asked-no-more", "_vendor.asked:no-more"])
def test_who_was_not_asked_is_given_nothing_back(cluster: RedisCluster, dead: str) -> None:
    """Else calls that took nothing would push out the settlements of those that did."""
    who = a_tenant("asked-no-more", rpm=50)
    key = msgspec.structs.replace(a_key(rpm=50), id="asked-no-more")
    vendor = VendorKey("asked:no-more", Credential(Secret("x")), 1, Quota(rpm=99, tpm=99))
    node = cluster.serving(f"{{{dead}}}")

    async def main() -> tuple[int, int]:
        async with limits_on(cluster, timeout_ms=1500) as limits:
            caller = Caller(limits, who, key=key, away=OPEN, rpm=10_000)
            node.freeze()
            try:
                with suppress(RedisAway):
                    await limits.pipe.execute("GET", f"{{{dead}}}")
                for n in range(20):
                    await caller.reserve()
                    await limits.grant(vendor, f"{dead}-{n}", 1)
                kept = len(limits._unsettled)
            finally:
                node.thaw()
            await until(lambda: limits.pipe.up)
            return kept, limits.lost_settlements

    assert run(main()) == (0, 0)
