"""GET, PUT /v1/admin/fairness: in which order requests are served, and who makes room for whom."""

import asyncio

import msgspec
from aiohttp import web

from inferflux.server.http.admin import change_policy
from inferflux.server.http.context import CONTEXT
from inferflux.server.http.preconditions import check_unchanged, tagged_response
from inferflux.server.http.requests import read_body
from inferflux.server.http.schemas.admin import FAIRNESS, FairnessRequest
from inferflux.server.policy.document import Fairness, PolicyDocument
from inferflux.server.policy.seed import fairness_config


async def get_fairness(request: web.Request) -> web.Response:
    return tagged_response(request.app[CONTEXT].policy.document.fairness)


async def put_fairness(request: web.Request) -> web.Response:
    """A change that has been kept is put in force even if its caller leaves meanwhile."""
    body = await read_body(request, FAIRNESS)
    return tagged_response(await asyncio.shield(asyncio.create_task(_change(request, body))))


async def _change(request: web.Request, body: FairnessRequest) -> Fairness:
    context = request.app[CONTEXT]

    def change(document: PolicyDocument) -> PolicyDocument:
        check_unchanged(request, document.fairness)
        return msgspec.structs.replace(document, fairness=body.applied_to(document.fairness))

    document = await change_policy(request, {"action": "fairness_changed", **body.given()}, change)
    # The one in force by now: of two changes at the same time, the later one may have been kept already.
    fairness = context.policy.document.fairness
    context.admission.policy = fairness.policy
    for backend in context.backends.engines:
        backend.client.set_fairness(fairness.policy, fairness_config(fairness))
    return document.fairness
