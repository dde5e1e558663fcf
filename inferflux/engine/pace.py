"""StepPace: how the time of a step grows with its rows, learnt from the steps that were computed.

A line through what was measured, fixed cost and cost per row, the latest steps counting most. Where rows cost nearly
nothing (a GPU that waits for its memory) the line is flat; on a CPU it is steep. Knows numbers only.
"""

from typing import Final

# What a step weighs beside the one after it: about the last hundred count.
_DECAY: Final = 0.99
# A line needs steps of different sizes: the least variance of their numbers of rows, and the least weight.
_LEAST_SPREAD: Final = 1.0
_LEAST_WEIGHT: Final = 8.0


class StepPace:
    """slope: cost of a row in units of the fixed cost; None while unknown. It stays when all steps become alike."""

    def __init__(self) -> None:
        self.slope: float | None = None
        self._weight = 0.0
        self._rows = 0.0
        self._seconds = 0.0
        self._spread = 0.0
        self._shared = 0.0

    def note(self, num_rows: int, seconds: float) -> None:
        """Takes in a step that decoded so many rows and did nothing else."""
        self._weight = _DECAY * self._weight + 1.0
        step = 1.0 / self._weight
        off_rows, off_seconds = num_rows - self._rows, seconds - self._seconds
        self._rows += step * off_rows
        self._seconds += step * off_seconds
        self._spread = (1.0 - step) * (self._spread + step * off_rows**2)
        self._shared = (1.0 - step) * (self._shared + step * off_rows * off_seconds)
        if self._weight >= _LEAST_WEIGHT and self._spread >= _LEAST_SPREAD:
            per_row = max(0.0, self._shared / self._spread)
            fixed = self._seconds - per_row * self._rows
            self.slope = per_row / max(fixed, per_row, 1e-9)

    def rows_within(self, factor: float) -> float | None:
        """Returns how many rows a step may have to take `factor` times as long as a step of one; None while unknown."""
        if self.slope is None:
            return None
        return (factor * (1.0 + self.slope) - 1.0) / self.slope if self.slope else float("inf")
