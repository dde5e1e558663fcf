"""Ladder: names in the order of numbers that grow while nobody looks, the least first.

A number is looked up when it matters. One that has grown since is found out when its name comes first, so only what
makes a number smaller has to be told; what is asked for costs by what is returned, not by how many names there are.
"""

from collections.abc import Callable
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from typing import Any, Final, Generic, TypeVar

Number = TypeVar("Number", bound=Any)

# Entries that no longer count are cleared away when they are more than those that do, and so many.
_NUM_STALE: Final = 64


class Ladder(Generic[Number]):
    """number: returns that of a name which stands here."""

    def __init__(self, number: Callable[[str], Number]) -> None:
        self._number = number
        # Each name's one entry that counts: what its number was, at least, and the entry's own number.
        self._entries: dict[str, tuple[Number, int]] = {}
        self._heap: list[tuple[Number, int, str]] = []
        self._serial = count()

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, name: str) -> None:
        """Takes a name on, or notes that its number may be smaller than it was."""
        number = self._number(name)
        if name not in self._entries or number < self._entries[name][0]:
            heappush(self._heap, self._enter(name, number))
            if len(self._heap) > 2 * len(self._entries) + _NUM_STALE:
                self._heap = [(number, serial, name) for name, (number, serial) in self._entries.items()]
                heapify(self._heap)

    def remove(self, name: str) -> None:
        del self._entries[name]

    def clear(self) -> None:
        self._entries.clear()
        self._heap.clear()

    def first(self) -> str | None:
        """Returns the name with the least number; None when there is none."""
        while self._heap:
            known, serial, name = self._heap[0]
            if self._entries.get(name) != (known, serial):
                heappop(self._heap)
                continue
            number = self._number(name)
            if number == known:
                return name
            heapreplace(self._heap, self._enter(name, number))
        return None

    def up_to(self, limit: Number, most: int) -> list[str]:
        """Returns the names with numbers up to `limit`, at most so many, the least first."""
        found: list[tuple[Number, int, str]] = []
        while len(found) < most and (name := self.first()) is not None and self._entries[name][0] <= limit:
            found.append(heappop(self._heap))
        for entry in found:
            heappush(self._heap, entry)
        return [name for _, _, name in found]

    def _enter(self, name: str, number: Number) -> tuple[Number, int, str]:
        serial = next(self._serial)
        self._entries[name] = number, serial
        return number, serial, name
