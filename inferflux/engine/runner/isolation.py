"""Isolation: a forward that raises is tried again without the rows that are to blame, and only these fail.

Knows rows and the errors that no row is to blame for; how rows are computed is the runner's.
"""

import logging
from collections.abc import Callable
from typing import Final

import torch

from inferflux.engine.step import Row, RowOutput
from inferflux.errors import EngineDeadError

logger = logging.getLogger(__name__)

FAILED: Final = "the model failed to compute this request"
# After so many failures with nothing computed in between it is the engine that is broken.
MOST_FAILURES: Final = 4
# The device, or another rank, is lost.
_FATAL: Final = (torch.AcceleratorError, EngineDeadError)


class Isolation:
    """One runner's. A step with one bad row costs about two more; one in which all are bad, MOST_FAILURES halvings.
    Drafts fail with the request that they are made for, and count for nothing of their own."""

    def __init__(self) -> None:
        self._num_failures = 0

    def note_success(self) -> None:
        self._num_failures = 0

    def apart(
        self, rows: list[Row], compute: Callable[[list[Row]], list[RowOutput]], error: Exception
    ) -> list[RowOutput]:
        """Returns the results of rows whose forward raised an error, by computing each half of them; a row alone fails.

        Raises the error where that is no help.
        """
        if isinstance(error, _FATAL):
            raise error
        if len(rows) > 1 and rows[0].slot == rows[-1].slot:
            # One request's, with drafts: behind a row that fails nothing is left to say.
            first = compute(rows[:1])
            return first * len(rows) if first[0].error is not None else first + compute(rows[1:])
        if len(rows) > 1:
            middle = len(rows) // 2
            return compute(rows[:middle]) + compute(rows[middle:])
        self._num_failures += not rows[0].is_draft
        if self._num_failures > MOST_FAILURES:
            raise error
        logger.error("computing the row of slot %d failed", rows[0].slot, exc_info=error)
        return [RowOutput(error=FAILED)]
