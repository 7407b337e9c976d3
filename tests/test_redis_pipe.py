"""The shared Redis connection: order, loss, return, and what a Redis in trouble may cost."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from hiredis import pack_command
from hypothesis import given, settings
from hypothesis import strategies as st

from app.redis_pipe import TEXT, RedisAway, RedisPipe, RedisRefused, prepared
from tests.redis_parts import AMBIENT, DEADLINE_SECONDS, LOOPS, RedisServer, redis_server, run, running, until, wire

each_loop = pytest.mark.parametrize("loop", LOOPS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def frail(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of one's own, to freeze and kill."""
    with redis_server(tmp_path) as server:
        yield server


def pipe_to(url: str, **options: float) -> RedisPipe:
    return RedisPipe(url, AMBIENT, **{"timeout_ms": 2000, "probe_seconds": 0.05, "probation_seconds": 0, **options})


# --- commands and answers ---


@each_loop
def test_a_thousand_concurrent_calls_each_get_their_own_answer(server: RedisServer, loop: str) -> None:
    async def main() -> list[bytes]:
        async with running(pipe_to(server.url)) as pipe:
            return await asyncio.gather(*(pipe.execute("ECHO", str(n)) for n in range(1000)))

    assert run(main(), loop) == [str(n).encode() for n in range(1000)]


def test_commands_of_one_turn_of_the_loop_leave_as_one_pipeline(server: RedisServer) -> None:
    async def main() -> int:
        async with running(pipe_to(server.url)) as pipe:
            before = server.client.info("stats")["total_reads_processed"]
            await asyncio.gather(*(pipe.execute("GET", "k") for _ in range(500)))
            return server.client.info("stats")["total_reads_processed"] - before

    assert run(main()) < 20


@each_loop
def test_the_unix_socket_of_the_url_is_used(server: RedisServer, loop: str) -> None:
    async def main() -> bytes:
        async with running(pipe_to(f"unix://{server.socket}")) as pipe:
            return await pipe.execute("CLIENT", "INFO")

    assert b"redis.sock" in run(main(), loop)


@each_loop
def test_answers_come_through_verified_tls(server: RedisServer, tmp_path: Path, loop: str) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))

    async def main() -> list[bytes]:
        async with (
            wire(server.port, lambda: 0.0, context) as port,
            running(pipe_to(f"rediss://localhost:{port}?ssl_ca_certs={ca_file}")) as pipe,
        ):
            return await asyncio.gather(*(pipe.execute("ECHO", "x" * n) for n in (1, 100_000, 3)))

    assert [len(answer) for answer in run(main(), loop)] == [1, 100_000, 3]


def test_password_and_database_of_the_url_are_used(tmp_path: Path) -> None:
    async def main(url: str) -> bytes:
        async with running(pipe_to(url)) as pipe:
            return await pipe.execute("CLIENT", "INFO")

    with redis_server(tmp_path, password="hush") as locked:
        assert b" db=3 " in run(main(f"redis://:hush@127.0.0.1:{locked.port}/3"))


def test_an_error_answer_reaches_its_own_caller_only(server: RedisServer) -> None:
    async def main() -> list[object]:
        async with running(pipe_to(server.url)) as pipe:
            calls = [pipe.execute("ECHO", "a"), pipe.execute("NOSUCH"), pipe.execute("ECHO", "b")]
            return await asyncio.gather(*calls, return_exceptions=True)

    first, second, third = run(main())
    assert isinstance(second, RedisRefused)
    assert (first, third) == (b"a", b"b")


def test_what_nobody_waits_for_does_not_shift_the_answers(server: RedisServer) -> None:
    errors: list[Exception] = []

    async def main() -> bytes:
        async with running(pipe_to(server.url)) as pipe:
            pipe.send("ECHO", "unheard")
            pipe.send("NOSUCH", on_error=errors.append)
            pipe.send("NOSUCH")
            return await pipe.execute("ECHO", "heard")

    assert run(main()) == b"heard"
    assert [type(error) for error in errors] == [RedisRefused]


