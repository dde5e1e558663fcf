"""StepPace: predicts how long a step takes from what it computes, learning from the steps so far.

    seconds = fixed + row_s * decoding rows + token_s * prompt tokens

Where rows cost nearly nothing (a GPU that waits for its memory) row_s is small; on a CPU it is large. Each step moves
the three coefficients towards values that would have predicted it (normalised least mean squares). A feature that the
latest steps lack, such as rows while only prompts are computed, keeps its coefficient. Knows numbers only.
"""

from typing import Final, NamedTuple

# The share of a step's error that is corrected; the first steps, before which little is known, correct more.
GAIN: Final = 0.3
# A step that takes longer than this multiple of the prediction was delayed by something else, and counts as that.
HELD_UP: Final = 4.0
_NUM_FIRST: Final = 8
# Features are scaled by these (none, rows, prompt tokens), so that none dominates the others.
_UNITS: Final = (1.0, 32.0, 256.0)


class Load(NamedTuple):
    """What a step computes: rows that decode, and tokens of prompts."""

    rows: int
    prompt: int


class StepPace:
    def __init__(self) -> None:
        self._parts = [0.0, 0.0, 0.0]
        self._num_steps = 0

    @property
    def row_s(self) -> float:
        """Seconds that one more decoding row adds to a step."""
        return self._parts[1] / _UNITS[1]

    @property
    def token_s(self) -> float:
        """Seconds that one more prompt token adds to a step."""
        return self._parts[2] / _UNITS[2]

    def seconds_of(self, load: Load) -> float:
        """Returns how many seconds a step is expected to take."""
        return self._parts[0] + self.added_s(load)

    def added_s(self, load: Load) -> float:
        """Returns how many seconds `load` adds to a step that runs anyway."""
        return self.row_s * load.rows + self.token_s * load.prompt

    def note(self, load: Load, seconds: float) -> None:
        """Learns from a step of `load` that took `seconds`."""
        predicted = self.seconds_of(load)
        if self._num_steps >= _NUM_FIRST:
            seconds = min(seconds, HELD_UP * predicted)
        self._num_steps += 1
        sizes = (1.0, load.rows / _UNITS[1], load.prompt / _UNITS[2])
        move = max(GAIN, 1.0 / self._num_steps) * (seconds - predicted) / sum(size * size for size in sizes)
        self._parts = [max(0.0, part + move * size) for part, size in zip(self._parts, sizes, strict=True)]
