"""GET, DELETE /v1/admin/cache, POST /v1/admin/cache/warm: cached pages per tier; compute a prompt ahead; drop all."""

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from typing import Final

from aiohttp import web

from inferflux.engine.stats import EngineStats
from inferflux.sampling_params import SamplingParams
from inferflux.server.access.principal import Principal, cache_salt, tenant_salt
from inferflux.server.backends import Backend, BackendState
from inferflux.server.generation import check_prompt
from inferflux.server.http.admin import record_change
from inferflux.server.http.context import CONTEXT, INFO
from inferflux.server.http.requests import find_backend, read_body, time_left, token_ids_of, use_backend
from inferflux.server.http.responses import json_response
from inferflux.server.http.schemas.cache import (
    DROP,
    WARM,
    CacheList,
    Dropped,
    DropRequest,
    ModelCache,
    TierCard,
    Warmed,
    WarmRequest,
)

_NO_TOKENS: Final = SamplingParams(max_tokens=0, temperature=0.0)


async def get_cache(request: web.Request) -> web.Response:
    backends = request.app[CONTEXT].backends.backends
    return json_response(CacheList([_card(backend) for backend in backends]))


async def warm_cache(request: web.Request) -> web.Response:
    """Answers when the prompt's pages are cached."""
    body = await read_body(request, WARM)
    backend = await use_backend(request, body.model)
    token_ids = await token_ids_of(request, backend, body.prompt, body)
    assert backend.info is not None, "a ready backend has been described"
    check_prompt(token_ids, backend.info, "prompt", ends=True)
    context, principal = request.app[CONTEXT], request[INFO].principal
    assert principal is not None, "admin routes declare a scope"
    tenant = body.tenant or principal.tenant
    place = context.admission.enter(backend.id, tenant=tenant, priority=0, tokens=len(token_ids))
    num_cached = 0
    async with time_left(request), place:
        salt, adapter = _salt(request, principal, body), request[INFO].adapter
        sequence = backend.client.generate(token_ids, _NO_TOKENS, tenant=tenant, salt=salt, adapter=adapter)
        async with aclosing(sequence) as outputs:
            async for output in outputs:
                num_cached = max(num_cached, output.num_cached_tokens)
    return json_response(Warmed(request[INFO].model, len(token_ids), num_cached))


async def drop_cache(request: web.Request) -> web.Response:
    """Drops the pages of one model, or of all that have an engine."""
    body = await read_body(request, DROP) if request.can_read_body else DropRequest()
    chosen = [find_backend(request, body.model)] if body.model else request.app[CONTEXT].backends.engines
    ready = [backend for backend in chosen if backend.state is BackendState.READY]
    if body.model and not ready:
        chosen[0].require_ready()
    await record_change(request, {"action": "cache_dropped", "models": [backend.id for backend in ready]})
    async with time_left(request):
        await asyncio.gather(*(backend.client.drop_cache() for backend in ready))
    return json_response(Dropped([backend.id for backend in ready]))


def _salt(request: web.Request, principal: Principal, body: WarmRequest) -> bytes:
    """Returns the salt that the requests to come will have."""
    shared = request.app[CONTEXT].config.runtime.prefix_cache.isolation == "shared"
    salt = principal.salt if body.tenant is None else b"" if shared else tenant_salt(body.tenant)
    return cache_salt(salt, body.cache_salt)


def _card(backend: Backend) -> ModelCache:
    stats, info, counts = backend.client.stats, backend.info, backend.counts()
    return ModelCache(
        model=backend.id,
        page_tokens=info.page_tokens if info is not None else 0,
        page_bytes=info.page_bytes if info is not None else 0,
        query_tokens=int(counts["prefix_query_tokens"]),
        damaged_pages=int(counts["nvme.damaged_pages"]),
        foreign_pages=int(counts["nvme.foreign_pages"]),
        tiers={"device": _device_card(stats, counts)}
        | {
            tier: TierCard(
                pages_total=one.pages_total,
                pages_in_use=0,
                pages_cached=one.pages_in_use,
                state=one.state,
                hit_tokens=int(counts[f"{tier}.hit_tokens"]),
                evictions=int(counts[f"{tier}.evictions"]),
            )
            for tier, one in stats.tiers.items()
        },
    )


def _device_card(stats: EngineStats, counts: Mapping[str, float]) -> TierCard:
    hit_tokens = counts["prefix_hit_tokens"] - counts["cpu.hit_tokens"] - counts["nvme.hit_tokens"]
    return TierCard(
        pages_total=stats.device_pages_total,
        pages_in_use=stats.device_pages_in_use,
        pages_cached=stats.device_pages_cached,
        state="on",
        hit_tokens=int(hit_tokens),
        evictions=int(counts["evictions"]),
    )
