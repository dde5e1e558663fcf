"""Isolation: finds the rows that make a forward raise by computing the step again in halves, so that only these fail.

Knows rows, and the errors that no row causes; computing is the runner's work.
"""

import logging
from collections.abc import Callable
from typing import Final

import torch

from inferflux.engine.step import Row, RowOutput
from inferflux.errors import EngineDeadError

logger = logging.getLogger(__name__)

FAILED: Final = "the model failed to compute this request"
# After this many failures without a success in between the engine itself is broken.
MAX_FAILURES: Final = 4
# The device, or another rank, is lost.
_FATAL: Final = (torch.AcceleratorError, EngineDeadError)


class Isolation:
    """One per runner. A step with one bad row costs about two more; one with only bad rows, MAX_FAILURES halvings.
    Draft rows fail with their request and are not counted."""

    def __init__(self) -> None:
        self._num_failures = 0

    def note_success(self) -> None:
        self._num_failures = 0

    def retry_in_halves(
        self, rows: list[Row], compute: Callable[[list[Row]], list[RowOutput]], error: Exception
    ) -> list[RowOutput]:
        """Returns the outputs of rows whose forward raised an error, by computing each half of them; a single row
        fails.

        Raises the error where that cannot help.
        """
        if isinstance(error, _FATAL):
            raise error
        if len(rows) > 1 and rows[0].slot == rows[-1].slot:
            # One request with its drafts: after a row that fails, the later ones mean nothing.
            first = compute(rows[:1])
            return first * len(rows) if first[0].error is not None else first + compute(rows[1:])
        if len(rows) > 1:
            middle = len(rows) // 2
            return compute(rows[:middle]) + compute(rows[middle:])
        self._num_failures += not rows[0].is_draft
        if self._num_failures > MAX_FAILURES:
            raise error
        logger.error("computing the row of slot %d failed", rows[0].slot, exc_info=error)
        return [RowOutput(error=FAILED)]
