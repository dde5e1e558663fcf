"""Channel: rank 0 sends the other ranks messages, as bytes, over a group in host memory (gloo).

A broadcast carries a header and nearly always the whole message; a longer message needs a second broadcast. Besides
messages there are heartbeats, which every rank answers, and the end. Does not know what a message means. If a rank is
gone or does not respond, every call here raises EngineDeadError within the group's timeout.
"""

import struct
import time
from datetime import timedelta
from typing import Final

import torch
import torch.distributed

from inferflux.dist.context import ParallelContext
from inferflux.dist.faults import LostRank
from inferflux.dist.launch import START_TIMEOUT_S

# A step of 32 decoding rows takes about 600 bytes.
INLINE_BYTES: Final = 4096
_HEADER: Final = struct.Struct("<II")
_MESSAGE, _HEARTBEAT, _CLOSE = range(3)


class Channel:
    """One per rank; all ranks create theirs at the same point. With a single rank nothing is sent.

    Rank 0 calls `send`, `heartbeat` and `close`; the others call `receive`. Single-threaded.
    """

    def __init__(self, context: ParallelContext) -> None:
        self.context = context
        self._frame = torch.zeros(_HEADER.size + INLINE_BYTES, dtype=torch.uint8)
        self._bytes = self._frame.numpy().data
        self._token = torch.zeros(1, dtype=torch.int32)
        self._last_sent = time.monotonic()

    def barrier(self) -> None:
        """Returns once every rank has called this, however much later, such as after a load."""
        if self.context.control is not None:
            with LostRank():
                torch.distributed.monitored_barrier(self.context.control, timedelta(seconds=START_TIMEOUT_S))

    def agree(self, yes: bool) -> bool:
        """Returns whether every rank says yes; a `barrier` comes first."""
        self.barrier()
        return self.context.all_reduce_min([int(yes)]) == [1]

    def send(self, message: bytes) -> None:
        """Sends the message to every other rank."""
        if self.context.control is None:
            return
        body = memoryview(message)
        self._bytes[_HEADER.size : _HEADER.size + min(len(body), INLINE_BYTES)] = body[:INLINE_BYTES]
        self._announce(_MESSAGE, len(body))
        if len(body) > INLINE_BYTES:
            rest = torch.frombuffer(bytearray(body[INLINE_BYTES:]), dtype=torch.uint8)
            self._broadcast(rest)

    def heartbeat(self, interval_s: float) -> None:
        """Asks every rank for a heartbeat and waits for it, unless something was sent within the last interval_s."""
        if self.context.control is not None and time.monotonic() - self._last_sent >= interval_s:
            self._announce(_HEARTBEAT, 0)
            self._answer()

    def close(self) -> None:
        """Tells the other ranks that no message follows."""
        if self.context.control is not None:
            self._announce(_CLOSE, 0)

    def receive(self) -> bytes | None:
        """Returns the next message, b"" for a heartbeat, None once rank 0 has closed the channel."""
        self._broadcast(self._frame)
        kind, length = _HEADER.unpack_from(self._bytes)
        if kind == _CLOSE:
            return None
        if kind == _HEARTBEAT:
            self._answer()
            return b""
        message = bytes(self._bytes[_HEADER.size : _HEADER.size + min(length, INLINE_BYTES)])
        if length <= INLINE_BYTES:
            return message
        rest = torch.empty(length - INLINE_BYTES, dtype=torch.uint8)
        self._broadcast(rest)
        return message + rest.numpy().tobytes()

    def _announce(self, kind: int, length: int) -> None:
        _HEADER.pack_into(self._bytes, 0, kind, length)
        self._broadcast(self._frame)
        self._last_sent = time.monotonic()

    def _answer(self) -> None:
        with LostRank():
            torch.distributed.all_reduce(self._token, group=self.context.control)

    def _broadcast(self, tensor: torch.Tensor) -> None:
        with LostRank():
            torch.distributed.broadcast(tensor, 0, group=self.context.control)
