"""OpenTelemetry spans for publishing and scoring, if it is installed (the extra `otel`) and configured.

`opentelemetry-instrument imagestream gateway` configures it. Otherwise, trace contexts are passed on unchanged.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from time import time_ns

TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
HEADER = "traceparent"
NAME = "imagestream"  # of the tracer


def valid(traceparent: str | None) -> str | None:
    """A W3C trace context; None if it is not valid."""
    return traceparent if TRACEPARENT.fullmatch(traceparent or "") else None


@contextmanager
def publishing(traceparent: str | None) -> Iterator[str | None]:
    """A span for the publication of an upload, in the request's trace; yields the trace context of the message.

    Args:
        traceparent: the request's W3C trace context; an invalid one is ignored.
    """
    given = valid(traceparent)
    try:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError:
        yield given
        return
    propagator = TraceContextTextMapPropagator()
    parent = propagator.extract({HEADER: given} if given else {})
    with trace.get_tracer(NAME).start_as_current_span("publish", parent, kind=trace.SpanKind.PRODUCER):
        carrier: dict[str, str] = {}
        propagator.inject(carrier)
        yield carrier.get(HEADER, given)


def scored(traceparents: Iterable[str], seconds: float, attributes: Mapping[str, int]) -> None:
    """Record a span for each scored message, in its trace, with the duration of the committed micro-batch.

    Args:
        traceparents: the trace contexts of the messages.
        seconds: the duration of the micro-batch.
        attributes: of every span.
    """
    try:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError:
        return
    tracer, propagator, end = trace.get_tracer(NAME), TraceContextTextMapPropagator(), time_ns()
    for traceparent in traceparents:
        parent = propagator.extract({HEADER: traceparent})
        span = tracer.start_span(
            "score",
            parent,
            kind=trace.SpanKind.CONSUMER,
            attributes=dict(attributes),
            start_time=end - int(seconds * 1e9),
        )
        span.end(end)
