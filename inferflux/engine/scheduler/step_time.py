"""StepTimeModel: predicts how long a step takes from what it computes, learning from the steps so far.

    seconds = fixed + row_s * decoding rows + token_s * prompt tokens

Where rows cost nearly nothing (a GPU that waits for its memory) row_s is small; on a CPU it is large. Each step moves
the three coefficients towards values that would have predicted it (normalised least mean squares). A feature that the
latest steps lack, such as rows while only prompts are computed, keeps its coefficient. Knows numbers only.
"""

from typing import Final, NamedTuple

from inferflux.engine.smoothing import without_outlier

# The share of a step's error that is corrected; the first steps, before which little is known, correct more.
GAIN: Final = 0.3
_NUM_FIRST: Final = 8
# Features are scaled by these (none, rows, prompt tokens), so that none dominates the others.
_UNITS: Final = (1.0, 32.0, 256.0)


class StepSize(NamedTuple):
    """What a step computes."""

    decode_rows: int
    prefill_tokens: int


class StepTimeModel:
    def __init__(self) -> None:
        self._coefficients = [0.0, 0.0, 0.0]
        self._num_steps = 0

    @property
    def row_s(self) -> float:
        """Seconds that one more decoding row adds to a step."""
        return self._coefficients[1] / _UNITS[1]

    @property
    def token_s(self) -> float:
        """Seconds that one more prompt token adds to a step."""
        return self._coefficients[2] / _UNITS[2]

    def seconds_of(self, size: StepSize) -> float:
        """Returns how many seconds a step is expected to take."""
        return self._coefficients[0] + self.added_s(size)

    def added_s(self, size: StepSize) -> float:
        """Returns how many seconds rows and tokens of `size` add to a step that runs anyway."""
        return self.row_s * size.decode_rows + self.token_s * size.prefill_tokens

    def note(self, size: StepSize, seconds: float) -> None:
        """Learns from a step that took `seconds`."""
        predicted = self.seconds_of(size)
        if self._num_steps >= _NUM_FIRST:
            seconds = without_outlier(seconds, predicted)
        self._num_steps += 1
        features = (1.0, size.decode_rows / _UNITS[1], size.prefill_tokens / _UNITS[2])
        change = max(GAIN, 1.0 / self._num_steps) * (seconds - predicted) / sum(value * value for value in features)
        self._coefficients = [
            max(0.0, coefficient + change * value)
            for coefficient, value in zip(self._coefficients, features, strict=True)
        ]
