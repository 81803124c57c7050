"""Traces that uploads continue, where OpenTelemetry is installed (the extra `otel`) and set up, such as by
`opentelemetry-instrument imagestream gateway`. Without it a trace context is passed on as it came.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
HEADER = "traceparent"


@contextmanager
def publishing(traceparent: str | None) -> Iterator[str | None]:
    """A span around the publishing of an upload, part of the trace that the request belongs to.

    Args:
        traceparent: the request's W3C trace context; one that is not valid counts as none.

    Yields:
        The trace context for the message.
    """
    given = traceparent if TRACEPARENT.fullmatch(traceparent or "") else None
    try:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError:
        yield given
        return
    propagator = TraceContextTextMapPropagator()
    parent = propagator.extract({HEADER: given} if given else {})
    tracer = trace.get_tracer("imagestream")
    with tracer.start_as_current_span("publish", parent, kind=trace.SpanKind.PRODUCER):
        carrier: dict[str, str] = {}
        propagator.inject(carrier)
        yield carrier.get(HEADER, given)