async def _some_hang_up(pipe: RedisPipe, callers: list[str]) -> None:
    calls = [asyncio.ensure_future(pipe.execute("ECHO", str(n))) for n in range(len(callers))]
    for call, caller in zip(calls, callers, strict=True):
        if caller == "hang up at once":
            call.cancel()
    await asyncio.sleep(0)
    for call, caller in zip(calls, callers, strict=True):
        if caller == "hang up later":
            call.cancel()
    for n, (call, caller) in enumerate(zip(calls, callers, strict=True)):
        if caller == "wait":
            assert await call == str(n).encode()
    assert await pipe.execute("ECHO", "after") == b"after"


def test_callers_who_hang_up_do_not_shift_the_answers(server: RedisServer) -> None:
    async def main() -> None:
        async with running(pipe_to(server.url)) as pipe:
            loop = asyncio.get_running_loop()

            @settings(max_examples=100, deadline=None)
            @given(st.lists(st.sampled_from(["wait", "hang up at once", "hang up later"]), min_size=1, max_size=40))
            def case(callers: list[str]) -> None:  # all on one connection, as in a replica
                asyncio.run_coroutine_threadsafe(_some_hang_up(pipe, callers), loop).result(DEADLINE_SECONDS)

            await asyncio.to_thread(case)

    run(main())


# --- scripts ---


def test_a_known_script_is_sent_by_its_digest_alone(server: RedisServer) -> None:
    async def main() -> dict[str, int]:
        async with running(pipe_to(server.url)) as pipe:
            sha = pipe.script("return tonumber(ARGV[1]) + 1")
            await pipe.execute("EVALSHA", sha, 0, 1)
            server.client.config_resetstat()
            assert [await pipe.execute("EVALSHA", sha, 0, n) for n in range(5)] == [1, 2, 3, 4, 5]
            return {name: stat["calls"] for name, stat in server.client.info("commandstats").items() if "eval" in name}

    assert run(main()) == {"cmdstat_evalsha": 5}


def test_a_script_that_redis_forgot_still_runs_within_the_call(server: RedisServer) -> None:
    async def main() -> list[int]:
        async with running(pipe_to(server.url)) as pipe:
            sha = pipe.script("return tonumber(ARGV[1]) * 2")
            await pipe.execute("EVALSHA", sha, 0, 1)
            server.client.script_flush()
            return await asyncio.gather(*(pipe.execute("EVALSHA", sha, 0, n) for n in range(50)))

    assert run(main()) == [2 * n for n in range(50)]


def test_a_script_that_nobody_waits_for_runs_though_redis_forgot_it(server: RedisServer) -> None:
    async def main() -> bytes:
        async with running(pipe_to(server.url)) as pipe:
            sha = pipe.script("return redis.call('SET', KEYS[1], 'done', 'EX', 60)")
            pipe.send("EVALSHA", sha, 1, "forgotten")
            await pipe.execute("PING")
            return await pipe.execute("GET", "forgotten")

    assert run(main()) == b"done"


@given(st.lists(st.tuples(st.text() | st.integers(), st.booleans()), min_size=1))
def test_a_prepared_command_is_what_packing_it_whole_makes_of_it(arguments: list[tuple[str | int, bool]]) -> None:
    command = prepared(*(TEXT if is_open else argument for argument, is_open in arguments))
    said = [str(argument).encode() for argument, is_open in arguments if is_open]
    assert command % tuple(x for each in said for x in (len(each), each)) == pack_command(
        tuple(argument for argument, _ in arguments)
    )


# --- Redis in trouble ---


@each_loop
def test_the_pipe_starts_without_redis_and_finds_it_later(tmp_path: Path, loop: str) -> None:
    later = RedisServer(tmp_path)

    async def main() -> bytes:
        async with running(pipe_to(later.url), up=False) as pipe:
            await until(lambda: pipe.changes)
            with pytest.raises(RedisAway):
                pipe.execute("PING")
            await asyncio.to_thread(later.start)
            await until(lambda: pipe.up)
            return await pipe.execute("ECHO", "there")

    try:
        assert run(main(), loop) == b"there"
    finally:
        later.kill()


@each_loop
def test_a_pipe_that_is_cancelled_while_it_connects_ends(server: RedisServer, loop: str) -> None:
    async def main() -> list[int]:
        stayed = []
        for turns in range(100):
            running = asyncio.create_task(pipe_to(server.url).run())
            for _ in range(turns):
                await asyncio.sleep(0)
            running.cancel()
            await asyncio.wait([running], timeout=30)
            if not running.done():
                stayed.append(turns)
                break
        return stayed

    assert run(main(), loop) == []


