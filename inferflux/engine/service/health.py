"""Health of rank 0's engine among several ranks: does its loop turn, does its server still speak?

Alone there is nothing to watch: the server watches its engine. Knows clocks; knows no frame and no rank. No torch.
"""

import time
from collections.abc import Callable

from inferflux.config.tree import DistributedConfig
from inferflux.dist.beat import beat_interval_s
from inferflux.dist.watchdog import Watchdog
from inferflux.errors import EngineDeadError


class Health:
    """idle_s: how long the loop may wait for work before it must turn again; None: for ever."""

    def __init__(self, distributed: DistributedConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s = distributed.timeout_s
        self._clock = clock
        self._last_frame = clock()
        self._watchdog: Watchdog | None = None
        self.idle_s: float | None = None
        if distributed.world_size > 1:
            self.idle_s = beat_interval_s(self._timeout_s)
            self._watchdog = Watchdog(self._timeout_s, f"rank {distributed.rank}")

    def note(self, has_frames: bool) -> None:
        """One turn of the loop. Raises EngineDeadError when the server, which asks for a sign of life every second,
        has been silent for too long."""
        if self._watchdog is None:
            return
        self._watchdog.beat()
        now = self._clock()
        if has_frames:
            self._last_frame = now
        elif now - self._last_frame > self._timeout_s:
            raise EngineDeadError(f"the server has been silent for {now - self._last_frame:.0f} s")

    def close(self) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()
