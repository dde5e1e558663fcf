"""GET /v1/admin/policy: how the administrators' decisions are kept, and how many there are. Their content is what the
other admin routes show."""

from aiohttp import web

from inferflux.server.http.context import CONTEXT
from inferflux.server.http.responses import json_response
from inferflux.server.http.schemas.admin import PolicyCard


async def get_policy(request: web.Request) -> web.Response:
    store = request.app[CONTEXT].policy
    document = store.document
    card = PolicyCard(
        generation=store.generation,
        persistent=store.persistent,
        encrypted=store.encrypted,
        api_keys=len(document.api_keys),
        admin_keys=sum("admin" in record.scopes for record in document.api_keys),
        blocked_terms=len(document.guardrails.blocklist),
        loaded_models=len(document.models.loaded),
        unloaded_models=len(document.models.unloaded),
    )
    return json_response(card)
