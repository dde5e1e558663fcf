"""Copies between the device's pages and the host's: plain memory on a CPU, a stream of its own on a GPU.

A page is one contiguous row in both. The engine's thread calls for demotions before it computes; a worker thread calls
for promotions in parallel. Knows pages and slots as numbers; no names and no books.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from inferflux.engine.kv.store.host import HostPool

# Device page and host slot, or the other way round for promotions.
Pair = tuple[int, int]
Fence = Callable[[], None]


class Copier(Protocol):
    """Rows of one device pool and one host pool."""

    def demote(self, pairs: Sequence[Pair]) -> Callable[[], float | None]:
        """Copies device pages to host slots; computation that follows may overwrite the pages. Returns a function that
        returns how many seconds the copies took, or None while they are going on."""
        ...

    def fence(self) -> Fence:
        """Returns what a promotion requested now must wait for: computation in flight may still read its page."""
        ...

    def promote(self, pairs: Sequence[Pair], fence: Fence) -> None:
        """Copies host slots to device pages; returns when they are there. For worker threads."""
        ...

    def host_row(self, slot: int) -> memoryview:
        """Returns the slot's bytes, once no copy uses them any more."""
        ...


class HostCopier:
    """The device is the CPU: copies are done when the call returns."""

    def __init__(self, device_pool: torch.Tensor, host_pool: HostPool) -> None:
        self._device_rows = _rows(device_pool).numpy()
        (self._host_rows,) = (piece.numpy() for piece in host_pool.pieces)

    def demote(self, pairs: Sequence[Pair]) -> Callable[[], float | None]:
        start = time.perf_counter()
        for page, slot in pairs:
            np.copyto(self._host_rows[slot], self._device_rows[page])
        seconds = time.perf_counter() - start
        return lambda: seconds

    def fence(self) -> Fence:
        return _nothing

    def promote(self, pairs: Sequence[Pair], fence: Fence) -> None:
        fence()
        for page, slot in pairs:
            # numpy's copy lets other threads run meanwhile, and takes no more than this one.
            np.copyto(self._device_rows[page], self._host_rows[slot])

    def host_row(self, slot: int) -> memoryview:
        return memoryview(self._host_rows[slot])


class StreamCopier:
    """The device is a GPU. Copies run on one stream, in the order of the calls, and are fenced both ways: they wait for
    earlier computation, and later computation waits for demotions."""

    def __init__(self, device_pool: torch.Tensor, host_pool: HostPool) -> None:
        self._device = device_pool.device
        self._device_rows = _rows(device_pool)
        self._host_rows = host_pool
        self._stream = torch.cuda.Stream(self._device)
        self._lock = threading.Lock()
        # The last copy from or to each host slot that may still be going on.
        self._last_copy: dict[int, torch.cuda.Event] = {}

    def demote(self, pairs: Sequence[Pair]) -> Callable[[], float | None]:
        compute = torch.cuda.current_stream(self._device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with self._lock, torch.cuda.stream(self._stream):
            self._stream.wait_stream(compute)
            start.record(self._stream)
            for page, slot in pairs:
                self._host_rows[slot].copy_(self._device_rows[page], non_blocking=True)
                self._last_copy[slot] = end
            end.record(self._stream)
        compute.wait_event(end)
        return lambda: start.elapsed_time(end) / 1000 if end.query() else None

    def fence(self) -> Fence:
        computed = torch.cuda.Event()
        computed.record(torch.cuda.current_stream(self._device))
        return lambda: self._stream.wait_event(computed)

    def promote(self, pairs: Sequence[Pair], fence: Fence) -> None:
        done = torch.cuda.Event()
        with self._lock, torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            fence()
            for page, slot in pairs:
                self._device_rows[page].copy_(self._host_rows[slot], non_blocking=True)
                self._last_copy[slot] = done
            done.record(self._stream)
        done.synchronize()

    def host_row(self, slot: int) -> memoryview:
        with self._lock:
            last = self._last_copy.get(slot)
        if last is not None:
            last.synchronize()
        return self._host_rows[slot].numpy().data


def make_copier(device_pool: torch.Tensor, host_pool: HostPool) -> Copier:
    """Returns the copier for where the device pool is."""
    return (StreamCopier if device_pool.device.type == "cuda" else HostCopier)(device_pool, host_pool)


def _rows(pool: torch.Tensor) -> torch.Tensor:
    """[P, ...] -> uint8 [P, page bytes], the same memory."""
    return pool.view(pool.shape[0], -1).view(torch.uint8)


def _nothing() -> None:
    """The fence of a CPU: nothing to wait for."""
