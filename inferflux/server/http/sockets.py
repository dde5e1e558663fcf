"""What is asked of the kernel for each connection: to notice a peer that vanished without a word, and to keep little.

A machine that is switched off, or a cable that is cut, closes nothing. Keep-alive probes find that out while nothing is
sent, the user timeout while something is; then the connection ends as if the client had left. And how many connections
there may be: the last file descriptors are the server's own. Knows no HTTP.
"""

import asyncio
import contextlib
import logging
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from typing import Final

PROBE_AFTER_S: Final = 15
PROBE_EVERY_S: Final = 5
NUM_PROBES: Final = 3
# How long sent bytes may stay unacknowledged, or unsent since the client reads nothing.
USER_TIMEOUT_S: Final = 45
# By itself the kernel would keep megabytes for a client that reads nothing.
SEND_BUFFER_BYTES: Final = 128 * 1024
MAX_OPEN_FILES: Final = 65536
# For policy store, logs, engines and the server's own requests; of a small limit a quarter.
RESERVED_FILES: Final = 64
CROWDED_EVERY_S: Final = 60.0

logger = logging.getLogger(__name__)


class Crowd:
    """Counts out connections that would take the last file descriptors, and says so in the log once in a while.

    The event loop closes such connections without a word when there is no descriptor left at all. clock: seconds,
    never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._num_turned_away = 0
        self._said = -CROWDED_EVERY_S

    def admits_one(self) -> bool:
        """Whether there is room for the connection that was just accepted, which is to be closed where there is not."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if limit == resource.RLIM_INFINITY or _next_descriptor(limit) < limit - min(RESERVED_FILES, limit // 4):
            return True
        self._num_turned_away += 1
        if self._clock() - self._said >= CROWDED_EVERY_S:
            self._said = self._clock()
            words = (
                "out of file descriptors (limit %d, ulimit -n): connections turned away since this was last said: %d"
            )
            logger.error(words, limit, self._num_turned_away)
            self._num_turned_away = 0
        return False


def _next_descriptor(limit: int) -> int:
    """Returns the lowest number that is free, so that all below are taken; the limit when none is."""
    try:
        number = os.open(os.devnull, os.O_RDONLY)
    except OSError:
        return limit
    os.close(number)
    return number


def prepare_connection(transport: asyncio.BaseTransport) -> None:
    """Sets the options that this platform has."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):  # closed by now
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        for option, value in _options():
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def allow_many_connections() -> None:
    """Raises this process's limit of open files, which counts connections, as far as it may be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft not in (resource.RLIM_INFINITY, wanted) and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # a platform's own, lower limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _options() -> Iterator[tuple[int, int]]:
    for name, value in (
        ("TCP_KEEPIDLE", PROBE_AFTER_S),
        ("TCP_KEEPINTVL", PROBE_EVERY_S),
        ("TCP_KEEPCNT", NUM_PROBES),
        ("TCP_USER_TIMEOUT", USER_TIMEOUT_S * 1000),
    ):
        if hasattr(socket, name):
            yield getattr(socket, name), value
