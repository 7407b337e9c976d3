"""A Redis Cluster with the face of one Redis: to the rooms `ClusterPipe` is a `RedisPipe`. And who decides which it is.

Each node, replicas too, has a connection of its own (a `RedisPipe`), so that a replica which takes over is asked at
once. A command goes where the slot of its first key is; all keys of a command share a slot. Which node has which slots
is asked of the node that has been there for longest and knows all of them, when one was lost or pointed elsewhere, and
now and then. How slots are computed and what nodes say of them is redis-py's part.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from redis.cluster import parse_cluster_slots
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AskError, MovedError

from app.ambient import Ambient
from app.redis_pipe import (
    Argument,
    OnError,
    RedisAway,
    RedisPipe,
    RedisRefused,
    RedisUnasked,
    Waiting,
    pack_command,
)

SLOTS: int = REDIS_CLUSTER_HASH_SLOTS
_SCHEME = re.compile(r"(rediss?)(\+cluster)?")
_LOOK_SECONDS = 10.0
"""How often the slot map is asked for while nothing is wrong: new replicas show only there."""
_MOST_TURNS = 5
"""As many nodes may point elsewhere for one command; redis-py's clients go on for sixteen."""
_AGAIN_SECONDS = 0.02
"""A script's keys are on two nodes while their slot moves: some milliseconds later they are on one."""
_UNWELL = ("CLUSTERDOWN", "MASTERDOWN", "LOADING", "READONLY")
"""What a node says that cannot serve its slots just now."""


def pipe_to(
    url: str, ambient: Ambient, *, timeout_ms: float = 250, probe_seconds: float = 1.0, probation_seconds: float = 2.0
) -> RedisPipe | ClusterPipe:
    """One Redis; a cluster where the URL has several addresses by commas, or `redis+cluster`. Raises ValueError."""
    kind = ClusterPipe if is_cluster(url) else RedisPipe
    return kind(
        url, ambient, timeout_ms=timeout_ms, probe_seconds=probe_seconds, probation_seconds=probation_seconds
    )  # fmt: skip


