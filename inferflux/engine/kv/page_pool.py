"""PagePool: which device pages are free, in use or merely cached.

A page is in exactly one of three states:
  free    its bytes mean nothing: it was in use, or never has been and takes no memory on a CPU yet
  in use  one or more requests hold it (its reference count)
  cached  no request holds it, but its bytes are kept because the prefix index names it
Every operation is O(1) per page, however many pages are cached. Knows page numbers only: no names, no tokens.
"""

from collections.abc import Mapping

from inferflux.engine.kv.eviction import EvictionOrder


class PagePool:
    """The states of `num_pages` pages. Mutated by the KV manager and its parts only, from the scheduler's thread.

    order: in which cached pages are evicted; empty at first. cache_pages: once so many pages have ever been in use,
    cached ones are evicted before another is; None: before that all are used.
    """

    def __init__(self, num_pages: int, order: EvictionOrder, cache_pages: int | None = None) -> None:
        self.num_pages = num_pages
        # A small model's cache may be allowed more pages than the pool has.
        self._cache_pages = num_pages if cache_pages is None else min(cache_pages, num_pages)
        # Pages from this one on have never been in use; those that are free again are given out first.
        self._first_unused = 0
        self._free: list[int] = []
        self._references = [0] * num_pages
        self._cached = order

    @property
    def num_free(self) -> int:
        return len(self._free) + self.num_pages - self._first_unused

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_available

    @property
    def num_available(self) -> int:
        """Pages that `take` can give: free ones and cached ones."""
        return self.num_free + len(self._cached)

    def references(self, page: int) -> int:
        """Returns how many requests hold the page."""
        return self._references[page]

    def is_cached(self, page: int) -> bool:
        return page in self._cached

    def take(self, count: int) -> tuple[list[int], list[int]]:
        """Returns (pages, evicted): `count` pages with one reference each, and those among them that were cached.

        Free pages go first, but those that were never in use only up to `cache_pages`; then cached ones as the order
        has them, then the others. The caller must forget the names of `evicted`. At most `num_available` pages can be
        taken.
        """
        assert count <= self.num_available, "took more pages than there are"
        free, cached, first = self._free, self._cached, self._first_unused
        pages = [free.pop() for _ in range(min(count, len(free)))]
        num_missing = count - len(pages)
        num_evicted = min(max(0, num_missing - max(0, self._cache_pages - first)), len(cached))
        self._first_unused += num_missing - num_evicted
        pages += range(first, self._first_unused)
        evicted = [cached.pop() for _ in range(num_evicted)]
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
        free, cached = {*self._free, *range(self._first_unused, self.num_pages)}, set(self._cached)
        assert len(free) == self.num_free, "a page is free twice"
        assert not free & cached, f"both free and cached: {free & cached}"
        for page, references in enumerate(self._references):
            assert references == owners.get(page, 0), (
                f"page {page}: {references} references, {owners.get(page, 0)} owners"
            )
            assert (references > 0) != (page in free or page in cached), f"page {page} is lost or in two states"
        assert self.num_free + self.num_cached + self.num_used == self.num_pages
