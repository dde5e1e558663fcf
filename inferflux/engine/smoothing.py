"""What the estimators of time have in common: a moving average, and what a delayed step counts as.

There are three, for three questions:
  `scheduler.step_time`  how long does this step take? Tells decoding rows from prompt tokens. For `fair_share`.
  `scheduler.row_cost`   what share of a decode step's time do its rows take, if that is known? For `speculator`.
  `kv.rates`             how long does a prompt token take, and loading a page? To choose between the two.
Pure functions of numbers.
"""

from typing import Final

# A step that takes longer than this multiple of the prediction was delayed by something else, and counts as that.
MAX_RATIO: Final = 4.0


def moving_average(mean: float | None, value: float, weight: float) -> float:
    """Returns the mean moved towards a new value, which counts `weight`. mean None: this is the first value."""
    return value if mean is None else mean + weight * (value - mean)


def without_outlier(seconds: float, predicted_s: float) -> float:
    """Returns what a step counts as that took `seconds` where predicted_s were expected."""
    return min(seconds, MAX_RATIO * predicted_s)
