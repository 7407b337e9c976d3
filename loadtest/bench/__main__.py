"""Measures the gateway on one core against a mock vendor, with everything on, beside the bare mock, Traefik and nginx.

Starts it all itself: Redis, PostgreSQL, the mock, one gateway replica (identity, limits in Redis, ledger with its
shipper, metrics, tracing of 10 % of the calls), and, as measures of what a proxy costs on this machine at this moment,
Traefik and nginx as plain proxies. The proxy under test has one core, everything else the others. Rounds are
interleaved and medians of them are printed; ratios and differences are taken within a round. The absolute figures of a
shared machine mean little, the ratios travel.

Exit code: 0, or 1 when something could not be started, an answer was not whole, or the ledger's rows do not add up.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import shutil
import ssl
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import uvloop

from loadtest import interpreter
from loadtest.bench import plot
from loadtest.bench import report as reporting
from loadtest.bench.parts import (
    CACHED,
    MEANT,
    TRIPPED,
    Parts,
    Subject,
    Usage,
    nginx_program,
    traefik_installed,
    usage,
    versions,
)
from loadtest.bench.report import Facts, Report, Sample
from loadtest.load import NUMBER, LoadResult, hold_open, request_bytes, run_load
from loadtest.mock_vendor import AT_ONCE, SLOWLY, STREAM_CHUNKS
from loadtest.pages import filled
from loadtest.processes import ROOT
from loadtest.services import StackError

SLOW_STREAMS = 256
CASES = {
    "unary": "1 KB chat request, 1 KB answer",
    "large": "100 KB chat request, 1 KB answer",
    "stream": f"the same request streamed, {STREAM_CHUNKS} chunks one by one",
    "burst": f"the same request streamed, {STREAM_CHUNKS} chunks at once",
    "translated": f"the same stream asked for in Messages: {STREAM_CHUNKS} chunks one by one, each translated",
    "miss": "another question each time to an alias whose answers are kept: looked up, asked, kept",
    "meaning": "a miss of an alias that looks for the same meaning too: embedded, looked up, kept, learned from",
    "hit": "the same question to that alias each time: answered from the cache",
    "beside": f"the unary request while {SLOW_STREAMS} streams are open that get a chunk a second",
    "tripped": "a tenant whose limit is reached: refused with 429",
}
"""What is measured; `meaning` only where it is named, for its model takes 40 MB of the replica."""
ALONE = ("translated", "miss", "meaning", "hit", "tripped")
"""Cases that the gateway alone can do."""
SUBJECTS = ("mock", "gateway", "gateway-bare", "traefik", "traefik-tls", "nginx")
PEERS = ("litellm", "portkey")
BEHIND = ("replicas-1", "replicas-2")
"""One replica and two behind Traefik, on all cores: what a second one brings where the load takes its share of them."""
ON = (
    "The gateway with everything on: service key and tenant policy, limits in Redis (requests, daily tokens, global "
    "tokens), ledger spool and shipper to PostgreSQL, metrics, access log, tracing sampled {ratio:.0%}."
)
WARM_UP_SECONDS = 0.5
SHIPPING_SECONDS = 120
REQUEST_BYTES = 1024


def measured(case: str, subjects: Sequence[Subject]) -> list[Subject]:
    """Who takes part in a case."""
    return [one for one in subjects if one.name == "gateway" or case not in ALONE]


def chat_request(case: str, run: str = "") -> bytes:
    """The body of `case`, or of a `slow` stream: exactly REQUEST_BYTES of JSON, or a hundred times as many. Questions
    that differ from each other differ from those of another `run` too.
    """
    body: dict[str, object] = {
        "model": {"miss": CACHED, "hit": CACHED, "meaning": MEANT}.get(case, "support-fast"),
        "messages": [
            {"role": "system", "content": "You answer customers of a parcel service, briefly and kindly."},
            {"role": "user", "content": ""},
        ],
        "max_tokens": 256,
        "temperature": 0 if case in ("miss", "meaning", "hit") else 0.2,
    }
    if case in ("stream", "burst", "slow", "translated"):
        body["stream"] = True
    if case in ("burst", "slow"):
        body["metadata"] = {"pace": (AT_ONCE if case == "burst" else SLOWLY).decode()}
    question = "Where is my parcel, and when will it come? "
    if case == "translated":  # Messages have the system prompt beside the conversation
        body["system"] = body["messages"].pop(0)["content"]  # type: ignore[attr-defined]
    if case in ("miss", "meaning"):
        question = f"{NUMBER.decode()} {run} {question}"
    filled = body["messages"][-1]  # type: ignore[index]
    if case == "meaning":  # what is embedded is as long as a question is
        filled["content"], filled = question, body["messages"][0]  # type: ignore[index]
        question = filled["content"] + " "
        filled["content"] = ""
    room = REQUEST_BYTES * (100 if case == "large" else 1) - len(json.dumps(body))
    filled["content"] = (question * (room // len(question) + 1))[:room]
    return json.dumps(body).encode()


class Meter:
    """Runs one load after the other, and remembers how many calls were answered."""

    def __init__(self, duration_seconds: float) -> None:
        self._duration_seconds = duration_seconds
        self.answered: dict[str, int] = {}

    def measure(self, subject: Subject, case: str, concurrency: int, round_: int) -> Sample:
        load, before, after = self.load(subject, case, concurrency, self._duration_seconds)
        calls = max(1, load.completed + load.late + sum(load.errors.values()))
        return Sample(
            case=case,
            concurrency=concurrency,
            subject=subject.name,
            round=round_,
            load=load,
            cpu_us=(after.cpu_seconds - before.cpu_seconds) / calls * 1e6,
            children_cpu_us=(after.children_cpu_seconds - before.children_cpu_seconds) / calls * 1e6,
        )

    def load(self, subject: Subject, case: str, concurrency: int, seconds: float) -> tuple[LoadResult, Usage, Usage]:
        """What one load saw, and what its subject had used before and after it."""
        headers = {"content-type": "application/json", **subject.headers}
        if case == "tripped":
            headers["x-tenant-id"] = TRIPPED
        url = subject.url.replace("/chat/completions", "/messages") if case == "translated" else subject.url
        request = request_bytes(url, headers, chat_request(case, secrets.token_hex(4)))
        expected = 429 if case == "tripped" else 200
        tls = ssl.create_default_context(cafile=subject.ca_file) if subject.ca_file else None

        async def loaded() -> tuple[LoadResult, Usage, Usage]:
            slow = SLOW_STREAMS if case == "beside" else 0
            held = await hold_open(url, request_bytes(url, headers, chat_request("slow")), slow, tls)
            before = usage(subject)
            load = await run_load(
                url, request, concurrency=concurrency, duration_seconds=seconds, expected=expected, tls=tls
            )
            after = usage(subject)
            for stream in held:
                stream.give_up()
            if case != "tripped":  # those rows are another tenant's
                rows = load.completed + load.late + slow
                self.answered[subject.name] = self.answered.get(subject.name, 0) + rows
            return load, before, after

        return uvloop.run(loaded())


def interleaved(subjects: Sequence[Subject], round_: int) -> list[Subject]:
    """The subjects in an order that differs from round to round, so that none is always measured after the same one."""
    start = round_ % len(subjects)
    return [*subjects[start:], *subjects[:start]]


def run(options: argparse.Namespace) -> int:
    cores = sorted(os.sched_getaffinity(0))
    notes = []
    if len(cores) < 2:
        notes.append("Only one core here: the load and the mock run on the same one, and take from the figures.")
    subject_core, other_cores = cores[0], set(cores[1:] or cores)
    os.sched_setaffinity(0, other_cores)
    folder = Path(tempfile.mkdtemp(prefix="gateway-bench-"))
    show = Progress()
    try:
        with Parts(
            folder, options.config, subject_core, other_cores, options.trace_ratio, meaning="meaning" in options.only
        ) as parts:
            report = measure(parts, options, len(cores), notes, show)
    except StackError as error:
        show.clear()
        print(error, f"\nThe logs are in {folder / 'log'}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        show.clear()
        print("Stopped; nothing was measured to its end.", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        return 1
    finally:
        os.sched_setaffinity(0, set(cores))
    shutil.rmtree(folder, ignore_errors=True)
    show.clear()
    print(reporting.table(report, CASES))
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    if options.plot:
        options.plot.write_text(plot.page(report, CASES))
    if options.page and not reporting.faults(report):
        said = f"{time.strftime('%Y-%m-%d')}, {report.facts.machine.partition('; chunks')[0]}."
        part = f"{said}\n\n{reporting.scaling(report, 'unary', *BEHIND)}"
        options.page.write_text(filled(options.page.read_text(), {"replicas": part}))
    return 1 if reporting.faults(report) else 0


def measure(parts: Parts, options: argparse.Namespace, cores: int, notes: list[str], show: Progress) -> Report:
    cases = [case for case in CASES if case in options.only] or [case for case in CASES if case != "meaning"]
    behind = [name for name in BEHIND if name in options.only]
    wanted = [name for name in SUBJECTS if name in options.only] or ([] if behind else list(SUBJECTS))
    peers = [name for name in PEERS if options.peers or name in options.only]
    for name, installed in (
        ("traefik", traefik_installed()),
        ("traefik-tls", traefik_installed()),
        ("nginx", nginx_program() is not None),
    ):
        if name in wanted and not installed:
            wanted.remove(name)
            notes.append(f"{name} is not installed here and was left out.")
    show("starting the mock vendor")
    subjects = [parts.start_mock(options.chunk_interval_ms)]
    gateway: Subject | None = None
    idle: Usage | None = None
    cold_starts: list[float] = []
    if "gateway" in wanted:
        show("starting Redis and PostgreSQL")
        parts.start_backing_services()
        show("starting the gateway")
        gateway, cold_starts = parts.start_gateway(options.rounds)
        subjects.append(gateway)
        time.sleep(1)  # what it does once after its start is not part of being idle
        idle = usage(gateway)
    if "gateway-bare" in wanted:
        show("starting the gateway with all off")
        if not parts.redis_url:
            parts.start_backing_services()
        subjects.append(parts.start_gateway(1, bare=True)[0])
    if "traefik" in wanted:
        show("starting Traefik")
        subjects.append(parts.start_traefik())
    if "traefik-tls" in wanted:
        show("starting Traefik with TLS")
        subjects.append(parts.start_traefik(tls=True))
    if "nginx" in wanted:
        show("starting nginx")
        subjects.append(parts.start_nginx())
    if behind and not parts.redis_url:
        show("starting Redis and PostgreSQL")
        parts.start_backing_services()
    for name in behind:
        show(f"starting {name}")
        subjects.append(parts.start_replicas(int(name.removeprefix("replicas-"))))
    found = versions([subject.name for subject in subjects])
    for name in peers:
        show(f"starting {name}; where it is not there it is installed, which takes minutes")
        subject, found[name] = parts.start_peer(name)
        subjects.append(subject)

    meter = Meter(options.duration)
    samples: list[Sample] = []
    for case in cases:
        for subject in measured(case, subjects):
            show(f"warming up {subject.name}, {case}")
            meter.load(subject, case, 16, WARM_UP_SECONDS)
    warm = time.time()
    for round_ in range(options.rounds):
        for case in cases:
            for concurrency in options.concurrency:
                for subject in measured(case, interleaved(subjects, round_)):
                    show(f"round {round_ + 1} of {options.rounds}: {case}, concurrency {concurrency}, {subject.name}")
                    samples.append(meter.measure(subject, case, concurrency, round_))
    loaded = usage(gateway) if gateway else None
    ledger_rows, looks = None, {}
    if gateway:
        show("waiting until the shipper has shipped")
        kept = sum(meter.answered.get(name, 0) for name in ("gateway", *BEHIND))
        ledger_rows = parts.ledger_rows(kept, SHIPPING_SECONDS)
        kinds = ("miss", CACHED), ("meaning", MEANT)
        looks = {case: parts.looks_ms(alias, warm) for case, alias in kinds if case in cases}
    facts = Facts(
        on=ON.format(ratio=options.trace_ratio) if gateway or behind else "The gateway was not measured.",
        machine=machine(cores, options),
        notes=notes,
        versions=found,
        cold_start_seconds=cold_starts,
        idle_memory_mb=_megabytes(idle),
        loaded_memory_mb=_megabytes(loaded),
        answered_calls=kept if gateway else None,
        ledger_rows=ledger_rows,
        looks_ms=looks,
    )
    return Report(facts, reporting.rows(samples), samples)


def _megabytes(used: Usage | None) -> tuple[float, float] | None:
    return None if used is None else (used.memory_bytes / 1e6, used.children_memory_bytes / 1e6)


def machine(cores: int, options: argparse.Namespace) -> str:
    shared = set(options.only) & set(BEHIND) and not set(options.only) & set(SUBJECTS) - {"mock"}
    pinned = "all for everything" if shared else "one for the proxy under test"
    return (
        f"{platform.system()} {platform.machine()}, {cores} cores, {pinned}; Python "
        f"{platform.python_version()}, {interpreter.kind()}; {options.rounds} rounds of {options.duration:g} s, "
        f"medians; chunks of streams {options.chunk_interval_ms:g} ms apart."
    )


class Progress:
    """One line that is written over, on a terminal only."""

    def __call__(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        self("")


def _parser() -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.bench",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--duration", type=float, default=2.0, metavar="SECONDS", help="of one run (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved; medians are printed (default 3)")
    parser.add_argument(
        "--concurrency",
        type=int,
        nargs="+",
        default=[1, 16, 64, 256],
        metavar="N",
        help="connections (default 1 16 64 256)",
    )
    parser.add_argument("--chunk-interval-ms", type=float, default=1.0, help="between a stream's chunks (default 1)")
    parser.add_argument(
        "--trace-ratio", type=float, default=0.1, metavar="SHARE", help="of calls that leave spans (default 0.1)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures, each sample included")
    parser.add_argument(
        "--page", type=Path, metavar="PATH", help=f"write {' beside '.join(BEHIND)}, unary, into this page"
    )
    parser.add_argument("--plot", type=Path, metavar="PATH", help="write an HTML page with bars")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        choices=[*CASES, *SUBJECTS, *PEERS, *BEHIND],
        metavar="NAME",
        help=f"cases ({', '.join(CASES)}) and subjects ({', '.join((*SUBJECTS, *PEERS, *BEHIND))}); the mock is always "
        "measured",
    )
    parser.add_argument(
        "--peers", action="store_true", help="LiteLLM's proxy and Portkey's gateway too, installed below build/"
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "config",
        metavar="DIR",
        help="the gateway's configuration (default ./config)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.duration <= 0 or options.rounds < 1 or min(options.concurrency) < 1:
        parser.error("--duration, --rounds and --concurrency are above 0")
    if options.page and not {"unary", *BEHIND} <= set(options.only):
        parser.error(f"--page needs --only unary {' '.join(BEHIND)}")
    if options.page:
        try:  # before minutes of measuring
            filled(options.page.read_text(), {"replicas": ""})
        except (OSError, ValueError) as error:
            parser.error(str(error))
    if not hasattr(os, "sched_setaffinity"):
        parser.error("the benchmark pins processes to cores, which it can do on Linux only")
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
