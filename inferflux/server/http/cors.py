"""Which web pages a browser lets talk to this server: those of `server.cors_origins`, and the server's own.

A page from elsewhere is refused outright, not only denied the answer: without keys, on a developer's machine, any web
site could otherwise make the browser post requests. Programs that are not browsers send no Origin and notice nothing.
"""

from collections.abc import Sequence

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from inferflux.server.http.context import INFO
from inferflux.server.http.problems import Problem

ANY_ORIGIN = "*"
_ALLOWED_HEADERS = "Authorization, Content-Type, X-Api-Key, X-Request-Id"
_ALLOWED_METHODS = "GET, POST, PUT, DELETE, OPTIONS"
_EXPOSED_HEADERS = ", ".join(
    (
        "X-Request-Id",
        "Retry-After",
        *(f"X-RateLimit-{word}-{kind}" for kind in ("Requests", "Tokens") for word in ("Limit", "Remaining", "Reset")),
    )
)
_PREFLIGHT_MAX_AGE_S = "600"


def is_allowed(origin: str, host: str | None, allowed: Sequence[str]) -> bool:
    """Returns whether a page from `origin` may talk to the server that was addressed as `host`."""
    return ANY_ORIGIN in allowed or origin in allowed or origin.partition("://")[2] == host


def cors(allowed: Sequence[str]) -> Middleware:
    """Returns the middleware that refuses foreign pages and answers browsers' preflight questions."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is None:
            return await handler(request)
        if not is_allowed(origin, request.headers.get(hdrs.HOST), allowed):
            request[INFO].decision = "denied:origin"
            return Problem(403, "pages of this origin are not in server.cors_origins", "permission_error").response()
        if request.method == hdrs.METH_OPTIONS and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers:
            return web.Response(
                status=204,
                headers={
                    hdrs.ACCESS_CONTROL_ALLOW_METHODS: _ALLOWED_METHODS,
                    hdrs.ACCESS_CONTROL_ALLOW_HEADERS: _ALLOWED_HEADERS,
                    hdrs.ACCESS_CONTROL_MAX_AGE: _PREFLIGHT_MAX_AGE_S,
                },
            )
        return await handler(request)

    return middleware


def add_cors_headers(request: web.Request, response: web.StreamResponse, allowed: Sequence[str]) -> None:
    """Tells the browser that the page may read this answer, if it may."""
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is None or not is_allowed(origin, request.headers.get(hdrs.HOST), allowed):
        return
    response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = ANY_ORIGIN if ANY_ORIGIN in allowed else origin
    response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = _EXPOSED_HEADERS
    response.headers.add(hdrs.VARY, hdrs.ORIGIN)
