"""PrefixLoader: loads the cached prefixes of waiting requests from the lower tiers to the device.

A loading request holds the device pages of its prefix: those that are cached, and those being filled. A page being
filled is held by its move, too, so that a request may be aborted at any time and the bytes still land in a page that
no one else uses. Knows the page pool, the prefix index and the lower tiers; no tokens, no queue, no bytes.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from inferflux.engine.kv.lower_tiers import LowerTiers, PageLoad
from inferflux.engine.kv.page_pool import PagePool
from inferflux.engine.kv.prefix_index import PrefixIndex
from inferflux.engine.kv.rates import Rates
from inferflux.engine.request import Request
from inferflux.engine.step import MoveResult, Tier

# How often a request's prefix is loaded again because the pages were evicted before it could start.
MAX_LOADS = 2


class Source(NamedTuple):
    """Where one page of a prefix is: in slot `slot` of a lower tier, or (None) in device page `slot`."""

    name: bytes
    tier: Tier | None
    slot: int


class TierMatch(NamedTuple):
    """What the lower tiers have beyond a request's prefix on the device. sources: pages to use, in order; the first is
    in a lower tier. declined: the tier whose next page is faster to compute than to load, if any."""

    sources: list[Source]
    declined: Tier | None


@dataclass(slots=True, eq=False)
class _PrefixLoad:
    """One request's load. pending: not started yet. num_due: pages to come. last: time of the last arrival, by tier."""

    started: float
    deadline: float
    num_due: int
    pending: deque[PageLoad] = field(default_factory=deque)
    arrived: Counter[Tier] = field(default_factory=Counter)
    last: dict[Tier, float] = field(default_factory=dict)
    failed: bool = False


