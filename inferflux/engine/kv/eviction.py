"""In which order cached pages are given up: `lru` or `clock`, the same for every tier.

An order holds slots (or device pages) that may be given up now, as numbers; it knows no names and no bytes. Every
operation takes the same time however many there are.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Final, Protocol

# How many entries with a second chance the hand passes over before it takes one nevertheless.
MAX_SWEEP = 64


class EvictionOrder(Protocol):
    """Mutated by the books that own it, from the scheduler's thread."""

    def __len__(self) -> int: ...

    def __contains__(self, slot: object) -> bool: ...

    def __iter__(self) -> Iterator[int]:
        """Yields the entries, those at the front first."""
        ...

    def add(self, slot: int) -> None:
        """Enters a slot that is not there, as just used."""
        ...

    def remove(self, slot: int) -> None: ...

    def touch(self, slot: int) -> None:
        """Notes a use of a slot that is there."""
        ...

    def pop(self) -> int:
        """Removes and returns the slot to give up; there must be one."""
        ...

    def clear(self) -> None: ...


class Lru:
    """Least recently used first."""

    def __init__(self) -> None:
        # Not a plain dict: that one finds its first key ever slower as others leave.
        self._slots: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, slot: object) -> bool:
        return slot in self._slots

    def __iter__(self) -> Iterator[int]:
        return iter(self._slots)

    def add(self, slot: int) -> None:
        self._slots[slot] = None

    def remove(self, slot: int) -> None:
        del self._slots[slot]

    def touch(self, slot: int) -> None:
        self._slots.move_to_end(slot)

    def pop(self) -> int:
        return self._slots.popitem(last=False)[0]

    def clear(self) -> None:
        self._slots.clear()


class Clock:
    """First in, first out, but what was used since the hand last passed gets a second chance (Corbato 1968).

    A use costs no reordering. The hand's sweep is bounded, so that a pool in which everything was used is no pause.
    """

    def __init__(self) -> None:
        self._used: OrderedDict[int, bool] = OrderedDict()

    def __len__(self) -> int:
        return len(self._used)

    def __contains__(self, slot: object) -> bool:
        return slot in self._used

    def __iter__(self) -> Iterator[int]:
        return iter(self._used)

    def add(self, slot: int) -> None:
        self._used[slot] = True

    def remove(self, slot: int) -> None:
        del self._used[slot]

    def touch(self, slot: int) -> None:
        assert slot in self._used
        self._used[slot] = True

    def pop(self) -> int:
        for _ in range(MAX_SWEEP):
            slot, used = self._used.popitem(last=False)
            if not used:
                return slot
            self._used[slot] = False
        return self._used.popitem(last=False)[0]

    def clear(self) -> None:
        self._used.clear()


EVICTION: Final[Mapping[str, Callable[[], EvictionOrder]]] = MappingProxyType({"lru": Lru, "clock": Clock})
