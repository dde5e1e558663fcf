"""FakeTiers: the lower tiers' bytes for a FakeRunner, as slow, unordered and unreliable as one likes.

A move's effect comes with its result, as late as the books allow; what it will write is garbage meanwhile. So a page
given away, read or named too early garbles the output.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from inferflux.engine.step import FileChange, MoveResult, PageMove

Cells = list[tuple[bytes, int] | None]


@dataclass
class FakeTiers:
    """pace: chance of a move to end in a step. damage: chance of a load to find a damaged page.

    file_slots: of the file once `turn_on` was called. num_ended: moves so far, by kind.
    """

    rng: random.Random
    pace: float = 0.5
    damage: float = 0.0
    file_slots: int = 0
    num_ended: dict[str, int] = field(default_factory=dict)
    _is_on: bool = False
    _is_opening: bool = False
    _host: dict[int, Cells] = field(default_factory=dict)
    _file: dict[int, tuple[bytes, Cells]] = field(default_factory=dict)
    _under_way: list[PageMove] = field(default_factory=list)
    _changes: list[FileChange] = field(default_factory=list)
    _results: list[MoveResult] = field(default_factory=list)

    def turn_on(self) -> None:
        """Opens the file as soon as none of its moves is under way, and reports what is in it."""
        self._is_opening = not self._is_on

    def turn_off(self) -> None:
        """Everything the file has to do fails from now on."""
        self._is_opening = False
        if self._is_on:
            self._is_on = False
            self._changes.append(FileChange("off", 0))

    def fill_up(self, num_slots: int) -> None:
        if self._is_on:
            self._changes.append(FileChange("full", num_slots))

    def start(self, moves: Sequence[PageMove], wipe: bool, device: list[Cells]) -> None:
        if wipe:
            self._file.clear()
        for move in moves:
            if move.kind == "demote":
                assert move.device is not None
                self._host[move.host] = list(device[move.device])
                self._results.append(self._end(move))
                continue
            if move.device is not None:
                device[move.device] = [None] * len(device[move.device])
            if move.kind == "load":
                self._host[move.host] = []
            self._under_way.append(move)

    def poll(self, device: list[Cells]) -> tuple[list[MoveResult], list[FileChange]]:
        results, self._results = self._results, []
        self.rng.shuffle(self._under_way)
        waiting = []
        for move in self._under_way:
            if self.rng.random() < self.pace:
                results.append(self._end(move, self._carry_out(move, device)))
            else:
                waiting.append(move)
        self._under_way = waiting
        if self._is_opening and not any(move.file is not None for move in waiting):
            self._is_on, self._is_opening = True, False
            pages = [(slot, name) for slot, (name, _) in self._file.items()]
            self._changes.append(FileChange("on", self.file_slots, pages))
        changes, self._changes = self._changes, []
        return results, changes

    def _carry_out(self, move: PageMove, device: list[Cells]) -> str | None:
        if move.file is not None and not self._is_on:
            return "io"
        if move.kind == "store":
            assert move.file is not None
            self._file[move.file] = (move.name, list(self._host[move.host]))
            return None
        if move.kind == "load":
            assert move.file is not None
            name, cells = self._file.get(move.file, (b"", []))
            if name != move.name or self.rng.random() < self.damage:
                return "damaged"
            self._host[move.host] = list(cells)
        assert move.device is not None
        device[move.device] = list(self._host[move.host])
        return None

    def _end(self, move: PageMove, error: str | None = None) -> MoveResult:
        self.num_ended[move.kind] = self.num_ended.get(move.kind, 0) + 1
        return MoveResult(move.id, 0.001, error)  # type: ignore[arg-type]
