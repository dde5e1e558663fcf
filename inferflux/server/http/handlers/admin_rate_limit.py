"""GET, PUT /v1/admin/rate_limit: how many requests a minute everybody without a limit of their own may send."""

import msgspec
from aiohttp import web

from inferflux.server.http.admin import change_policy
from inferflux.server.http.context import CONTEXT
from inferflux.server.http.preconditions import check_unchanged, tagged_response
from inferflux.server.http.requests import read_body
from inferflux.server.http.schemas.admin import RATE_LIMIT
from inferflux.server.policy.document import PolicyDocument


async def get_rate_limit(request: web.Request) -> web.Response:
    return tagged_response(request.app[CONTEXT].policy.document.rate_limit)


async def put_rate_limit(request: web.Request) -> web.Response:
    part = (await read_body(request, RATE_LIMIT)).part()
    what = {"action": "rate_limit_changed", "requests_per_minute": part.requests_per_minute}

    def change(document: PolicyDocument) -> PolicyDocument:
        check_unchanged(request, document.rate_limit)
        return msgspec.structs.replace(document, rate_limit=part)

    document = await change_policy(request, what, change)
    return tagged_response(document.rate_limit)