@each_loop
def test_a_frozen_redis_fails_what_waits_and_then_every_call_at_once(frail: RedisServer, loop: str) -> None:
    async def main() -> None:
        async with running(pipe_to(frail.url, timeout_ms=100)) as pipe:
            frail.freeze()
            answers = await asyncio.gather(*(pipe.execute("PING") for _ in range(50)), return_exceptions=True)
            assert [type(answer) for answer in answers] == [RedisAway] * 50
            assert not pipe.up
            with pytest.raises(RedisAway):
                pipe.execute("PING")
            frail.thaw()
            await until(lambda: pipe.up)
            assert await pipe.execute("ECHO", "back") == b"back"

    run(main(), loop)


@each_loop
def test_a_killed_redis_fails_what_waits_and_is_found_again(frail: RedisServer, loop: str) -> None:
    async def main() -> None:
        async with running(pipe_to(frail.url)) as pipe:
            waiting = pipe.execute("BLPOP", "never", 0)
            await asyncio.sleep(0)
            frail.kill()
            with pytest.raises(RedisAway):
                await waiting
            await asyncio.to_thread(frail.start)
            await until(lambda: pipe.up)
            assert await pipe.execute("ECHO", "back") == b"back"

    run(main(), loop)


def test_a_redis_that_became_slow_counts_as_away_until_it_is_fast_again(server: RedisServer) -> None:
    delay, chunks = 0.0, 0

    def late() -> float:
        nonlocal chunks
        chunks += 1
        return delay

    async def main() -> None:
        nonlocal delay, chunks
        async with (
            wire(server.port, late) as port,
            running(pipe_to(f"redis://127.0.0.1:{port}", timeout_ms=150)) as pipe,
        ):
            delay = 0.4
            with pytest.raises(RedisAway):
                await pipe.execute("PING")
            # Several probes: what is too slow for a call is too slow for a probe, so nothing flaps.
            chunks = 0
            await until(lambda: chunks >= 10)
            assert (pipe.up, pipe.changes) == (False, 2)
            delay = 0.0
            await until(lambda: pipe.up)
            assert pipe.changes == 3

    run(main())


def test_a_redis_that_comes_and_goes_is_away_until_it_stays(frail: RedisServer) -> None:
    async def main() -> None:
        async with running(pipe_to(frail.url, timeout_ms=100, probation_seconds=30.0)) as pipe:
            frail.freeze()
            await asyncio.gather(pipe.execute("PING"), return_exceptions=True)
            frail.thaw()
            for _ in range(6):  # each turn shorter than the half minute for which it must answer
                await asyncio.sleep(0.3)
                frail.freeze()
                await asyncio.sleep(0.2)
                frail.thaw()
            assert (pipe.up, pipe.changes) == (False, 2)

    run(main())


def test_each_loss_within_a_minute_doubles_for_how_long_redis_must_answer(frail: RedisServer) -> None:
    async def main() -> list[float]:
        probations = []
        async with running(pipe_to(frail.url, timeout_ms=100, probation_seconds=0.2)) as pipe:
            for _ in range(3):
                frail.freeze()
                await asyncio.gather(pipe.execute("PING"), return_exceptions=True)
                frail.thaw()
                began = time.monotonic()
                await until(lambda: pipe.up)
                probations.append(time.monotonic() - began)
        return probations

    assert [took >= least for took, least in zip(run(main()), (0.2, 0.4, 0.8), strict=True)] == [True] * 3


def test_a_probation_is_over_when_redis_has_answered_for_as_long(frail: RedisServer) -> None:
    async def main() -> None:
        async with running(pipe_to(frail.url, timeout_ms=100, probation_seconds=0.2)) as pipe:
            frail.freeze()
            await asyncio.gather(pipe.execute("PING"), return_exceptions=True)
            frail.thaw()
            await until(lambda: pipe.up)
            assert await pipe.execute("ECHO", "back") == b"back"

    run(main())


def test_a_redis_that_still_loads_counts_as_away() -> None:
    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while line := await reader.readline():
                if line.strip().upper() in (b"PING", b"CLIENT"):
                    writer.write(b"-LOADING Redis is loading the dataset in memory\r\n")
            writer.close()

        fake = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with fake, running(pipe_to(f"redis://127.0.0.1:{fake.sockets[0].getsockname()[1]}"), up=False) as pipe:
            await until(lambda: pipe.changes)
            assert not pipe.up

    run(main())


