"""Connection: one engine from start to end: the host it runs in, the stream of frames, the watchdog.

Knows frames and hosts; knows no request, and does not decide what to do when the engine is gone. Lives on one event
loop.
"""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable

from inferflux.engine.service.failures import load_failure
from inferflux.engine.service.launch import RunningHost
from inferflux.engine.service.protocol import Failed, FrameReader, FromEngine, Ping, Ready, Start, ToEngine, encode
from inferflux.errors import EngineDeadError, ModelLoadError

logger = logging.getLogger(__name__)

RECV_BYTES = 1 << 18
PING_INTERVAL_S = 1.0
# Even the largest model loads faster from a slow disk.
LOAD_LIMIT_S = 3600.0


class Connection:
    """The stream to one engine. model_id: for messages. watchdog_s: an engine silent for longer is killed.

    stuck: silent for too long, and it could not be killed (a thread, say).
    """

    def __init__(self, model_id: str, host: RunningHost, watchdog_s: float) -> None:
        self.host = host
        self.stuck = False
        self._model_id = model_id
        self._watchdog_s = watchdog_s
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._frames: FrameReader[FromEngine] = FrameReader(FromEngine)
        self._last_received = 0.0

    async def open(self, sock: socket.socket, start: Start) -> Ready:
        """Has the engine load its model. sock: this side's end of the socket pair.

        Raises ModelLoadError or ConfigError with the engine's reason, EngineDeadError when it dies while loading.
        """
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, RECV_BYTES)
        self._reader, self._writer = await asyncio.open_connection(sock=sock)
        self.send(start)
        first = await self._first_frame(self._reader)
        if not isinstance(first, Ready):
            raise load_failure(self._model_id, first)
        self._last_received = time.monotonic()
        return first

    def send(self, frame: ToEngine) -> None:
        """Queues a frame on the socket. Frames for a dead engine are dropped, and `read` reports its death."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode(frame))

    async def read(self, deliver: Callable[[FromEngine], None]) -> str:
        """Passes every frame to `deliver` until the engine's end; returns why it ended."""
        assert self._reader is not None
        watchdog = asyncio.create_task(self._watch())
        reason = "the engine process died"
        try:
            while data := await self._reader.read(RECV_BYTES):
                self._last_received = time.monotonic()
                for frame in self._frames.feed(data):
                    if isinstance(frame, Failed):
                        reason = frame.message
                    else:
                        deliver(frame)
        except (ConnectionError, ValueError) as error:
            reason = f"the engine's stream broke: {error}"
        finally:
            watchdog.cancel()
            self.stuck = False
        return reason

    async def close(self) -> None:
        """Closes the stream after the frames sent so far, and waits for the engine's end."""
        if self._writer is not None:
            self._writer.close()
        await self.host.wait()
        if self._writer is not None:
            if self._writer.transport.get_write_buffer_size():
                # A stuck engine never reads the rest: do not wait for it. Once all is written, asyncio closes the
                # stream by itself, and fails to abort one that it has closed.
                self._writer.transport.abort()
            with contextlib.suppress(ConnectionError):
                await self._writer.wait_closed()

    async def _first_frame(self, reader: asyncio.StreamReader) -> FromEngine | None:
        """Returns the frame that ends loading; None when the stream ended without one. Raises ModelLoadError when
        neither comes in time, EngineDeadError when the stream breaks or is not valid."""
        name = self._model_id
        try:
            async with asyncio.timeout(LOAD_LIMIT_S):
                while data := await reader.read(RECV_BYTES):
                    for frame in self._frames.feed(data):
                        return frame
        except (ConnectionError, ValueError) as error:
            raise EngineDeadError(f"the stream of model {name}'s engine broke while loading: {error}") from error
        except TimeoutError:
            raise ModelLoadError(f"{name}: loading did not finish within {LOAD_LIMIT_S:.0f} s") from None
        return None

    async def _watch(self) -> None:
        """Sends a Ping every second; an engine that is silent for too long is killed, which ends `read`.

        Silence is counted in unanswered pings, not by the clock: if this process itself was suspended, the answers are
        waiting to be read.
        """
        num_unanswered = 0
        while True:
            asked = time.monotonic()
            self.send(Ping())
            await asyncio.sleep(PING_INTERVAL_S)
            num_unanswered = 0 if self._last_received >= asked else num_unanswered + 1
            was_stuck, self.stuck = self.stuck, num_unanswered * PING_INTERVAL_S >= self._watchdog_s
            if self.stuck and not was_stuck:
                logger.error("model %s: engine silent for %.0f s; killing it", self._model_id, self._watchdog_s)
                self.host.kill()
