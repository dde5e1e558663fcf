"""Health: with several ranks, watches that rank 0's engine loop runs and that its server still sends frames.

With one rank there is nothing to watch: the server watches its engine. Knows threads and clocks; knows no frame and no
rank. No torch.
"""

from typing import Final

from inferflux.config.tree import DistributedConfig
from inferflux.dist.heartbeat import heartbeat_interval_s
from inferflux.dist.watchdog import Watchdog

# A server that is suspended reads nothing, and the loop blocks; the other ranks must notice within the timeout.
SERVER_SHARE: Final = 0.8


class Health:
    """idle_s: how long the loop may wait for work before its next iteration; None: for ever."""

    def __init__(self, distributed: DistributedConfig) -> None:
        self.idle_s: float | None = None
        self._loop: Watchdog | None = None
        self._server: Watchdog | None = None
        if distributed.world_size > 1:
            self.idle_s = heartbeat_interval_s(distributed.timeout_s)
            self._loop = Watchdog(distributed.timeout_s, f"rank {distributed.rank}")
            self._server = Watchdog(distributed.timeout_s * SERVER_SHARE, "the server (a frame every second)")

    def note(self, has_frames: bool) -> None:
        """Records one iteration of the loop, and whether the server had sent frames."""
        if self._loop is not None:
            self._loop.feed()
        if self._server is not None and has_frames:
            self._server.feed()

    def close(self) -> None:
        for watchdog in (self._loop, self._server):
            if watchdog is not None:
                watchdog.stop()
