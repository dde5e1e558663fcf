"""GET /livez, /health, /readyz, /healthz, /metrics: what probes and dashboards ask."""

import time
from typing import Final

from aiohttp import web
from msgspec import UNSET

from inferflux import __version__
from inferflux.server.http.context import CONTEXT, ServerContext
from inferflux.server.http.problems import RETRY_ENGINE
from inferflux.server.http.responses import json_response
from inferflux.server.http.schemas.health import Health, ModelHealth, Probe, QueueHealth

# A model that is unloaded when idle, or leaves, is as it should be.
_DEGRADED: Final = ("loading", "restarting", "failed")


async def livez(request: web.Request) -> web.Response:
    """Answering is the proof, but for an engine that is stuck and that its client cannot kill and replace."""
    if any(engine.client.stuck for engine in request.app[CONTEXT].backends.engines):
        return json_response(Probe("unavailable", "engine_stuck"), status=503)
    return json_response(Probe("ok"))


async def readyz(request: web.Request) -> web.Response:
    reason = not_ready_reason(request.app[CONTEXT])
    if reason is None:
        return json_response(Probe("ok"))
    return json_response(Probe("unavailable", reason), status=503, headers=RETRY_ENGINE)


async def healthz(request: web.Request) -> web.Response:
    context = request.app[CONTEXT]
    manager, admission = context.backends, context.admission
    models = [ModelHealth(one.id, one.state.value, one.id == manager.default_id) for one in manager.backends]
    registry = context.models.registry.status.state if context.models.registry is not None else UNSET
    broken = registry == "error" or any(model.state in _DEGRADED for model in models)
    waiting = sum(admission.waiting.values()) + sum(one.client.stats.waiting for one in manager.engines)
    health = Health(
        status="degraded" if broken or not_ready_reason(context) is not None else "ok",
        version=__version__,
        uptime_s=round(time.monotonic() - context.started, 3),
        queue=QueueHealth(admission.running, waiting),
        models=models,
        registry=registry,
    )
    return json_response(health)


async def metrics(request: web.Request) -> web.Response:
    body, content_type = request.app[CONTEXT].metrics.render(request.headers.get("Accept", ""))
    return web.Response(body=body, headers={"Content-Type": content_type})


def not_ready_reason(context: ServerContext) -> str | None:
    """Returns the reason that /readyz gives; None when the default model serves."""
    return "draining" if context.admission.closed else context.backends.not_ready_reason()
