"""Spans on the wire: what OpenTelemetry's own encoder makes of the same spans, byte for byte after its reading."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from app.telemetry import open_spans, otlp
from app.telemetry.export import Export

KINDS = {otlp.INTERNAL: SpanKind.INTERNAL, otlp.SERVER: SpanKind.SERVER, otlp.CLIENT: SpanKind.CLIENT}
TEXT = some.text(some.characters(exclude_categories=["Cs"]), max_size=300)
NAMES = TEXT.filter(bool)
VALUES = (
    TEXT | some.booleans() | some.integers(-(2**63), 2**63 - 1) | some.floats(allow_nan=False) | some.tuples(TEXT, TEXT)
)
ATTRIBUTES = some.dictionaries(NAMES, VALUES, max_size=5)
MARKED = some.sampled_from([{}, {"error.type": "timeout"}])


@given(
    name=NAMES,
    ids=some.tuples(some.integers(1, 2**128 - 1), some.integers(1, 2**64 - 1), some.integers(0, 2**64 - 1)),
    remote=some.booleans(),
    state=some.sampled_from(["", "rojo=00f067aa0ba902b7", "a=1,b=2"]),
    kind=some.sampled_from(list(KINDS)),
    times=some.tuples(some.integers(0, 2**63), some.integers(0, 2**63)),
    attributes=some.builds(dict.__or__, ATTRIBUTES, MARKED),
    of=ATTRIBUTES,
)
def test_a_span_is_written_as_opentelemetry_writes_it(
    name: str,
    ids: tuple[int, int, int],
    remote: bool,
    state: str,
    kind: int,
    times: tuple[int, int],
    attributes: dict[str, Any],
    of: dict[str, Any],
) -> None:
    trace, id, parent = ids
    resource = Resource(of)
    flags, trace_state = TraceFlags(TraceFlags.SAMPLED), TraceState.from_header([state]) if state else None
    theirs = ReadableSpan(
        name=name,
        context=SpanContext(trace, id, False, flags, trace_state),
        parent=SpanContext(trace, parent, remote, flags, trace_state) if parent else None,
        resource=resource,
        attributes=attributes,
        kind=KINDS[kind],
        status=Status(StatusCode.ERROR if "error.type" in attributes else StatusCode.UNSET),
        start_time=times[0],
        end_time=times[1],
    )
    ours = otlp.span(
        *(name, trace.to_bytes(16, "big"), id.to_bytes(8, "big"), parent.to_bytes(8, "big") if parent else b"", remote),
        *(state.encode(), kind, *times, attributes),
    )
    written = ExportTraceServiceRequest.FromString(otlp.request(otlp.resource(resource.attributes), [ours, ours]))
    assert written == encode_spans([theirs, theirs])


def test_an_attribute_is_what_it_says_though_another_is_equal_to_it() -> None:
    ids = b"\x01" * 16, b"\x02" * 8, b""
    for value in (1, True, 1.0, 1):
        written = otlp.request(b"", [otlp.span("a", *ids, False, b"", otlp.INTERNAL, 1, 2, {"b": value})])
        read = ExportTraceServiceRequest.FromString(written).resource_spans[0].scope_spans[0].spans[0]
        of = read.attributes[0].value
        assert type(getattr(of, str(of.WhichOneof("value")))) is type(value)


def test_what_no_attribute_can_be_is_refused() -> None:
    with pytest.raises(TypeError, match="dict"):
        otlp.resource({"a": {}})


def test_text_that_is_no_utf_8_is_written_with_marks_in_its_place() -> None:
    """As an environment has it: a replica whose OTEL_RESOURCE_ATTRIBUTES had such a name did not start."""
    written = otlp.request(otlp.resource({"a\udce9": "b\udce9"}), [])
    (pair,) = ExportTraceServiceRequest.FromString(written).resource_spans[0].resource.attributes
    assert (pair.key, pair.value.string_value) == ("a?", "b?")


def test_a_receiver_that_hangs_holds_no_replica_that_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{receiver.getsockname()[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "25")
        before = set(threading.enumerate())
        export = Export({})
        export.put(otlp.span("a", b"\x01" * 16, b"\x02" * 8, b"", False, b"", otlp.INTERNAL, 1, 2, {}))
        export.close(100)
        left = set(threading.enumerate()) - before
        assert left, "it waited for an answer that had not come"
        connection, _ = receiver.accept()
        with connection:
            assert connection.recv(65_536)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            for thread in left:
                thread.join()


def test_opentelemetry_that_is_switched_off_makes_no_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert open_spans("replica", "test") is None
    monkeypatch.setenv("OTEL_SDK_DISABLED", "false")
    spans = open_spans("replica", "test")
    assert spans is not None
    spans.close()
