"""What is asked of the kernel for each connection: to notice a peer that vanished without a word, and to keep little.

A machine that is switched off, or a cable that is cut, closes nothing. Keep-alive probes find that out while nothing is
sent, the user timeout while something is; then the connection ends as if the client had left. Knows no HTTP.
"""

import asyncio
import contextlib
import resource
import socket
from collections.abc import Iterator
from typing import Final

PROBE_AFTER_S: Final = 15
PROBE_EVERY_S: Final = 5
NUM_PROBES: Final = 3
# How long sent bytes may stay unacknowledged, or unsent since the client reads nothing.
USER_TIMEOUT_S: Final = 45
# By itself the kernel would keep megabytes for a client that reads nothing.
SEND_BUFFER_BYTES: Final = 128 * 1024
MAX_OPEN_FILES: Final = 65536


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
