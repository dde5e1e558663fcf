"""How often ranks ask each other for a sign of life while nothing is computed. Plain numbers; no torch."""

from typing import Final

LONGEST_S: Final = 1.0
SHARE_OF_TIMEOUT: Final = 0.1


def beat_interval_s(timeout_s: float) -> float:
    """Returns the seconds between two signs of life, when a rank may be silent for timeout_s."""
    return min(LONGEST_S, timeout_s * SHARE_OF_TIMEOUT)
