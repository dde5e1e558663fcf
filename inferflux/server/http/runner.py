"""The listening side of the application: aiohttp's runner, with error answers in the API's shape.

What cannot be parsed as HTTP never reaches the middleware; it is answered here. So are headers that do not come to an
end: whoever sends them byte by byte holds a connection for HEADERS_S seconds at most. Knows no route.
"""

import asyncio
import logging
from typing import Any

from aiohttp import hdrs, web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler

from inferflux.server.audit import UnauthenticatedRequests
from inferflux.server.http.auditing import unreadable_event
from inferflux.server.http.context import CONTEXT, INFO
from inferflux.server.http.middleware import REQUEST_ID_HEADER, SERVER_NAME, request_id
from inferflux.server.http.problems import Problem, internal_problem
from inferflux.server.http.sockets import Crowd, prepare_connection

logger = logging.getLogger(__name__)

KEEPALIVE_S = 75.0
# From the first byte of a request to the end of its headers.
HEADERS_S = 20.0
# Idle connections and handlers that were told to stop get this long at the end.
SHUTDOWN_S = 1.0
# Whoever sends a token of an identity provider that is longer should learn that this is why.
_TOO_LONG = "the request line or a header is longer than 8190 bytes"
# Bodies are taken as they come: unpacking them would let a small request fill the memory.
_OPTIONS: dict[str, Any] = {"access_log": None, "keepalive_timeout": KEEPALIVE_S, "auto_decompress": False}


class _Connection(RequestHandler):
    """is_welcome: whether there was room for it when it was accepted."""

    __slots__ = ("_headers_timer", "is_welcome")

    def __init__(self, manager: web.Server, *, is_welcome: bool, **options: Any) -> None:
        super().__init__(manager, **options)
        self.is_welcome = is_welcome

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._headers_timer: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        if self.is_welcome:
            prepare_connection(transport)
        else:
            self.force_close()

    def data_received(self, data: bytes) -> None:
        """Starts the clock when a request begins, and stops it when its headers are complete."""
        num_before = self._request_count
        super().data_received(data)
        if self._request_count > num_before:
            self._stop_clock()
        elif self._headers_timer is None and self._waits_for_request:
            self._headers_timer = self._loop.call_later(HEADERS_S, self._headers_late)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    @property
    def _waits_for_request(self) -> bool:
        return self._waiter is not None and not self._waiter.done()

    def _headers_late(self) -> None:
        if self._waits_for_request:
            logger.debug("headers were not complete after %.0f s; closing", HEADERS_S)
            self.force_close()

    def _stop_clock(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answers what is not HTTP, and what the middleware let through."""
        known = request[INFO].id if INFO in request else None
        offered = known or request_id(request.headers.get(REQUEST_ID_HEADER))
        if status < 500:
            logger.debug("unreadable request: %s", _complaint(exc), extra={"request_id": offered})
            too_long = isinstance(exc, LineTooLong)
            problem = Problem(status, _TOO_LONG if too_long else "the request is not valid HTTP")
            if isinstance(self._manager, _Server):
                self._manager.unauthenticated.record(unreadable_event(offered, request.remote, status))
        else:
            logger.error("request failed", exc_info=exc, extra={"request_id": offered})
            problem = internal_problem(offered)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun; another cannot be sent")
        response = problem.response()
        response.headers[REQUEST_ID_HEADER] = offered
        response.headers[hdrs.SERVER] = SERVER_NAME
        response.force_close()
        return response


def _complaint(error: BaseException | None) -> str:
    """Returns what the parser says without what it quotes: the rest of a prompt, say, whose length was told wrong."""
    reason, quotes, _ = str(getattr(error, "message", "")).partition(":\n\n")
    return f"{type(error).__name__}: {reason}" if quotes else type(error).__name__


class _Server(web.Server):
    def __init__(self, server: web.Server, unauthenticated: UnauthenticatedRequests) -> None:
        super().__init__(server.request_handler, request_factory=server.request_factory, handler_cancellation=True)
        self.unauthenticated = unauthenticated
        self.crowd = Crowd()

    def __call__(self) -> RequestHandler:
        """Called when a connection has been accepted, before TLS."""
        return _Connection(self, loop=self._loop, is_welcome=self.crowd.admits_one(), **_OPTIONS)


class Runner(web.AppRunner):
    """An AppRunner whose handlers are cancelled when their client leaves, so that its engine work ends with it."""

    def __init__(self, app: web.Application) -> None:
        super().__init__(app, handler_cancellation=True, shutdown_timeout=SHUTDOWN_S, **_OPTIONS)

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        return _Server(server, self.app[CONTEXT].unauthenticated)
