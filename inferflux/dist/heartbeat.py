"""How often rank 0 asks the other ranks for a heartbeat while it is idle. Plain numbers; no torch."""

from typing import Final

MAX_INTERVAL_S: Final = 1.0
SHARE_OF_TIMEOUT: Final = 0.1


def heartbeat_interval_s(timeout_s: float) -> float:
    """Returns the seconds between two heartbeats if a rank must respond within timeout_s."""
    return min(MAX_INTERVAL_S, timeout_s * SHARE_OF_TIMEOUT)