class PrefixLoader:
    """One per engine; part of the KV manager, which alone calls it. `clock`: monotonic seconds."""

    def __init__(
        self, pool: PagePool, index: PrefixIndex, tiers: LowerTiers, rates: Rates, clock: Callable[[], float]
    ) -> None:
        self._pool = pool
        self._index = index
        self._tiers = tiers
        self._rates = rates
        self._clock = clock
        self._loads: dict[int, _PrefixLoad] = {}
        self._owners: dict[PageLoad, _PrefixLoad] = {}
        # Loads by the names of the pages that they fill: no other request need load these, or compute them in time.
        self._loading: dict[bytes, _PrefixLoad] = {}

    def is_being_loaded(self, name: bytes) -> bool:
        """True while a page of this name is on its way to the device, and not overdue: the file may hang."""
        load = self._loading.get(name)
        return load is not None and self._clock() <= load.deadline

    def match(self, names: Iterable[bytes], page_tokens: int) -> TierMatch:
        """Follows the names, which begin where the device's prefix ends, as far as their pages are worth loading."""
        sources: list[Source] = []
        worth: dict[Tier, bool] = {}
        now = self._clock()
        for name in names:
            page = self._index.page_of(name)
            if page is not None:
                sources.append(Source(name, None, page))
                continue
            found = None if name in self._loading else self._tiers.locate(name)
            if found is None:
                break
            tier, slot = found
            if tier not in worth:
                worth[tier] = self._rates.prefers_load(tier, page_tokens, now)
            if not worth[tier]:
                return TierMatch(_trimmed(sources), tier)
            sources.append(Source(name, tier, slot))
        return TierMatch(_trimmed(sources), None)

    def start(self, request: Request, matched: list[int], sources: list[Source], patience_s: float) -> list[int]:
        """Gives the request the pages of its prefix and plans to load the missing ones; returns the evicted device
        pages.

        There must be room. Pages to be used are held before room is made, which could evict them.
        """
        pool = self._pool
        below = [source for source in sources if source.tier is not None]
        for page in [*matched, *(source.slot for source in sources if source.tier is None)]:
            pool.share(page)
        for source in below:
            assert source.tier is not None
            self._tiers.pin(source.tier, source.slot)
        fresh, evicted = pool.take(len(below))
        now = self._clock()
        load = _PrefixLoad(now, now + patience_s, len(below))
        pages = iter(fresh)
        for source in sources:
            if source.tier is not None:
                page_load = PageLoad(source.name, next(pages), source.tier, source.slot)
                load.pending.append(page_load)
                self._loading[page_load.name] = load
        filled = iter(fresh)
        request.pages = matched + [source.slot if source.tier is None else next(filled) for source in sources]
        request.num_loads += 1
        self._tiers.note_load(below[0].tier or "cpu")
        self._loads[request.id] = load
        return evicted

    def start_pending(self) -> None:
        """Starts pending page loads, in the order of their requests, as far as the tiers have room."""
        for load in self._loads.values():
            while load.pending and self._tiers.start(load.pending[0]):
                page_load = load.pending.popleft()
                self._pool.share(page_load.page)
                self._owners[page_load] = load

    def end(self, results: Iterable[MoveResult]) -> None:
        """Applies the results of moves. A page that arrived can be found from now on."""
        for result in results:
            page_load = self._tiers.end(result)
            if page_load is not None:
                self._finish_page(page_load, result.error is None)

    def is_over(self, request: Request) -> bool:
        """True when there is nothing to wait for: all pages have arrived, one failed, or it takes too long."""
        load = self._loads[request.id]
        return load.num_due == 0 or load.failed or self._clock() > load.deadline

    def finish(self, request: Request) -> None:
        """Ends a request's load, complete or not, and takes its pages back; pages that arrived stay cached."""
        load = self._loads.pop(request.id)
        self._drop_pending(load)
        now = self._clock()
        for tier, count in load.arrived.items():
            request.num_loaded[tier] = request.num_loaded.get(tier, 0) + count
            if not load.num_due:
                self._rates.note_load(tier, count, load.last[tier] - load.started, now)
        if now > load.deadline and load.num_due:
            self._rates.note_load("nvme", load.num_due, now - load.started, now)
        for page in reversed(request.pages):
            self._pool.release(page, keep=self._index.name_of(page) is not None)
        request.pages = []

    def lose_file(self) -> None:
        """Fails the loads that wait for pages of the file, which has failed."""
        for load in self._loads.values():
            if any(page_load.tier == "nvme" for page_load in load.pending):
                self._drop_pending(load)
                load.failed = True

    def held_pages(self) -> Iterator[int]:
        """Yields the device pages that moves hold."""
        return (page_load.page for page_load in self._owners)

    def check_integrity(self) -> None:
        pending = [page_load for load in self._loads.values() for page_load in load.pending]
        self._tiers.check_integrity(pending)
        names = {page_load.name for page_load in [*pending, *self._owners]}
        assert names == self._loading.keys(), "pages on their way and their names disagree"
        for load in self._loads.values():
            started = sum(owner is load for owner in self._owners.values())
            assert load.failed or load.num_due == len(load.pending) + started, "a load waits for nothing"

    def _finish_page(self, page_load: PageLoad, ok: bool) -> None:
        load = self._owners.pop(page_load)
        self._loading.pop(page_load.name, None)
        keep = ok and self._index.hold(page_load.name, page_load.page) == page_load.page
        self._pool.release(page_load.page, keep=keep)
        load.num_due -= 1
        if ok:
            load.arrived[page_load.tier] += 1
            load.last[page_load.tier] = self._clock()
        else:
            load.failed = True

    def _drop_pending(self, load: _PrefixLoad) -> None:
        for page_load in load.pending:
            self._tiers.cancel(page_load)
            del self._loading[page_load.name]
        load.pending.clear()


def _trimmed(sources: list[Source]) -> list[Source]:
    """Removes device pages from the end: they need no loading, and may be evicted before the rest has arrived."""
    while sources and sources[-1].tier is None:
        sources.pop()
    return sources
