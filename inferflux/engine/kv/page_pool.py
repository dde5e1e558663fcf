"""PagePool: which device pages are free, in use or merely cached.

A page is in exactly one of three states:
  free    its bytes mean nothing
  in use  one or more requests hold it (its reference count)
  cached  no request holds it, but its bytes are kept because the prefix index names it
Every operation is O(1) per page, however many pages are cached. Knows page numbers only: no names, no tokens.
"""

from collections.abc import Mapping

from inferflux.engine.kv.eviction import EvictionOrder


class PagePool:
    """The states of `num_pages` pages. Mutated by the KV manager and its parts only, from the scheduler's thread.

    order: in which cached pages are evicted; empty at first.
    """

    def __init__(self, num_pages: int, order: EvictionOrder) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._cached = order

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that `take` can give: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    def references(self, page: int) -> int:
        """Returns how many requests hold the page."""
        return self._references[page]

    def is_cached(self, page: int) -> bool:
        return page in self._cached

    def take(self, count: int) -> tuple[list[int], list[int]]:
        """Returns (pages, evicted): `count` pages with one reference each, and those among them that were cached.

        Free pages go first, then cached ones as the order has them. The caller must forget the names of `evicted`.
        At most `num_available` pages can be taken.
        """
        assert count <= self.num_available, "took more pages than there are"
        free, cached = self._free, self._cached
        num_free = min(count, len(free))
        pages = [free.pop() for _ in range(num_free)]
        evicted = [cached.pop() for _ in range(count - num_free)]
        pages += evicted
        for page in pages:
            self._references[page] = 1
        return pages, evicted

    def share(self, page: int) -> None:
        """Adds a reference to a page that is in use or cached."""
        if self._references[page] == 0:
            self._cached.remove(page)
        self._references[page] += 1

    def release(self, page: int, *, keep: bool) -> None:
        """Drops a reference. With the last, the page becomes free, or if `keep` a cached one that was just used."""
        left = self._references[page] - 1
        assert left >= 0, f"page {page} released more often than held"
        self._references[page] = left
        if left == 0:
            if keep:
                self._cached.add(page)
            else:
                self._free.append(page)

    def touch(self, page: int) -> None:
        """Records a use of a cached page; does nothing for a page in use."""
        if page in self._cached:
            self._cached.touch(page)

    def drop_cached(self) -> None:
        """Frees every cached page. The caller must forget their names."""
        self._free += self._cached
        self._cached.clear()

    def cached_pages(self) -> list[int]:
        """Returns the cached pages, next to be evicted first."""
        return list(self._cached)

    def check_integrity(self, owners: Mapping[int, int]) -> None:
        """Asserts that every page is in one state only, and that `owners` (page to number of holders) are in use."""
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & cached, f"both free and cached: {free & cached}"
        for page, references in enumerate(self._references):
            assert references == owners.get(page, 0), (
                f"page {page}: {references} references, {owners.get(page, 0)} owners"
            )
            assert (references > 0) != (page in free or page in cached), f"page {page} is lost or in two states"
        assert self.num_free + self.num_cached + self.num_used == self.num_pages