def is_cluster(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme.endswith("+cluster") or "," in parts.netloc.rpartition("@")[2]


def seeds(url: str) -> dict[str, str]:
    """The addresses in a cluster's URL, each with the URL of that node alone. Raises ValueError."""
    parts = urlsplit(url)
    scheme = _SCHEME.fullmatch(parts.scheme)
    credentials, at, addresses = parts.netloc.rpartition("@")
    if scheme is None:
        raise ValueError("the URL of a Redis Cluster begins with redis:// or rediss://")
    if parts.path not in ("", "/", "/0"):
        raise ValueError("a Redis Cluster has database 0 only")
    found = {}
    for address in filter(None, addresses.split(",")):
        host, _, port = address.rpartition(":") if re.search(r":\d+$", address) else (address, "", "6379")
        found[f"{host}:{port}"] = parts._replace(
            scheme=scheme[1], netloc=f"{credentials}{at}{host}:{port}", path="/0"
        ).geturl()
    if not found:
        raise ValueError("the URL of a Redis Cluster names no address")
    return found


@lru_cache(1)
def slot_tags() -> tuple[str, ...]:
    """A hash tag for each slot: a key whose name holds it in braces lies there."""
    tags: dict[int, str] = {}
    number = 0
    while len(tags) < SLOTS:
        tags.setdefault(key_slot(b"%d" % number), str(number))
        number += 1
    return tuple(tags[slot] for slot in range(SLOTS))


def slot_of(key: Argument) -> int:
    return key_slot(key if isinstance(key, bytes) else str(key).encode())


def key_of(arguments: tuple[Argument, ...]) -> Argument | None:
    """The first key of a command as this product sends them; None for one without."""
    name = arguments[0]
    if name in ("EVALSHA", "EVAL"):
        return arguments[3] if arguments[2] else None
    place = 2 if name == "XINFO" else 1
    return arguments[place] if len(arguments) > place else None


class _Node(RedisPipe):
    """The connection to one node; its cluster hears when it comes, goes, or points elsewhere."""

    def __init__(self, cluster: ClusterPipe, address: str, url: str) -> None:
        super().__init__(
            url,
            cluster.ambient,
            timeout_ms=cluster.timeout_ms,
            probe_seconds=cluster.probe_seconds,
            probation_seconds=cluster.probation_seconds,
        )
        self.host = address.rpartition(":")[0]
        self.name = f"redis {address}"
        self.scripts = cluster.scripts
        self._cluster = cluster
        self.on_return.append(lambda: cluster.came(self))

    def lost(self, line: Any, reason: str) -> None:
        was_up = self.up
        super().lost(line, reason)
        if was_up and not self.up:
            self._cluster.unwell()

    def refused(self, waiting: Waiting, error: RedisRefused) -> None:
        self._cluster.refused(self, waiting, error)

    def is_none(self, error: RedisRefused) -> None:
        """It answers, but is no node of a cluster."""
        self._say(False, str(error))

    def again(self, waiting: Waiting, asking: bool = False) -> None:
        """Sends a command that another node, or this one, did not execute. One that nobody waits for any more is not
        sent: what undoes it may be on its way.
        """
        if waiting.future is not None and waiting.future.done():
            return
        if self._line is None or waiting.turns >= _MOST_TURNS:
            waiting.fail(RedisUnasked(f"{self.name} is away, or points elsewhere"))
            return
        if asking:
            self._line.write(pack_command(("ASKING",)), None, None)
        self._line.write(waiting.command, waiting.future, waiting.on_error, waiting.turns + 1)


class ClusterPipe:
    """The connections to a cluster's nodes. `run` keeps them.

    `up`: every slot has a master that answers. Where one has not, commands for its keys raise RedisAway and the others
    go on. `changes` counts the turns; what `on_return` holds is called each time all are there again.
    """

    apart = True

    def __init__(
        self,
        url: str,
        ambient: Ambient,
        *,
        timeout_ms: float = 250,
        probe_seconds: float = 1.0,
        probation_seconds: float = 2.0,
    ) -> None:
        self._seeds = seeds(url)
        self._any = next(iter(self._seeds.values()))
        self.ambient = ambient
        self.probation_seconds = probation_seconds
        self.scripts: dict[bytes, str] = {}
        self.on_return: list[Callable[[], None]] = []
        self.up = False
        self.changes = 0
        self._timeout_ms = timeout_ms
        self._probe_seconds = probe_seconds
        self._by_address: dict[str, _Node] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._slots: list[_Node | None] = [None] * SLOTS
        self._doubt = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None

    # --- as one Redis -------------------------------------------------------------------------------------------------

    script = RedisPipe.script

    def execute(self, *arguments: Argument) -> asyncio.Future[Any]:
        """As `RedisPipe.execute`."""
        return self._node(key_of(arguments)).ask(pack_command(arguments))

    def ask(self, command: bytes, key: Argument) -> asyncio.Future[Any]:
        """As `RedisPipe.ask`."""
        return self._node(key).ask(command)

    def send(self, *arguments: Argument, on_error: OnError | None = None) -> None:
        """As `RedisPipe.send`."""
        self._node(key_of(arguments)).tell(pack_command(arguments), on_error=on_error)

    def tell(self, command: bytes, key: Argument, on_error: OnError | None = None) -> None:
        """As `RedisPipe.tell`."""
        self._node(key).tell(command, on_error=on_error)

    @property
    def nodes(self) -> list[_Node]:
        """The masters: for what looks through all keys."""
        return list(dict.fromkeys(node for node in self._slots if node is not None))

    @property
    def timeout_ms(self) -> float:
        return self._timeout_ms

    @timeout_ms.setter
    def timeout_ms(self, value: float) -> None:
        self._timeout_ms = value
        for node in self._by_address.values():
            node.timeout_ms = value

    @property
    def probe_seconds(self) -> float:
        return self._probe_seconds

    @probe_seconds.setter
    def probe_seconds(self, value: float) -> None:
        self._probe_seconds = value
        for node in self._by_address.values():
            node.probe_seconds = value

    def _node(self, key: Argument | None) -> _Node:
        node = self._slots[0 if key is None else slot_of(key)]
        if node is None:
            raise RedisUnasked("no node of the cluster has this slot")
        return node

    # --- which node has what ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Connects to all nodes and follows what becomes of them. Cancelled, it closes first."""
        self._by_address.clear()
        self._running.clear()
        try:
            async with asyncio.TaskGroup() as self._group:
                for address, url in self._seeds.items():
                    self._meet(address, url)
                while True:
                    asked = self.ambient.monotonic()
                    self._doubt.clear()
                    await self.run_once()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_LOOK_SECONDS if self.up else self._probe_seconds):
                            await self._doubt.wait()
                    # However much is in doubt: what one node says of all is asked ten times a probe at most.
                    await self.ambient.sleep(max(0.0, asked + self._probe_seconds / 10 - self.ambient.monotonic()))
        finally:
            self._turned(False)
            self._slots = [None] * SLOTS

    async def run_once(self) -> bool:
        """Asks a node for the slot map; returns whether there was one to ask.

        Who has not all of it is not alone believed: a node that was reset, or cut off from the others, does not know.
        """
        best: tuple[int, bool, _Node, list[Any]] | None = None
        for node in [node for node in self._by_address.values() if node.up]:
            try:
                state, told = await asyncio.gather(node.execute("CLUSTER", "INFO"), node.execute("CLUSTER", "SLOTS"))
            except RedisAway:
                continue
            except RedisRefused as error:
                node.is_none(error)
                continue
            found = sum(last - first + 1 for first, last, *_ in told), b"cluster_state:ok" in state
            if best is None or found > best[:2]:
                best = *found, node, told
            if found == (SLOTS, True):
                break
        if best is None:
            self._turned(False)
            return False
        _, well, node, told = best
        self._take(node, told)
        self._turned(well and None not in self._slots and all(master.up for master in self.nodes))
        return True

    def _take(self, asked: _Node, told: list[Any]) -> None:
        slots: list[_Node | None] = [None] * SLOTS
        known = set(self._seeds)
        for (first, last), nodes in parse_cluster_slots(told, current_host=asked.host).items():
            primary, *replicas = (_address(*found) for found in (nodes["primary"], *nodes["replicas"]))
            known.update((primary, *replicas))
            for address in replicas:
                self._meet(address)
            slots[first : last + 1] = [self._meet(primary)] * (last + 1 - first)
        self._slots = slots
        for address in self._by_address.keys() - known:
            del self._by_address[address]
            self._running.pop(address).cancel()

    def _meet(self, address: str, url: str | None = None) -> _Node:
        node = self._by_address.get(address)
        if node is None:
            if url is None:
                parts = urlsplit(self._any)
                credentials, at, _ = parts.netloc.rpartition("@")
                url = parts._replace(netloc=f"{credentials}{at}{address}").geturl()
            node = self._by_address[address] = _Node(self, address, url)
            self._running[address] = self._group.create_task(node.run())
        return node

    def came(self, node: _Node) -> None:
        """A node answers. Those that were there before are asked before it: it may not know yet what it has missed."""
        for address, known in list(self._by_address.items()):
            if known is node:
                self._by_address[address] = self._by_address.pop(address)
        self._doubt.set()

    def unwell(self) -> None:
        """A node was lost, or cannot serve its slots."""
        self._doubt.set()
        if not all(node.up for node in self.nodes):
            self._turned(False)

    def refused(self, node: _Node, waiting: Waiting, error: RedisRefused) -> None:
        """A node has answered with an error: where that says who is to be asked instead, who it names is."""
        code, _, rest = str(error).partition(" ")
        if code == "TRYAGAIN" and waiting.turns < _MOST_TURNS:
            asyncio.get_running_loop().call_later(_AGAIN_SECONDS, node.again, waiting)
        elif code in ("MOVED", "ASK"):
            try:
                told = (MovedError if code == "MOVED" else AskError)(rest)
            except ValueError:
                waiting.fail(error)
                return
            other = self._by_address.get(_address(told.host or node.host, told.port))
            if code == "MOVED":
                self._doubt.set()
                if other is not None and 0 <= told.slot_id < SLOTS:
                    self._slots[told.slot_id] = other
            if other is None:
                waiting.fail(RedisUnasked("the slot has moved to a node that is not known yet"))
            else:
                other.again(waiting, asking=code == "ASK")
        elif code in (*_UNWELL, "TRYAGAIN"):
            if node.up and node in self.nodes:  # not a replica that still loads what its master has
                self._turned(False)
                self._doubt.set()
            waiting.fail(RedisUnasked(str(error)))
        else:
            waiting.fail(error)

    def _turned(self, up: bool) -> None:
        if up is self.up:
            return
        self.up = up
        self.changes += 1
        if up:
            for callback in self.on_return:
                callback()

    async def close(self) -> None:
        """As `RedisPipe.close`, every node."""
        await asyncio.gather(*(node.close() for node in self._by_address.values()))


def _address(host: str, port: int | str) -> str:
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


@asynccontextmanager
async def reached(url: str, ambient: Ambient, seconds: float) -> AsyncIterator[RedisPipe | ClusterPipe]:
    """A connection for a command's time; each of its steps has `seconds`. Raises RedisAway, for a faulty `url` too."""
    try:
        pipe = pipe_to(url, ambient, timeout_ms=seconds * 1000)
    except ValueError as error:
        raise RedisAway(f"REDIS_URL is no address of a Redis: {error}") from error
    there = asyncio.Event()
    pipe.on_return.append(there.set)
    running = asyncio.ensure_future(pipe.run())
    try:
        try:
            async with asyncio.timeout(seconds):
                await there.wait()
        except TimeoutError:
            if not any(node.up for node in pipe.nodes):  # of a cluster, some may be there
                raise RedisAway(f"no connection within {seconds:g} s") from None
        yield pipe
    finally:
        await pipe.close()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
