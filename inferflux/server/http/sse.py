"""Server-sent events: one `data:` line each, `[DONE]` at the end, nothing held back.

Headers go out with the first event, so whatever fails before can still be an ordinary error answer. Knows no API
shapes.
"""

import asyncio
import logging

from aiohttp import web

from inferflux.server.http.context import INFO

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
# A client that reads nothing for so long is taken for gone; the sockets' own limit is longer (see `sockets`).
STALL_S = 30.0
# Bytes that a connection takes without waiting when nothing else lies in its buffer; asyncio's limit is 65536.
AT_ONCE = 16384
_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


def event(data: bytes) -> bytes:
    """Returns one event. `data` must not hold a line break, as compact JSON never does."""
    return b"data: " + data + b"\n\n"


class EventStream:
    """One response made of events. Several tasks may send; each call's bytes stay together.

    `send` waits while the client is slow to read; what the sender's source merges meanwhile goes out as one event.
    """

    def __init__(self, request: web.Request) -> None:
        self.response = web.StreamResponse(headers=_HEADERS)
        self._request = request
        self._preparing = asyncio.Lock()

    @property
    def started(self) -> bool:
        """Whether the status line is spoken for."""
        return self.response.prepared

    async def send(self, events: bytes) -> None:
        """Raises ConnectionError when the client is gone, or has read nothing for STALL_S and is sent away."""
        if not self.response.prepared:
            async with self._preparing:
                if not self.response.prepared:
                    await self.response.prepare(self._request)
        transport = self._request.transport
        if transport is not None and len(events) <= AT_ONCE and not transport.get_write_buffer_size():
            # Nothing lies unsent and this fits: there is nothing to wait for, and no clock to set at each token.
            await self.response.write(events)
            return
        try:
            async with asyncio.timeout(STALL_S):
                await self.response.write(events)
        except TimeoutError:
            self._drop()
            raise ConnectionError("the client has stopped reading") from None

    def _drop(self) -> None:
        """Ends the connection, whatever lies unsent."""
        transport = self._request.transport
        if transport is not None and not transport.is_closing():
            extra = {"request_id": self._request[INFO].id}
            logger.warning("a stream was dropped: the client has read nothing for %.0f s", STALL_S, extra=extra)
            transport.abort()
