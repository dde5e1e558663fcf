"""LazyHeap: names ordered by a key each, smallest first, where keys may grow without telling the heap.

A name's key is looked up again when the name comes to the top of the heap; if it has grown, the name moves down. So
only a key that has become smaller must be reported (`put`), and a lookup costs O(log n) per name returned or moved.
"""

from collections.abc import Callable
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from typing import Any, Final, Generic, TypeVar

Key = TypeVar("Key", bound=Any)

# Stale entries are removed when they outnumber the valid ones by more than this.
_NUM_STALE: Final = 64


class LazyHeap(Generic[Key]):
    """key: returns the current key of a name that is in the heap."""

    def __init__(self, key: Callable[[str], Key]) -> None:
        self._key = key
        # Each name's one valid entry: its key when last looked up, and the entry's serial number. All others of that
        # name in `_heap` are stale.
        self._entries: dict[str, tuple[Key, int]] = {}
        self._heap: list[tuple[Key, int, str]] = []
        self._serial = count()

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, name: str) -> None:
        """Adds a name, or reports that its key may have become smaller."""
        key = self._key(name)
        if name not in self._entries or key < self._entries[name][0]:
            heappush(self._heap, self._enter(name, key))
            if len(self._heap) > 2 * len(self._entries) + _NUM_STALE:
                self._heap = [(key, serial, name) for name, (key, serial) in self._entries.items()]
                heapify(self._heap)

    def remove(self, name: str) -> None:
        """Removes a name, which must be there."""
        del self._entries[name]

    def clear(self) -> None:
        self._entries.clear()
        self._heap.clear()

    def first(self) -> str | None:
        """Returns the name with the smallest key; None when the heap is empty."""
        while self._heap:
            known, serial, name = self._heap[0]
            if self._entries.get(name) != (known, serial):
                heappop(self._heap)
                continue
            key = self._key(name)
            if key == known:
                return name
            heapreplace(self._heap, self._enter(name, key))
        return None

    def up_to(self, limit: Key, most: int) -> list[str]:
        """Returns up to `most` names whose keys are at most `limit`, smallest key first."""
        found: list[tuple[Key, int, str]] = []
        while len(found) < most and (name := self.first()) is not None and self._entries[name][0] <= limit:
            found.append(heappop(self._heap))
        for entry in found:
            heappush(self._heap, entry)
        return [name for _, _, name in found]

    def _enter(self, name: str, key: Key) -> tuple[Key, int, str]:
        serial = next(self._serial)
        self._entries[name] = key, serial
        return key, serial, name
