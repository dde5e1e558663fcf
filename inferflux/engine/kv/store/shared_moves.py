"""SharedMoves: the page moves of all ranks together. A move has ended when every rank's share of it has.

Every rank starts the same moves in the same order and polls after the same plans, so one small all-reduce per plan
gives all of them the same results; there is none while no move is in progress and every file is on.
"""

from collections.abc import Callable
from functools import partial
from typing import Final, Literal

from inferflux.dist.context import ParallelContext
from inferflux.engine.kv.store.mover import Mover, Report
from inferflux.engine.kv.store.shared_file import NUM_WORDS, SharedFile
from inferflux.engine.step import FileChange, MoveKind, MoveResult, StepPlan

# A rank's word for a move: 0 while in progress, else 1 + its error's index. The smallest of all ranks' words counts.
_UNDER_WAY: Final = 0
_TO_AND_FROM_FILE: Final = frozenset({"store", "load"})
_ERRORS: Final[tuple[Literal["io", "damaged"] | None, ...]] = ("io", "damaged", None)


class SharedMoves:
    """One per rank, around the rank's own mover. has_file: it moves pages to and from a file."""

    def __init__(self, mover: Mover, context: ParallelContext, *, has_file: bool) -> None:
        self._mover = mover
        self._context = context
        self._file = SharedFile() if has_file else None
        self._under_way: dict[int, MoveKind] = {}
        self._ended: dict[int, MoveResult] = {}

    def start(self, plan: StepPlan) -> None:
        """Starts the plan's moves, before its rows are computed."""
        if plan.wipe:
            self._mover.wipe()
            if self._file is not None:
                self._file.forget()
        self._mover.start(plan.moves)
        if self._context.size > 1:
            self._under_way |= {move.id: move.kind for move in plan.moves}

    def report_after(self, plan: StepPlan) -> Callable[[], Report]:
        """Called on every rank once the plan's rows are launched. Returns a function that returns the moves that have
        ended on every rank. With one rank these are the moves ended by the time it is called; with several, those ended
        by now: all ranks must ask each other between the same two plans, and the next plan may be sent before this
        one's results are in.
        """
        if self._context.size == 1:
            return partial(self._mover.poll, wait=plan.wait)
        report = self._shared_report(self._mover.poll(wait=plan.wait))
        return lambda: report

    def close(self) -> None:
        self._mover.close()

    def _shared_report(self, own: Report) -> Report:
        self._ended |= {result.id: result for result in own.moves}
        file = self._file
        if file is not None:
            file.note(own.file_changes)
        if not self._under_way and (file is None or file.is_settled):
            return Report([], [])
        file_words = [] if file is None else file.words()
        words = self._context.all_reduce_min([*file_words, *map(self._word, self._under_way)])
        moves = self._results(words[len(file_words) :])
        return Report(moves, [] if file is None else self._file_changes(file, words[:NUM_WORDS]))

    def _results(self, words: list[int]) -> list[MoveResult]:
        results = []
        for move_id, word in zip(list(self._under_way), words, strict=True):
            if word != _UNDER_WAY:
                del self._under_way[move_id]
                results.append(MoveResult(move_id, self._ended.pop(move_id).seconds, _ERRORS[word - 1]))
        return results

    def _file_changes(self, file: SharedFile, words: list[int]) -> list[FileChange]:
        return file.settle(words, may_turn_on=_TO_AND_FROM_FILE.isdisjoint(self._under_way.values()))

    def _word(self, move_id: int) -> int:
        result = self._ended.get(move_id)
        return _UNDER_WAY if result is None else 1 + _ERRORS.index(result.error)
