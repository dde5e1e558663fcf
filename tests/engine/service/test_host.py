"""The engine's own loop, at the edges of its stream."""

import socket
import threading

import pytest

from inferflux.engine.service.host import serve
from inferflux.engine.service.protocol import MAX_FRAME_BYTES
from tests.support.waiting import PATIENCE_S


@pytest.mark.parametrize(
    "words",
    [b"", b"\x01\x00\x00\x00\xc1", (MAX_FRAME_BYTES + 1).to_bytes(4, "little")],
    ids=["an end", "no frame", "too large a frame"],
)
def test_a_stream_that_ends_or_makes_no_sense_is_left(words: bytes) -> None:
    """An engine that goes on without hearing anything would have to be killed."""
    ours, theirs = socket.socketpair()
    with ours:
        loop = threading.Thread(target=serve, args=(theirs,), kwargs={"exit_when_orphaned": False}, daemon=True)
        loop.start()
        ours.sendall(words)
        if not words:
            ours.shutdown(socket.SHUT_WR)
        loop.join(PATIENCE_S)
        assert not loop.is_alive()
