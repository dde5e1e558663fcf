"""The listening side of the application: aiohttp's runner, with error answers in the API's shape.

What cannot be parsed as HTTP never reaches the middleware; it is answered here. Knows no route.
"""

import logging
from typing import Any

from aiohttp import hdrs, web
from aiohttp.web_protocol import RequestHandler

from inferflux.server.http.middleware import REQUEST_ID_HEADER, SERVER_NAME, request_id
from inferflux.server.http.problems import Problem

logger = logging.getLogger(__name__)

KEEPALIVE_S = 75.0
# Idle connections and handlers that were told to stop get this long at the end.
SHUTDOWN_S = 1.0
# Bodies are taken as they come: unpacking them would let a small request fill the memory.
_OPTIONS: dict[str, Any] = {"access_log": None, "keepalive_timeout": KEEPALIVE_S, "auto_decompress": False}


class _Connection(RequestHandler):
    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answers what is not HTTP, and what the middleware let through."""
        offered = request_id(request.headers.get(REQUEST_ID_HEADER))
        if status < 500:
            logger.debug("unreadable request: %s", exc, extra={"request_id": offered})
            problem = Problem(status, "the request is not valid HTTP")
        else:
            logger.error("request failed", exc_info=exc, extra={"request_id": offered})
            problem = Problem(
                500, f"internal error; the server's log has it under request id {offered}", "server_error"
            )
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun; another cannot be sent")
        response = problem.response()
        response.headers[REQUEST_ID_HEADER] = offered
        response.headers[hdrs.SERVER] = SERVER_NAME
        response.force_close()
        return response


class _Server(web.Server):
    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **_OPTIONS)


class Runner(web.AppRunner):
    """An AppRunner whose handlers are cancelled when their client leaves, so that its engine work ends with it."""

    def __init__(self, app: web.Application) -> None:
        super().__init__(app, handler_cancellation=True, shutdown_timeout=SHUTDOWN_S, **_OPTIONS)

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        return _Server(server.request_handler, request_factory=server.request_factory, handler_cancellation=True)
