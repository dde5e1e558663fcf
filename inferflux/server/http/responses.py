"""JSON answers made of structs."""

import msgspec
from aiohttp import web


def json_response(body: msgspec.Struct, *, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json", status=status)
