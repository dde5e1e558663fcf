"""PrefixIndex: which device page holds the bytes of which name.

One page has at most one name here and one name at most one page. Knows no requests and no reference counts.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import takewhile
from operator import is_not
from typing import cast


class PrefixIndex:
    """Names to pages and back. Mutated by KVManager only."""

    def __init__(self) -> None:
        self._pages: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._pages)

    def page_of(self, name: bytes) -> int | None:
        """Returns the page that holds this name's bytes, or None."""
        return self._pages.get(name)

    def name_of(self, page: int) -> bytes | None:
        """Returns the page's name, or None when it has none here."""
        return self._names.get(page)

    def longest_chain(self, names: Iterable[bytes]) -> list[int]:
        """Returns the pages of the leading names that are known. Draws no name beyond the first unknown one."""
        # Without a line of Python per name: a prompt of 32k tokens has 2048, and is looked up each time it might start.
        found = takewhile(partial(is_not, None), map(self._pages.get, names))
        return list(cast("Iterator[int]", found))

    def hold(self, name: bytes, page: int) -> int:
        """Gives the name to this page unless another has it already; returns the page that has it now."""
        holder = self._pages.setdefault(name, page)
        if holder == page:
            self._names[page] = name
        return holder

    def forget(self, page: int) -> bytes:
        """Takes the page's name away and returns it (a lower tier would store the bytes under it)."""
        name = self._names.pop(page)
        del self._pages[name]
        return name

    def clear(self) -> None:
        self._pages.clear()
        self._names.clear()

    def check_integrity(self) -> None:
        """Asserts that both directions say the same."""
        assert len(self._pages) == len(self._names)
        for name, page in self._pages.items():
            assert self._names.get(page) == name, f"page {page} and its name disagree"
