"""The gateway's Prometheus metrics; names follow those of the stream."""

from importlib.metadata import version
from time import perf_counter
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, ProcessCollector, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.005, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)  # buckets
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER = "other"  # for unknown methods and routes, so that requests cannot create new series


class GatewayMetrics:
    """The metrics of one gateway, in their own registry."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        new: dict[str, Any] = {"namespace": "imagestream", "registry": self._registry}
        Info("build", "The installed release.", **new).info({"version": version("imagestream")})
        names = ["method", "route"]
        self._requests = Counter("http_requests", "Requests that were answered.", [*names, "code"], **new)
        self._duration = Histogram(
            "http_request_duration_seconds", "Time until a request was answered.", names, buckets=SECONDS, **new
        )

    def count(self, method: str, route: str, code: int, seconds: float) -> None:
        """Count a response."""
        method = method if method in METHODS else OTHER
        self._requests.labels(method, route, str(code)).inc()
        self._duration.labels(method, route).observe(seconds)

    def page(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class CountRequests:
    """ASGI middleware that counts responses by the path of the route, such as /v1/predictions/{image_id}."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request; see ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, code = perf_counter(), 500

        async def answer(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            self._metrics.count(scope["method"], route_of(scope), code, perf_counter() - began)


def route_of(scope: Scope) -> str:
    """The path template of the route that handled a request."""
    route = scope.get("route")
    return str(getattr(route, "path_format", OTHER))