def test_an_answer_that_is_not_redis_drops_the_connection(server: RedisServer) -> None:
    async def main() -> None:
        async with running(pipe_to(server.url, probe_seconds=30)) as pipe:
            call = pipe.execute("PING")
            pipe._line.data_received(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            with pytest.raises(RedisAway):
                await call
            assert not pipe.up

    run(main())


def test_each_change_is_one_log_line_without_the_password(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "app.redis_pipe")

    async def main(server: RedisServer) -> int:
        pipe = pipe_to(f"redis://:hush@127.0.0.1:{server.port}", timeout_ms=5000, probe_seconds=0.02)
        async with running(pipe):
            server.kill()
            await until(lambda: not pipe.up)
            for _ in range(200):
                with pytest.raises(RedisAway):
                    pipe.execute("PING")
                await asyncio.sleep(0.002)
            await asyncio.to_thread(server.start)
            await until(lambda: pipe.up)
        return pipe.changes

    with redis_server(tmp_path, password="hush") as server:
        assert run(main(server)) == 3
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in lines] == ["redis is there", "redis is away", "redis is there"]
    assert not any("hush" in line or record.exc_info for line, record in zip(lines, caplog.records, strict=True))


@each_loop
def test_an_event_loop_that_stood_still_is_not_taken_for_a_slow_redis(server: RedisServer, loop: str) -> None:
    async def main() -> tuple[bytes, int]:
        async with running(pipe_to(server.url, timeout_ms=400)) as pipe:
            # The watch that the first command set runs out before the second has even left.
            await pipe.execute("PING")
            call = pipe.execute("ECHO", "in time")
            time.sleep(1.0)  # noqa: ASYNC251, the point of the test
            return await call, pipe.changes

    assert run(main(), loop) == (b"in time", 1)


def test_no_more_commands_wait_than_the_limit_says(frail: RedisServer) -> None:
    async def main() -> None:
        async with running(RedisPipe(frail.url, AMBIENT, timeout_ms=10_000, waiting_limit=10)) as pipe:
            frail.freeze()
            calls = [pipe.execute("ECHO", str(n)) for n in range(10)]
            with pytest.raises(RedisAway):
                pipe.execute("PING")
            frail.thaw()
            assert await asyncio.gather(*calls) == [str(n).encode() for n in range(10)]

    run(main())


def test_the_loss_of_a_command_that_nobody_waits_for_is_told(frail: RedisServer) -> None:
    errors: list[Exception] = []

    async def main() -> None:
        async with running(pipe_to(frail.url, timeout_ms=100)) as pipe:
            frail.freeze()
            pipe.send("SET", "k", "v", on_error=errors.append)
            await until(lambda: errors)
            frail.thaw()

    run(main())
    assert [type(error) for error in errors] == [RedisAway]


def test_whoever_asked_is_called_at_each_return(frail: RedisServer) -> None:
    returns: list[bool] = []

    async def main() -> None:
        pipe = pipe_to(frail.url, timeout_ms=5000)
        pipe.on_return.append(lambda: returns.append(pipe.up))
        async with running(pipe):
            frail.kill()
            await until(lambda: not pipe.up)
            await asyncio.to_thread(frail.start)
            await until(lambda: pipe.up)

    run(main())
    assert returns == [True, True]


def test_closing_waits_for_what_was_sent(server: RedisServer) -> None:
    async def main() -> None:
        pipe = pipe_to(server.url)
        async with running(pipe):
            for n in range(100):
                pipe.send("SET", f"closing:{n}", "v", "EX", 60)
            await pipe.close()

    run(main())
    assert len(server.client.keys("closing:*")) == 100


def test_a_cancelled_run_closes_as_well(server: RedisServer) -> None:
    async def main() -> None:
        pipe = pipe_to(server.url)
        task = asyncio.create_task(pipe.run())
        await until(lambda: pipe.up)
        for n in range(100):
            pipe.send("SET", f"cancelled:{n}", "v", "EX", 60)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not pipe.up

    run(main())
    assert len(server.client.keys("cancelled:*")) == 100
