"""The only wiring: configuration and engines in, an application out. What opens here also closes here."""

import asyncio
from collections.abc import AsyncIterator

from aiohttp import hdrs, web

from inferflux.config import Config
from inferflux.server.access.chain import build_chain
from inferflux.server.admission import Admission
from inferflux.server.audit import AuditLog, UnauthenticatedRequests
from inferflux.server.engine_metrics import EngineCollector
from inferflux.server.http.context import CONTEXT, INFO, ServerContext
from inferflux.server.http.cors import add_cors_headers, cors, origins_of
from inferflux.server.http.limits import add_limit_headers
from inferflux.server.http.middleware import (
    REQUEST_ID_HEADER,
    SERVER_NAME,
    authenticate,
    observe,
    request_id,
    shape_errors,
)
from inferflux.server.http.outbound import OutboundClient
from inferflux.server.http.routes import METRICS_PATH, ROUTES, add_routes
from inferflux.server.metrics import Metrics
from inferflux.server.models.models import Models
from inferflux.server.policy.gate import Gate
from inferflux.server.policy.opening import gate_settings
from inferflux.server.policy.store import PolicyStore
from inferflux.server.text_work import TextWork
from inferflux.server.tracing import open_tracing, trace_headers

_MEBIBYTE = 1024 * 1024


def build_app(
    config: Config,
    models: Models,
    metrics: Metrics,
    admission: Admission,
    policy: PolicyStore,
    audit: AuditLog | None = None,
) -> web.Application:
    """Returns the application. Engines, policy store and audit log are the caller's to open and to close.

    Raises ConfigError for guardrails that cannot be used.
    """
    for backend in models.backends.backends:
        metrics.add_model(backend.id)
    metrics.registry.register(EngineCollector(models.backends, admission))
    origins = origins_of(config)
    app = web.Application(
        middlewares=(observe, shape_errors, cors(origins), authenticate),
        client_max_size=max(1, int(config.server.max_body_mb * _MEBIBYTE)),
    )
    text_work, bulk_work = TextWork(), TextWork()
    tracing = open_tracing(config.server.enable_tracing)
    outbound = OutboundClient() if tracing is None else OutboundClient(trace_headers)
    access = build_chain(config, lambda: policy.document.api_keys, outbound.fetch)
    settings = gate_settings(config, policy.document)
    gate = Gate(settings, outbound.post, metrics.guardrail_blocked, metrics.opa_failures.inc)
    unauthenticated = UnauthenticatedRequests(audit)
    app[CONTEXT] = ServerContext(
        config, models, access, admission, metrics, text_work, bulk_work, policy, gate, unauthenticated, audit, tracing
    )
    shown = config.server.enable_metrics
    add_routes(app, tuple(route for route in ROUTES if shown or route.path != METRICS_PATH))

    async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
        response.headers[hdrs.SERVER] = SERVER_NAME
        if INFO not in request:  # refused before the middleware: an Expect that nobody understands
            response.headers[REQUEST_ID_HEADER] = request_id(request.headers.get(REQUEST_ID_HEADER))
        else:
            response.headers[REQUEST_ID_HEADER] = request[INFO].id
            add_limit_headers(request[INFO], response.headers)
        add_cors_headers(request, response, origins)

    async def text_threads(_app: web.Application) -> AsyncIterator[None]:
        yield
        text_work.close()
        bulk_work.close()

    async def connections(_app: web.Application) -> AsyncIterator[None]:
        async with outbound:
            yield

    async def last_count(_app: web.Application) -> AsyncIterator[None]:
        yield
        unauthenticated.write_count()

    async def traces(_app: web.Application) -> AsyncIterator[None]:
        yield
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    app.on_response_prepare.append(add_headers)
    app.cleanup_ctx.extend((text_threads, connections, last_count, traces))
    return app
