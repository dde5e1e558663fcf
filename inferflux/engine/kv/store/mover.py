"""Mover: carries out a plan's page moves, every rank its own shard.

Demotions are done, or ordered before the step's computation, when `start` returns. Everything else runs on worker
threads in parallel with the steps; `poll` returns what has ended. One thread calls it. Knows slots and pages as
numbers; no books and no requests.
"""

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

from inferflux.engine.kv.store.copier import Copier, Fence
from inferflux.engine.kv.store.file_tier import FileTier
from inferflux.engine.step import FileChange, MoveResult, PageMove

logger = logging.getLogger(__name__)

# Promotions copied and reported together: fewer wake-ups, and the first pages do not wait for the last.
PROMOTED_AT_ONCE: Final = 16
# How long a step with nothing to compute waits for a move to end.
WAIT_S: Final = 0.01
# Priorities: loads before stores, the header before both, and the end before all.
_END, _HEADER, _LOAD, _STORE = -1, 0, 1, 2


class Report(NamedTuple):
    """What has ended since the last report. Apply `moves` before `file_changes`."""

    moves: list[MoveResult]
    file_changes: list[FileChange]


class _Ended(NamedTuple):
    results: list[MoveResult]
    num_file_moves: int


class Workers:
    """Daemon threads (a disk that hangs must not block the exit) that run tasks, smallest priority first."""

    def __init__(self, name: str, count: int) -> None:
        self._tasks: queue.PriorityQueue[tuple[int, int, Callable[[], None] | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._count = count
        for index in range(count):
            threading.Thread(target=self._run, name=f"{name}-{index}", daemon=True).start()

    def submit(self, task: Callable[[], None], priority: int = 0) -> None:
        self._tasks.put((priority, next(self._numbers), task))

    def close(self) -> None:
        """Ends the threads after their current tasks; waiting tasks are dropped."""
        for _ in range(self._count):
            self._tasks.put((_END, next(self._numbers), None))

    def _run(self) -> None:
        while (task := self._tasks.get()[2]) is not None:
            try:
                task()
            except Exception:
                # Its move gets no result, so its pages stay pinned; the requests that wait for it give up after a
                # while.
                logger.exception("a page move failed")


class Mover:
    """copier: of this rank's pools. file: its file, or None. num_workers: threads for the file."""

    def __init__(self, copier: Copier, file: FileTier | None, num_workers: int) -> None:
        self._copier = copier
        self._file = file
        self._ended: queue.SimpleQueue[_Ended] = queue.SimpleQueue()
        self._demoted: list[tuple[list[PageMove], Callable[[], float | None]]] = []
        self._promoter = Workers("kv-promote", 1)
        self._file_workers = Workers("kv-file", num_workers if file is not None else 0)
        self._num_file_moves = 0
        self._num_under_way = 0
        self._may_open = threading.Event()
        self._may_open.set()

    def wipe(self) -> None:
        """Forgets what is in the file, stores in progress included."""
        if self._file is not None:
            self._file_workers.submit(self._file.forget(), _HEADER)

    def start(self, moves: Sequence[PageMove]) -> None:
        """Starts the moves in their order. Call before the step computes."""
        self._num_under_way += len(moves)
        for kind, group in _runs(moves):
            if kind == "demote":
                self._demoted.append((group, self._copier.demote([_device_first(move) for move in group])))
            elif kind == "promote":
                fence = self._copier.fence()
                for first in range(0, len(group), PROMOTED_AT_ONCE):
                    part = group[first : first + PROMOTED_AT_ONCE]
                    self._promoter.submit(partial(self._promote, part, fence))
            elif kind == "load":
                self._num_file_moves += len(group)
                fence = self._copier.fence()
                for move in group:
                    self._file_workers.submit(partial(self._load, move, fence), _LOAD)
            else:
                self._num_file_moves += len(group)
                for move in group:
                    self._file_workers.submit(partial(self._store, move), _STORE)

    def poll(self, *, wait: bool) -> Report:
        """Returns what has ended. wait: if nothing has, and moves are in progress, wait a moment."""
        moves = self._ended_demotions()
        timeout = WAIT_S if wait and not moves and self._num_under_way else None
        while True:
            try:
                ended = self._ended.get(block=timeout is not None, timeout=timeout)
            except queue.Empty:
                break
            moves += ended.results
            self._num_file_moves -= ended.num_file_moves
            timeout = None
        self._num_under_way -= len(moves)
        return Report(moves, self._file_changes() if self._file is not None else [])

    def close(self) -> None:
        """Closes the file and ends the threads. Moves that still hang are left to themselves."""
        self._promoter.close()
        self._file_workers.close()
        if self._file is not None:
            self._file.close()

    def _file_changes(self) -> list[FileChange]:
        file = self._file
        assert file is not None
        changes: list[FileChange] = []
        with contextlib.suppress(queue.Empty):
            while True:
                changes.append(file.changes.get_nowait())
        file.offer_again()
        # Not while a move is in progress: its slot number belongs to the state before the file failed.
        if file.may_open and not self._num_file_moves and self._may_open.is_set():
            self._may_open.clear()
            self._file_workers.submit(self._open, _HEADER)
        return changes

    def _ended_demotions(self) -> list[MoveResult]:
        results: list[MoveResult] = []
        while self._demoted:
            group, ended = self._demoted[0]
            seconds = ended()
            if seconds is None:
                break
            del self._demoted[0]
            results += [MoveResult(move.id, seconds / len(group)) for move in group]
        return results

    def _open(self) -> None:
        assert self._file is not None
        self._file.open()
        self._may_open.set()

    def _promote(self, moves: list[PageMove], fence: Fence) -> None:
        start = time.perf_counter()
        self._copier.promote([_device_first(move) for move in moves], fence)
        seconds = (time.perf_counter() - start) / len(moves)
        self._ended.put(_Ended([MoveResult(move.id, seconds) for move in moves], 0))

    def _load(self, move: PageMove, fence: Fence) -> None:
        assert self._file is not None
        assert move.file is not None
        start = time.perf_counter()
        error = self._file.load(move.file, move.name, self._copier.host_row(move.host))
        if error is None:
            self._copier.promote([_device_first(move)], fence)
        self._ended.put(_Ended([MoveResult(move.id, time.perf_counter() - start, error)], 1))

    def _store(self, move: PageMove) -> None:
        assert self._file is not None
        assert move.file is not None
        start = time.perf_counter()
        error = self._file.store(move.file, move.name, self._copier.host_row(move.host))
        self._ended.put(_Ended([MoveResult(move.id, time.perf_counter() - start, error)], 1))


def _device_first(move: PageMove) -> tuple[int, int]:
    assert move.device is not None
    return move.device, move.host


def _runs(moves: Sequence[PageMove]) -> Iterator[tuple[str, list[PageMove]]]:
    """Groups consecutive moves of one kind."""
    return ((kind, list(group)) for kind, group in itertools.groupby(moves, key=lambda move: move.kind))
