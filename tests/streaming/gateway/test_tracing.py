"""Trace contexts of uploads, with OpenTelemetry's own SDK and without it."""

import sys

import pytest

from streaming.gateway.tracing import publishing

TRACE, SPAN = "a" * 32, "b" * 16
GIVEN = f"00-{TRACE}-{SPAN}-01"


def test_publishing_is_a_span_of_the_requests_trace_which_the_message_continues(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trace = pytest.importorskip("opentelemetry.trace")
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter, provider = memory.InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    with publishing(GIVEN) as passed_on:
        assert passed_on is not None
    (span,) = exporter.get_finished_spans()
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, SPAN)
    assert passed_on == f"00-{TRACE}-{span.context.span_id:016x}-01"


@pytest.mark.parametrize("installed", [True, False])
def test_a_trace_context_is_passed_on_where_opentelemetry_is_not_set_up(
    monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    if not installed:
        monkeypatch.setitem(sys.modules, "opentelemetry", None)
    for given, expected in ((GIVEN, GIVEN), (None, None), ("nonsense", None)):
        with publishing(given) as passed_on:
            assert passed_on == expected
