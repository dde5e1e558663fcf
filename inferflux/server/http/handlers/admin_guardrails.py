"""GET, PUT /v1/admin/guardrails: what may be said."""

import asyncio

import msgspec
from aiohttp import web

from inferflux.server.http.admin import change_policy
from inferflux.server.http.context import CONTEXT
from inferflux.server.http.preconditions import check_unchanged, tagged_response
from inferflux.server.http.requests import read_body
from inferflux.server.http.schemas.admin import GUARDRAILS, GuardrailsRequest
from inferflux.server.policy.document import Guardrails
from inferflux.server.policy.gate import settings_of


async def get_guardrails(request: web.Request) -> web.Response:
    return tagged_response(request.app[CONTEXT].policy.document.guardrails)


async def put_guardrails(request: web.Request) -> web.Response:
    """A change that has been kept is put in force even if its caller leaves meanwhile."""
    body = await read_body(request, GUARDRAILS)
    return tagged_response(await asyncio.shield(asyncio.create_task(_change(request, body))))


async def _change(request: web.Request, body: GuardrailsRequest) -> Guardrails:
    """Changes follow one another, so that what was checked is what is kept and put in force."""
    context = request.app[CONTEXT]
    async with context.guardrails_turn:
        before = context.policy.document.guardrails
        check_unchanged(request, before)
        part = body.applied_to(before)
        settings = await asyncio.to_thread(settings_of, part, context.config.guardrails.opa_timeout_ms)
        what = {
            "action": "guardrails_changed",
            "num_terms": len(part.blocklist),
            "opa_endpoint": part.opa_endpoint,
            "on_error": part.on_error,
            "check_output": part.check_output,
        }
        await change_policy(request, what, lambda document: msgspec.structs.replace(document, guardrails=part))
        context.gate.settings = settings
        return part
