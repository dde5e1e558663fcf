"""GET, POST, DELETE /v1/admin/api_keys: who may call. A key is shown once, when it is made."""

import time

from aiohttp import web

from inferflux.server.access.key_generation import generate_key
from inferflux.server.http.admin import change_policy
from inferflux.server.http.context import CONTEXT
from inferflux.server.http.requests import read_body
from inferflux.server.http.responses import json_response
from inferflux.server.http.schemas.admin import KEY_ID, NEW_KEY, KeyList, Revoked, card_of
from inferflux.server.policy.document import add_key, revoke_key


async def list_keys(request: web.Request) -> web.Response:
    records = request.app[CONTEXT].policy.document.api_keys
    return json_response(KeyList([card_of(record) for record in records]))


async def make_key(request: web.Request) -> web.Response:
    body = await read_body(request, NEW_KEY)
    new = generate_key()
    record = body.record(new, int(time.time()))
    what = {"action": "api_key_created", "id": record.id, "name": record.name, "scopes": record.scopes}
    await change_policy(request, what, lambda document: add_key(document, record))
    response = json_response(card_of(record, new.key))
    response.headers["Cache-Control"] = "no-store"
    return response


async def delete_key(request: web.Request) -> web.Response:
    key_id = (await read_body(request, KEY_ID)).id
    what = {"action": "api_key_revoked", "id": key_id}
    await change_policy(request, what, lambda document: revoke_key(document, key_id))
    return json_response(Revoked(key_id))
