"""StepPace: what a step takes by what it computes, learnt from the steps that were computed.

    seconds = fixed + per row that decodes + per token of a prompt

Where rows cost nearly nothing (a GPU that waits for its memory) their part is small; on a CPU it is large. Each step
moves the three numbers towards what would have foretold it (normalised least mean squares): what the latest steps say
nothing of, such as rows while only prompts are computed, stays as it was learnt. Knows numbers only.
"""

from typing import Final, NamedTuple

# How far one step moves the numbers; the first ones, of which little is known, move them further.
GAIN: Final = 0.3
# A step that seems to take more than so many times what was foretold was held up by something else.
HELD_UP: Final = 4.0
_NUM_FIRST: Final = 8
# What is thought of as one unit of rows and of prompt tokens, so that no part drowns the others.
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
        """What one row more adds to a step."""
        return self._parts[1] / _UNITS[1]

    @property
    def token_s(self) -> float:
        """What one token more of a prompt adds to a step."""
        return self._parts[2] / _UNITS[2]

    def seconds_of(self, load: Load) -> float:
        """Returns what a step takes."""
        return self._parts[0] + self.beside(load)

    def beside(self, load: Load) -> float:
        """Returns what it adds to a step that takes place anyhow."""
        return self.row_s * load.rows + self.token_s * load.prompt

    def note(self, load: Load, seconds: float) -> None:
        """Takes in what a step took."""
        foretold = self.seconds_of(load)
        if self._num_steps >= _NUM_FIRST:
            seconds = min(seconds, HELD_UP * foretold)
        self._num_steps += 1
        sizes = (1.0, load.rows / _UNITS[1], load.prompt / _UNITS[2])
        move = max(GAIN, 1.0 / self._num_steps) * (seconds - foretold) / sum(size * size for size in sizes)
        self._parts = [max(0.0, part + move * size) for part, size in zip(self._parts, sizes, strict=True)]
