"""CUDA's streams and events played on a CPU: copies are done at once, and what nothing orders is found.

Each stream, and the host, has a vector clock (Fidge 1988): how much of each stream's work is known to be done. Two
accesses to the same bytes, one of them a write, are a race unless the later one's stream knows the earlier to be done.
That finds a missing event in whatever order the copies happen to be done.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

Clock = dict[object, int]
Tensors = Sequence[torch.Tensor]


class Access:
    """What a stream (or the host) did to some bytes, as its work number `tick`."""

    def __init__(self, where: range, who: object, tick: int, *, writes: bool) -> None:
        self.where, self.who, self.tick, self.writes = where, who, tick, writes


class PlayedStreams(TorchFunctionMode):
    """Inside `with`, torch.cuda's streams are these, and `copy_` is work on the current one. ignored: methods of
    streams and events that do nothing, as if they had been forgotten. races: what was found."""

    def __init__(self, ignored: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.ignored = ignored
        self.races: list[str] = []
        self.host: Clock = {}
        self.compute = PlayedStream(self)
        self._accesses: list[Access] = []
        self._current = threading.local()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.copy_:
            self.work(self.current, reads=[args[1]], writes=[args[0]])
        return func(*args, **(kwargs or {}))

    @property
    def current(self) -> "PlayedStream":
        found: PlayedStream = getattr(self._current, "stream", self.compute)
        return found

    def work(self, stream: "PlayedStream", reads: Tensors = (), writes: Tensors = ()) -> None:
        """Queues work; what the host has waited for is done before."""
        stream.clock = joined(stream.clock, self.host)
        stream.clock[stream] = stream.clock.get(stream, 0) + 1
        self._note(stream, stream.clock, reads, writes)

    def host_work(self, reads: Tensors = (), writes: Tensors = ()) -> None:
        self.host["host"] = self.host.get("host", 0) + 1
        self._note("host", self.host, reads, writes)

    def _note(self, who: object, clock: Clock, reads: Tensors, writes: Tensors) -> None:
        for tensors, is_write in ((reads, False), (writes, True)):
            for tensor in tensors:
                where = range(tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size())
                for earlier in self._accesses:
                    overlaps = earlier.where.start < where.stop and where.start < earlier.where.stop
                    if overlaps and (is_write or earlier.writes) and clock.get(earlier.who, 0) < earlier.tick:
                        self.races.append(f"{who} meets {earlier.who}")
                self._accesses.append(Access(where, who, clock[who], writes=is_write))

    @contextmanager
    def _on(self, stream: "PlayedStream") -> Iterator[None]:
        before = self.current
        self._current.stream = stream
        try:
            yield
        finally:
            self._current.stream = before

    def __enter__(self) -> "PlayedStreams":
        played = {
            "Stream": lambda device: PlayedStream(self),
            "Event": lambda **_: PlayedEvent(self),
            "current_stream": lambda device: self.current,
            "stream": self._on,
            "device": lambda device: nullcontext(),
        }
        self._patch = patch.object(torch, "cuda", SimpleNamespace(**played))
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()


class PlayedStream:
    def __init__(self, streams: PlayedStreams) -> None:
        self._streams = streams
        self.clock: Clock = {}

    def wait_stream(self, other: "PlayedStream") -> None:
        if "wait_stream" not in self._streams.ignored:
            self.clock = joined(self.clock, other.clock)

    def wait_event(self, event: "PlayedEvent") -> None:
        if "wait_event" not in self._streams.ignored:
            self.clock = joined(self.clock, event.clock)


class PlayedEvent:
    def __init__(self, streams: PlayedStreams) -> None:
        self._streams = streams
        self.clock: Clock = {}

    def record(self, stream: PlayedStream) -> None:
        self.clock = dict(joined(stream.clock, self._streams.host))

    def query(self) -> bool:
        self.synchronize()
        return True

    def elapsed_time(self, end: "PlayedEvent") -> float:
        return 1.0

    def synchronize(self) -> None:
        if "synchronize" not in self._streams.ignored:
            self._streams.host.update(joined(self._streams.host, self.clock))


def joined(one: Clock, other: Clock) -> Clock:
    return {who: max(one.get(who, 0), other.get(who, 0)) for who in one.keys() | other.keys()}
