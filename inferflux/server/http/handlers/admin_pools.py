"""GET /v1/admin/pools: readiness, queues, batches and KV pages of every engine, as of its last word."""

from aiohttp import web

from inferflux.engine.stats import EngineStats
from inferflux.server.backends import Backend
from inferflux.server.http.context import CONTEXT, ServerContext
from inferflux.server.http.handlers.health import not_ready_reason
from inferflux.server.http.responses import json_response
from inferflux.server.http.schemas.pools import Batch, Pool, Pools, Queue, ServerQueue, Tier


async def get_pools(request: web.Request) -> web.Response:
    context = request.app[CONTEXT]
    reason = not_ready_reason(context)
    return json_response(
        Pools(
            ready=reason is None,
            reason=reason,
            policy=context.policy.document.fairness.policy,
            server=_server_queue(context),
            pools=[_pool(context, backend) for backend in context.backends.engines],
        )
    )


def _server_queue(context: ServerContext) -> ServerQueue:
    admission, limits = context.admission, context.config.server
    return ServerQueue(
        running=admission.running,
        max_concurrent=limits.max_concurrent,
        waiting=sum(admission.waiting.values()),
        max_queue=limits.max_queue,
        waiting_tokens=admission.waiting_tokens,
        max_queue_tokens=limits.max_queue_tokens,
    )


def _pool(context: ServerContext, backend: Backend) -> Pool:
    stats, limits = backend.client.stats, context.config.runtime.scheduler
    return Pool(
        model=backend.id,
        state=backend.state.value,
        default=backend.id == context.backends.default_id,
        queue=Queue(server=context.admission.waiting[backend.id], engine=stats.waiting),
        batch=Batch(stats.running, limits.max_batch_size, stats.batch_tokens, limits.max_batch_tokens),
        kv=_tiers(stats),
        preemptions=int(backend.counts()["preemptions"]),
        restarts=backend.num_restarts,
        retries=backend.num_retries,
    )


def _tiers(stats: EngineStats) -> dict[str, Tier]:
    """The device's pages, then those of the lower tiers there are: all that is in use there is there to be found."""
    device = Tier(stats.device_pages_total, stats.device_pages_in_use, stats.device_pages_cached)
    below = {
        name: Tier(tier.pages_total, tier.pages_in_use, tier.pages_in_use, tier.state)
        for name, tier in stats.tiers.items()
    }
    return {"device": device, **below}
