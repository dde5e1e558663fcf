"""The engine's own process: read frames, step the engine, write frames.

Run as `python -m inferflux.engine.service.host FD LEVEL FORMAT`, FD being one end of a socket pair, the others
`logging.*`; or `serve` in a thread for `runtime.isolation: inline`. Ends at a Shutdown, or when the other end closes.
"""

import contextlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from typing import NoReturn

from inferflux.engine.engine import Engine
from inferflux.engine.interface import Output, Submit
from inferflux.engine.scheduler.request_outputs import refused_output
from inferflux.engine.service.health import Health
from inferflux.engine.service.output_frames import output_frames
from inferflux.engine.service.protocol import (
    Abort,
    CacheDropped,
    DropCache,
    Failed,
    FrameReader,
    FromEngine,
    Outputs,
    Ping,
    Pong,
    Ready,
    SetFairness,
    Share,
    Shutdown,
    Start,
    ToEngine,
    Unshare,
    encode,
)
from inferflux.engine.service.sharing import ShareReceiver
from inferflux.errors import EngineDeadError, InferFluxError, RequestError
from inferflux.log import setup_logging

logger = logging.getLogger(__name__)

INBOX_FRAMES = 1024
RECV_BYTES = 1 << 20
# How often an idle engine steps while pages are on their way to a lower tier.
BACKGROUND_INTERVAL_S = 0.05
# How often a long step reports that it is at work.
PROGRESS_INTERVAL_S = 1.0
# An orphan stuck in a step could hold a GPU for ever; a merely slow one gets this long to end.
ORPHAN_GRACE_S = 5.0

Inbox = queue.Queue[ToEngine]


def serve(sock: socket.socket, *, exit_when_orphaned: bool) -> None:
    """Loads the model named by the first frame and runs it until Shutdown or the end of the stream.

    exit_when_orphaned: end the whole process when the peer is gone and the step does not return in time.
    """
    inbox: Inbox = queue.Queue(INBOX_FRAMES)
    threading.Thread(target=_read, args=(sock, inbox, exit_when_orphaned), name="engine-inbox", daemon=True).start()
    with sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        start = inbox.get()
        if isinstance(start, Start):
            _serve_model(sock, inbox, start)


def _serve_model(sock: socket.socket, inbox: Inbox, start: Start) -> None:
    try:
        engine = Engine(start.model, start.runtime, start.distributed, start.adapters)
    except InferFluxError as error:
        _send(sock, Failed(type(error).__name__, str(error)))
        return
    except Exception as error:
        logger.exception("loading %s failed", start.model.id)
        _send(sock, Failed(type(error).__name__, f"loading failed: {error or type(error).__name__}"))
        return
    _send(sock, Ready(engine.info, engine.executor.phases))
    engine.on_progress(_ProgressReporter(sock, engine))
    health = Health(start.distributed)
    try:
        _loop(sock, inbox, engine, health)
        engine.close()
    except (BrokenPipeError, ConnectionResetError):
        raise
    except EngineDeadError as error:
        logger.error("%s", error)
        _send(sock, Failed(type(error).__name__, str(error)))
    except Exception as error:
        logger.exception("engine failed")
        _send(sock, Failed(type(error).__name__, "the engine failed; see its log"))
    finally:
        health.close()
        engine.close_file()


def _loop(sock: socket.socket, inbox: Inbox, engine: Engine, health: Health) -> None:
    shares = ShareReceiver()
    while True:
        wait_s = 0.0 if engine.has_work else BACKGROUND_INTERVAL_S if engine.has_background_work else health.idle_s
        frames = _take(inbox, wait_s)
        health.note(bool(frames))
        outputs: list[Output] = []
        for frame in frames:
            if isinstance(frame, Shutdown):
                return
            outputs += _handle(frame, sock, engine, shares)
        if engine.has_work or engine.has_background_work:
            outputs += engine.step()
        engine.heartbeat()
        # After an abort no other output may follow that reports the freed pages.
        if outputs or any(isinstance(frame, Abort) for frame in frames):
            for part in output_frames(outputs, engine.stats()):
                _send(sock, part)


def _handle(frame: ToEngine, sock: socket.socket, engine: Engine, shares: ShareReceiver) -> list[Output]:
    """Carries out a frame. Returns the refusal of a request that cannot be accepted."""
    match frame:
        case Submit():
            return _submit(engine, shares, frame)
        case Share() | Unshare():
            shares.receive(frame)
        case Abort():
            engine.abort(frame.request_ids)
        case SetFairness():
            engine.set_fairness(frame.policy, frame.fairness)
        case DropCache():
            engine.drop_cache()
            _send(sock, CacheDropped(engine.stats()))
        case Ping():
            _send(sock, Pong(engine.stats()))
    return []


class _ProgressReporter:
    """Called during a long step, by the thread that steps: tells the server, which would kill a silent engine, that it
    is at work."""

    def __init__(self, sock: socket.socket, engine: Engine) -> None:
        self._sock = sock
        self._engine = engine
        self._last = time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self._last >= PROGRESS_INTERVAL_S:
            self._last = now
            _send(self._sock, Outputs([], self._engine.stats()))


def _submit(engine: Engine, shares: ShareReceiver, frame: Submit) -> list[Output]:
    try:
        engine.submit(shares.complete(frame))
    except RequestError as error:
        return [refused_output(frame.request_id, error)]
    return []


def _take(inbox: Inbox, wait_s: float | None) -> list[ToEngine]:
    """Returns the frames in the inbox; when there are none, waits up to wait_s seconds for one (None: without
    limit)."""
    frames: list[ToEngine] = []
    with contextlib.suppress(queue.Empty):
        if wait_s != 0.0:
            frames.append(inbox.get(timeout=wait_s))
        while True:
            frames.append(inbox.get_nowait())
    return frames


def _read(sock: socket.socket, inbox: Inbox, exit_when_orphaned: bool) -> None:
    """Feeds the inbox until the stream ends; then asks the loop to end."""
    reader: FrameReader[ToEngine] = FrameReader(ToEngine)
    try:
        while data := sock.recv(RECV_BYTES):
            for frame in reader.feed(data):
                inbox.put(frame)
    except OSError:
        pass  # the peer vanished or the loop closed the socket: both end the stream
    except ValueError:
        logger.exception("the server's stream is not valid")
    if exit_when_orphaned:
        timer = threading.Timer(ORPHAN_GRACE_S, os._exit, args=(0,))
        timer.daemon = True
        timer.start()
    inbox.put(Shutdown())


def _send(sock: socket.socket, frame: FromEngine) -> None:
    sock.sendall(encode(frame))


def main() -> NoReturn:
    # The server decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _, descriptor, level, log_format = sys.argv
    setup_logging(level, "json" if log_format == "json" else "text")
    serve(socket.socket(fileno=int(descriptor)), exit_when_orphaned=True)
    logging.shutdown()
    # Destroying torch and the weights in order would keep the server waiting for a second or two.
    os._exit(0)


if __name__ == "__main__":
    main()
