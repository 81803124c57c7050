"""Trace contexts of uploads and messages, with OpenTelemetry's SDK and without it."""

import sys
from typing import Any

import pytest

from streaming.tracing import publishing, scored

TRACE, SPAN = "a" * 32, "b" * 16
GIVEN = f"00-{TRACE}-{SPAN}-01"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The finished spans, from OpenTelemetry's SDK."""
    trace = pytest.importorskip("opentelemetry.trace")
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter, provider = memory.InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter.get_finished_spans


def parent(span: Any) -> tuple[str, str]:
    return f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}"


def test_publishing_span_continues_the_trace_of_the_request(spans: Any) -> None:
    with publishing(GIVEN) as passed_on:
        assert passed_on is not None
    (span,) = spans()
    assert parent(span) == (TRACE, SPAN)
    assert passed_on == f"00-{TRACE}-{span.context.span_id:016x}-01"


def test_scoring_span_continues_the_trace_of_each_message(spans: Any) -> None:
    other = f"00-{'c' * 32}-{'d' * 16}-01"
    scored([GIVEN, other], 2.5, {"batch_id": 7})
    assert [parent(span) for span in spans()] == [(TRACE, SPAN), ("c" * 32, "d" * 16)]
    assert {(span.end_time - span.start_time, dict(span.attributes)["batch_id"]) for span in spans()} == {
        (2_500_000_000, 7)
    }


@pytest.mark.parametrize("installed", [True, False])
def test_trace_context_is_passed_on_without_opentelemetry(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    if not installed:
        monkeypatch.setitem(sys.modules, "opentelemetry", None)
    for given, expected in ((GIVEN, GIVEN), (None, None), ("nonsense", None)):
        with publishing(given) as passed_on:
            assert passed_on == expected
        scored([GIVEN], 1.0, {})
