"""What the benchmark says: medians of rounds, ratios within a round, a table, and what the figures are held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

import msgspec

from loadtest.load import LoadResult
from loadtest.mock_vendor import STREAM_CHUNKS

BASELINE = "mock"
FLOOR_PER_SECOND, GOAL_PER_SECOND = 2_000, 4_000
FLOOR_ADDED_MS, GOAL_ADDED_MS = 1.0, 0.6
GOAL_STREAMS_PER_SECOND = 700
MEMORY_LIMIT_MB = 120
COLD_START_LIMIT_SECONDS = 2.0
LOOK_LIMIT_MS = 0.4


class Sample(msgspec.Struct, frozen=True):
    """One run of one subject. CPU is microseconds per answer."""

    case: str
    concurrency: int
    subject: str
    round: int
    load: LoadResult
    cpu_us: float
    children_cpu_us: float


class Row(msgspec.Struct, frozen=True):
    """The medians of a subject's rounds at one case and concurrency. None where there is nothing to compare with.

    `added_us` is the p50 over the bare mock of the same round: of whole answers, for streams to the first byte.
    `per_core` is how many answers a second one core carries by the CPU time that one took, children included; near
    `per_second` when the core was full.
    """

    case: str
    concurrency: int
    subject: str
    per_second: float
    cpu_us: float
    children_cpu_us: float
    p50_us: float
    p95_us: float
    p99_us: float
    first_byte_p50_us: float
    per_core: float
    added_us: float | None
    of_mock: float | None
    of_traefik: float | None
    errors: dict[str, int]


class Facts(msgspec.Struct, frozen=True):
    """What holds for the whole run. Memory is megabytes (10^6 bytes) of proportional set size, of the gateway and its
    shipper.
    """

    on: str
    machine: str
    notes: list[str]
    versions: dict[str, str]
    cold_start_seconds: list[float] = []
    idle_memory_mb: tuple[float, float] | None = None
    loaded_memory_mb: tuple[float, float] | None = None
    answered_calls: int | None = None
    ledger_rows: int | None = None
    looks_ms: Mapping[str, float | None] = {}
    """By case, the median that its calls looked for an answer from before."""


class Report(msgspec.Struct, frozen=True):
    facts: Facts
    rows: list[Row]
    samples: list[Sample]


def rows(samples: Sequence[Sample]) -> list[Row]:
    """One row for each case, concurrency and subject, in the order in which they were measured first."""
    groups: dict[tuple[str, int, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.case, sample.concurrency, sample.subject), []).append(sample)
    return [_row(key, own, groups) for key, own in groups.items()]


def _row(key: tuple[str, int, str], own: list[Sample], groups: dict[tuple[str, int, str], list[Sample]]) -> Row:
    case, concurrency, subject = key

    def compared(other: str, difference: Callable[[Sample, Sample], float]) -> float | None:
        # Within a round, as a shared machine's speed drifts from one to the next.
        others = {sample.round: sample for sample in groups.get((case, concurrency, other), ())}
        found = [difference(sample, others[sample.round]) for sample in own if sample.round in others]
        return median(found) if found and subject != other else None

    def middle(value: Callable[[Sample], float]) -> float:
        return median(value(sample) for sample in own)

    errors: dict[str, int] = {}
    for sample in own:
        for kind, count in sample.load.errors.items():
            errors[kind] = errors.get(kind, 0) + count
    return Row(
        case=case,
        concurrency=concurrency,
        subject=subject,
        per_second=middle(lambda s: s.load.per_second),
        cpu_us=middle(lambda s: s.cpu_us),
        children_cpu_us=middle(lambda s: s.children_cpu_us),
        p50_us=middle(lambda s: s.load.latency.p50_us),
        p95_us=middle(lambda s: s.load.latency.p95_us),
        p99_us=middle(lambda s: s.load.latency.p99_us),
        first_byte_p50_us=middle(lambda s: s.load.first_byte.p50_us),
        per_core=middle(lambda s: 1e6 / (s.cpu_us + s.children_cpu_us) if s.cpu_us else 0.0),
        added_us=compared(BASELINE, lambda a, b: _answer_us(a) - _answer_us(b)),
        of_mock=compared(BASELINE, _ratio),
        of_traefik=compared("traefik", _ratio),
        errors=errors,
    )


def _answer_us(sample: Sample) -> float:
    streamed = sample.load.events > 0
    return sample.load.first_byte.p50_us if streamed else sample.load.latency.p50_us


def _ratio(own: Sample, other: Sample) -> float:
    return own.load.per_second / other.load.per_second if other.load.per_second else 0.0


def find(rows: Sequence[Row], case: str, concurrency: int, subject: str) -> Row | None:
    return next((r for r in rows if (r.case, r.concurrency, r.subject) == (case, concurrency, subject)), None)


HEADINGS = (
    "c", "subject", "answers/s", "of mock", "of traefik", "CPU us", "shipper us", "per core",
    "p50 ms", "p95 ms", "p99 ms", "first ms", "added us",
)  # fmt: skip


def table(report: Report, titles: dict[str, str]) -> str:
    """The report for a terminal. `titles` has a sentence for each case."""
    facts = report.facts
    lines = [facts.on, facts.machine, ""]
    cases = list(dict.fromkeys(row.case for row in report.rows))
    for case in cases:
        cells = [HEADINGS] + [_cells(row) for row in report.rows if row.case == case]
        widths = [max(len(line[column]) for line in cells) for column in range(len(HEADINGS))]
        lines.append(f"{case}: {titles[case]}")
        lines += ["  " + "  ".join(map(_pad, line, widths, range(len(line)))) for line in cells]
        lines.append("")
    lines += memory_and_start(facts)
    lines += verdicts(report)
    lines += [*facts.notes, *remarks(report)]
    lines += faults(report)
    return "\n".join(line.rstrip() for line in lines)


def scaling(report: Report, case: str, one: str, two: str) -> str:
    """One replica and two beside each other, as a table of Markdown; CPU is of all that serves the call."""
    lines = ["| connections | one replica | two | answers/s, two to one | CPU a call, one / two |", "|---" * 5 + "|"]
    for single in report.rows:
        double = find(report.rows, case, single.concurrency, two)
        if (single.case, single.subject) != (case, one) or double is None:
            continue
        cells = [f"{row.per_second:,.0f} answers/s, p95 {row.p95_us / 1000:.0f} ms" for row in (single, double)]
        cpu = " / ".join(f"{row.cpu_us + row.children_cpu_us:,.0f}" for row in (single, double))
        rounds = {
            s.round: s for s in report.samples if (s.case, s.concurrency, s.subject) == (case, single.concurrency, one)
        }
        doubles = [s for s in report.samples if (s.case, s.concurrency, s.subject) == (case, single.concurrency, two)]
        ratio = f"{median(_ratio(other, rounds[other.round]) for other in doubles if other.round in rounds):.2f}"
        lines.append(f"| {single.concurrency} | " + " | ".join([*cells, ratio, f"{cpu} µs"]) + " |")
    return "\n".join(lines)


def _pad(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 1 else cell.rjust(width)


def _cells(row: Row) -> tuple[str, ...]:
    def optional(value: float | None, shape: str) -> str:
        return "" if value is None else format(value, shape)

    return (
        str(row.concurrency),
        row.subject,
        f"{row.per_second:,.0f}",
        optional(row.of_mock, ".2f"),
        optional(row.of_traefik, ".2f"),
        f"{row.cpu_us:,.0f}",
        f"{row.children_cpu_us:,.0f}" if row.children_cpu_us else "",
        f"{row.per_core:,.0f}",
        f"{row.p50_us / 1000:,.2f}",
        f"{row.p95_us / 1000:,.2f}",
        f"{row.p99_us / 1000:,.2f}",
        f"{row.first_byte_p50_us / 1000:,.2f}",
        optional(row.added_us, ",.0f"),
    )


def memory_and_start(facts: Facts) -> list[str]:
    lines = []
    for when, memory in (("idle", facts.idle_memory_mb), ("after the load", facts.loaded_memory_mb)):
        if memory:
            lines.append(f"memory {when}: gateway {memory[0]:.0f} MB, its shipper {memory[1]:.0f} MB")
    if facts.cold_start_seconds:
        starts = ", ".join(f"{seconds:.2f}" for seconds in facts.cold_start_seconds)
        lines.append(f"cold start, spawn to first 200: {median(facts.cold_start_seconds):.2f} s (of {starts})")
    if facts.ledger_rows is not None:
        lines.append(f"ledger: {facts.ledger_rows:,} rows in PostgreSQL for {facts.answered_calls:,} answered calls")
    return lines


def verdicts(report: Report) -> list[str]:
    """Each figure that has a floor or a goal, beside it."""
    facts, lines = report.facts, []
    unary = find(report.rows, "unary", 64, "gateway")
    single = find(report.rows, "unary", 1, "gateway")
    streams = find(report.rows, "stream", 64, "gateway")
    for peer in ("litellm", "portkey"):
        other = find(report.rows, "unary", 64, peer)
        if unary and other and other.per_second:
            lines.append(
                f"answers/s of {peer} {facts.versions.get(peer, '')}: {unary.per_second / other.per_second:.1f} times"
            )
    if unary:
        share = f", {unary.of_traefik:.0%} of Traefik" if unary.of_traefik else ""
        lines.append(
            f"answers/s on one core: {unary.per_second:,.0f}{share} ({unary.per_core:,.0f} by their CPU time); "
            + _held(unary.per_second, GOAL_PER_SECOND, FLOOR_PER_SECOND, least=True)
        )
    if single and single.added_us is not None:
        added_ms = single.added_us / 1000
        lines.append(
            f"added at concurrency 1: {added_ms:.2f} ms; " + _held(added_ms, GOAL_ADDED_MS, FLOOR_ADDED_MS, least=False)
        )
    if streams:
        lines.append(
            f"streams/s that one core carries, by their CPU time: {streams.per_core:,.0f}; "
            + _held(streams.per_core, GOAL_STREAMS_PER_SECOND, None, least=True)
        )
    translated = find(report.rows, "translated", 64, "gateway")
    if streams and translated and translated.per_core:
        lines.append(
            f"chunks/s that one core carries: relayed {streams.per_core * STREAM_CHUNKS:,.0f}, translated "
            f"{translated.per_core * STREAM_CHUNKS:,.0f}; first content at 64 connections after "
            f"{streams.first_byte_p50_us / 1000:.2f} ms and {translated.first_byte_p50_us / 1000:.2f} ms"
        )
    large, beside = (find(report.rows, case, 64, "gateway") for case in ("large", "beside"))
    if unary and large and unary.cpu_us:
        lines.append(f"a 100 KB prompt: {large.cpu_us / unary.cpu_us:.2f} times the CPU time of a 1 KB one")
    if unary and beside and unary.per_second and unary.p50_us:
        lines.append(
            f"beside slow streams: {beside.per_second / unary.per_second:.0%} of the answers/s, "
            f"{beside.p50_us / unary.p50_us:.2f} times the median time"
        )
    if look := facts.looks_ms.get("meaning"):
        words = facts.looks_ms.get("miss") or 0.0
        lines.append(
            f"look for the same meaning: {look - words:.2f} ms at the median, beside {words:.2f} for the same words; "
            + _held(look - words, LOOK_LIMIT_MS, None, least=False)
        )
    if facts.loaded_memory_mb:
        total = sum(facts.loaded_memory_mb)
        lines.append(f"memory of a replica: {total:.0f} MB; " + _held(total, MEMORY_LIMIT_MB, None, least=False))
    if facts.cold_start_seconds:
        start = median(facts.cold_start_seconds)
        lines.append(f"cold start: {start:.2f} s; " + _held(start, COLD_START_LIMIT_SECONDS, None, least=False))
    return lines


def _held(value: float, goal: float, floor: float | None, *, least: bool) -> str:
    def reached(bound: float) -> bool:
        return value >= bound if least else value <= bound

    if reached(goal):
        return f"goal {goal:g} met"
    if floor is None:
        return f"goal {goal:g} MISSED"
    return f"goal {goal:g} missed, floor {floor:g} " + ("met" if reached(floor) else "MISSED")


def _not_whole(row: Row) -> str:
    errors = ", ".join(f"{count} x {kind}" for kind, count in row.errors.items())
    return f"{row.subject} at {row.case}, concurrency {row.concurrency}: answers that were not whole: {errors}"


def remarks(report: Report) -> list[str]:
    """What the other proxies did wrong, which is no fault of ours.

    Traefik truncates a stream in some thousands when the mock answers within microseconds: Go's HTTP/1.1 server closes
    a request's body once an answer begins, and its client takes that for a failure (golang/go issue 40747).
    """
    return [_not_whole(row) for row in report.rows if row.errors and row.subject not in (BASELINE, "gateway")] + [
        f"{name} {version}" for name, version in report.facts.versions.items()
    ]


def faults(report: Report) -> list[str]:
    """Why the figures should not be quoted; empty when they may be."""
    found = [_not_whole(row) for row in report.rows if row.errors and row.subject in (BASELINE, "gateway")]
    facts = report.facts
    if facts.ledger_rows is not None and facts.ledger_rows != facts.answered_calls:
        found.append(f"the ledger has {facts.ledger_rows} rows for {facts.answered_calls} answered calls")
    return [f"FAULT: {sentence}" for sentence in found]
