"""JSON answers made of structs."""

from collections.abc import Mapping

import msgspec
from aiohttp import web


def json_response(body: msgspec.Struct, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    data = msgspec.json.encode(body)
    return web.Response(body=data, content_type="application/json", status=status, headers=headers)
