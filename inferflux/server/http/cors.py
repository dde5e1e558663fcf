"""Which web pages a browser lets talk to this server: those of `server.cors_origins`, and the server's own.

A page from elsewhere is refused outright, not only denied the answer: without keys, on a developer's machine, any web
site could otherwise make the browser post requests. Programs that are not browsers send no Origin and notice nothing.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from inferflux.config import Config
from inferflux.config.urls import is_address
from inferflux.server.http.context import INFO
from inferflux.server.http.problems import Problem

ANY_ORIGIN = "*"
_ALLOWED_HEADERS = "Authorization, Content-Type, If-Match, X-Api-Key, X-Request-Id"
_ALLOWED_METHODS = "GET, POST, PUT, DELETE, OPTIONS"
_EXPOSED_HEADERS = ", ".join(
    (
        "ETag",
        "X-Request-Id",
        "Retry-After",
        *(f"X-RateLimit-{word}-{kind}" for kind in ("Requests", "Tokens") for word in ("Limit", "Remaining", "Reset")),
    )
)
_PREFLIGHT_MAX_AGE_S = "600"
_HEADER_NAMES = re.compile(r"[\w!#$%&'*+.^`|~, -]{1,4096}", re.ASCII)


@dataclass(frozen=True)
class Origins:
    """listed: `server.cors_origins`. own_names: whether the server's own pages may come under any name. Not so where
    callers need no key: a site could have its own name point here, and be the server's own page for the browser."""

    listed: Sequence[str]
    own_names: bool

    def allow(self, origin: str, host: str | None) -> bool:
        """Returns whether a page from `origin` may talk to the server that was addressed as `host`."""
        if ANY_ORIGIN in self.listed or origin in self.listed:
            return True
        return origin.partition("://")[2] == host and (self.own_names or is_address(host))


def origins_of(config: Config) -> Origins:
    listed = [origin.lower() for origin in config.server.cors_origins]  # as browsers write them
    return Origins(listed, own_names=not config.auth.allow_anonymous)


def cors(origins: Origins) -> Middleware:
    """Returns the middleware that refuses foreign pages and answers browsers' preflight questions."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is None:
            return await handler(request)
        if not origins.allow(origin, request.headers.get(hdrs.HOST)):
            request[INFO].decision = "denied:origin"
            return Problem(403, "pages of this origin are not in server.cors_origins", "permission_error").response()
        if request.method == hdrs.METH_OPTIONS and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers:
            return web.Response(
                status=204,
                headers={
                    hdrs.ACCESS_CONTROL_ALLOW_METHODS: _ALLOWED_METHODS,
                    hdrs.ACCESS_CONTROL_ALLOW_HEADERS: _allowed_headers(request),
                    hdrs.ACCESS_CONTROL_MAX_AGE: _PREFLIGHT_MAX_AGE_S,
                },
            )
        return await handler(request)

    return middleware


def _allowed_headers(request: web.Request) -> str:
    """Returns what the page asks to send: SDKs send headers of their own, and a page that may call may send any."""
    asked = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "")
    return asked if _HEADER_NAMES.fullmatch(asked) else _ALLOWED_HEADERS


def add_cors_headers(request: web.Request, response: web.StreamResponse, origins: Origins) -> None:
    """Tells the browser that the page may read this answer, if it may."""
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is None or not origins.allow(origin, request.headers.get(hdrs.HOST)):
        return
    response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = ANY_ORIGIN if ANY_ORIGIN in origins.listed else origin
    response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = _EXPOSED_HEADERS
    response.headers.add(hdrs.VARY, hdrs.ORIGIN)
