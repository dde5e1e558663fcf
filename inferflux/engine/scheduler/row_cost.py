"""RowCost: how much longer one more row makes a step that only decodes, by a line fitted to the latest steps.

Least squares with exponentially fading weights. Steps with the same number of rows say nothing about the cost of a row:
until that number has varied, it is not known. Knows numbers only.
"""

from typing import Final

from inferflux.engine.smoothing import without_outlier

# Weight of a step relative to the next one: the last 50 steps decide.
FADING: Final = 0.98
# Variance of the number of rows, in rows squared, well below which the line is taken to be flat.
MIN_VARIANCE: Final = 0.05
# Below this variance, or before so many steps, what a row costs is not known.
KNOWN_VARIANCE: Final = 0.1
KNOWN_WEIGHT: Final = 8.0


class RowCost:
    __slots__ = ("_products", "_rows", "_seconds", "_squares", "_weight")

    def __init__(self) -> None:
        self._weight = self._rows = self._squares = self._seconds = self._products = 0.0

    def note(self, rows: int, seconds: float) -> None:
        """Learns from a step of `rows` rows that took `seconds`."""
        if self._weight > 1:
            seconds = without_outlier(seconds, self._predicted(rows))
        self._weight = FADING * self._weight + 1
        self._rows = FADING * self._rows + rows
        self._squares = FADING * self._squares + rows * rows
        self._seconds = FADING * self._seconds + seconds
        self._products = FADING * self._products + rows * seconds

    @property
    def is_known(self) -> bool:
        """Whether the number of rows has varied enough of late to tell."""
        return self._weight >= KNOWN_WEIGHT and self._variance() >= KNOWN_VARIANCE

    def share(self, rows: int) -> float:
        """Returns which part of the time of a step of `rows` rows is due to its rows, 0 to 1; the rest is fixed."""
        seconds = self._predicted(rows)
        return min(1.0, self._slope() * rows / seconds) if seconds > 0 else 0.0

    def _predicted(self, rows: int) -> float:
        if not self._weight:
            return 0.0
        return self._seconds / self._weight + self._slope() * (rows - self._rows / self._weight)

    def _slope(self) -> float:
        """Seconds a row, not below 0."""
        if not self._weight:
            return 0.0
        covariance = (self._products - self._rows / self._weight * self._seconds) / self._weight
        return max(0.0, covariance / (self._variance() + MIN_VARIANCE))

    def _variance(self) -> float:
        """Variance of the number of rows."""
        mean = self._rows / self._weight
        return self._squares / self._weight - mean * mean
