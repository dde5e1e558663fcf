"""SharedMoves: the page moves of all ranks as one. A move has ended when every rank's share of it has.

Every rank starts the same moves in the same order and polls after the same plans, so that one small all-reduce per
plan, and none while nothing is under way, tells all of them the same. The file's news are rank 0's: where another
rank's file differs, its moves fail and the page is a miss.
"""

from collections.abc import Callable
from functools import partial
from typing import Final, Literal

from inferflux.dist.context import ParallelContext
from inferflux.engine.kv.store.mover import Mover, Report
from inferflux.engine.step import MoveResult, StepPlan

# What a rank says of a move: 0, or one more than its error's place. The least of all ranks' words holds.
_UNDER_WAY: Final = 0
_ERRORS: Final[tuple[Literal["io", "damaged"] | None, ...]] = ("io", "damaged", None)


class SharedMoves:
    """One per rank, around the rank's own mover."""

    def __init__(self, mover: Mover, context: ParallelContext) -> None:
        self._mover = mover
        self._context = context
        self._under_way: list[int] = []
        self._ended: dict[int, MoveResult] = {}

    def start(self, plan: StepPlan) -> None:
        """Starts what the plan moves; before its rows are computed."""
        if plan.wipe:
            self._mover.wipe()
        self._mover.start(plan.moves)
        if self._context.size > 1:
            self._under_way += [move.id for move in plan.moves]

    def report_after(self, plan: StepPlan) -> Callable[[], Report]:
        """Called on every rank once the plan's rows are on their way. The function returned says which moves have ended
        on every rank: alone by the time it is called, with others by now, for all must ask each other between the same
        two plans, and the next plan may be out before this one's results are in.
        """
        if self._context.size == 1:
            return partial(self._mover.poll, wait=plan.wait)
        report = self._shared_report(self._mover.poll(wait=plan.wait))
        return lambda: report

    def close(self) -> None:
        self._mover.close()

    def _shared_report(self, own: Report) -> Report:
        self._ended |= {result.id: result for result in own.moves}
        return Report(self._shared_results() if self._under_way else [], own.file_news)

    def _shared_results(self) -> list[MoveResult]:
        words = self._context.smallest([self._word(move_id) for move_id in self._under_way])
        results, left = [], []
        for move_id, word in zip(self._under_way, words, strict=True):
            if word == _UNDER_WAY:
                left.append(move_id)
            else:
                own = self._ended.pop(move_id)
                results.append(MoveResult(move_id, own.seconds, _ERRORS[word - 1]))
        self._under_way = left
        return results

    def _word(self, move_id: int) -> int:
        result = self._ended.get(move_id)
        return _UNDER_WAY if result is None else 1 + _ERRORS.index(result.error)
