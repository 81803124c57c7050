"""The gateway's application: uploads go to the topic, predictions come from the tables.

/v1/…                     images and their results, see `streaming.gateway.routes`
GET  /livez, /readyz      the process is up; the broker answers
GET  /metrics             for Prometheus
GET  /docs, /openapi.json the description of all routes
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from streaming.errors import UnavailableError
from streaming.gateway.access import access
from streaming.gateway.connections import CloseUnread
from streaming.gateway.deprecation import MarkDeprecated
from streaming.gateway.description import POLICY, page
from streaming.gateway.following import add_following
from streaming.gateway.metrics import CountRequests, GatewayMetrics
from streaming.gateway.problems import declare, handle_problems, problems
from streaming.gateway.rate_limit import RateLimit, key_of
from streaming.gateway.routes import check_not_repeated, old_routes, routes
from streaming.gateway.schemas import Health
from streaming.gateway.service import Broker, Service
from streaming.settings import Settings


def create_app(settings: Settings, broker: Broker, api_keys: Sequence[str] = ()) -> FastAPI:
    """The application for one home and topic.

    Args:
        api_keys: one is required of every request except health checks; without keys, only programs on this machine
            are allowed.
    """
    service = Service(broker, settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="imagestream gateway",
        description="Publish images and look up their predictions, which appear when the stream has scored them.",
        version="1",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from other sites
        redoc_url=None,
        openapi_url=None,
        responses=problems(400),  # invalid HTTP, on any route
    )
    allowed = Depends(access(api_keys))
    # The limit per address comes before the check of the key, so that it limits guesses of keys. The total limit comes
    # after it, so that clients without a key cannot use it up.
    limited = [
        Depends(RateLimit(settings.gateway_requests_per_minute)),
        allowed,
        Depends(RateLimit(settings.gateway_key_requests_per_minute, key_of, "with one API key")),
        Depends(RateLimit(settings.gateway_total_requests_per_minute, lambda _request: "", "in total")),
    ]
    add_following(app, settings, limited)
    metrics = GatewayMetrics()
    app.add_middleware(MarkDeprecated)
    app.add_middleware(CloseUnread)
    app.add_middleware(CountRequests, metrics=metrics)
    app.include_router(routes(service), dependencies=[*limited, Depends(check_not_repeated)])
    app.include_router(old_routes(service), dependencies=limited, deprecated=True)
    _add_health(app, service)
    _add_metrics(app, metrics, allowed)
    _describe(app, allowed)
    handle_problems(app)
    return app


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/livez")
    @app.get("/healthz", deprecated=True)
    async def livez() -> Health:
        """The process is up."""
        return Health()

    @app.get("/readyz", responses=problems(503))
    async def readyz() -> Health:
        """The broker answers, so that images can be published."""
        if not await service.ready():
            raise UnavailableError("the broker does not answer")
        return Health()


def _add_metrics(app: FastAPI, metrics: GatewayMetrics, allowed: Any) -> None:
    @app.get("/metrics", dependencies=[allowed], include_in_schema=False)
    async def exposition() -> Response:
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)


def _describe(app: FastAPI, allowed: Any) -> None:
    def description() -> dict[str, Any]:
        if app.openapi_schema is None:
            declare(app.openapi())
        return app.openapi()

    @app.get("/openapi.json", dependencies=[allowed], include_in_schema=False)
    async def openapi() -> JSONResponse:
        return JSONResponse(description())

    @app.get("/docs", dependencies=[allowed], include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page(description()), headers={"Content-Security-Policy": POLICY})
