"""KVManager: the scheduler's only interface to the pages.

Combines the pool (who holds which page), the namer, the prefix index (which page has which name) and, if configured,
the lower tiers with their loader. All methods are called from the scheduler's thread; none blocks. A request's `pages`,
`page_names` and `num_computed` change nowhere else.

The one rule that keeps output right: a page is written only while a single request holds it and nobody can find it.
Names enter the index in `commit`, after the step that wrote the page; reuse takes whole pages from the index and stops
short of the last two tokens, so what a request writes always lies in pages of its own.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

from inferflux.engine.kv.eviction import EVICTION
from inferflux.engine.kv.hashing import PageNamer
from inferflux.engine.kv.lower_tiers import LowerTiers, TierSettings
from inferflux.engine.kv.page_pool import PagePool
from inferflux.engine.kv.prefix_index import PrefixIndex
from inferflux.engine.kv.prefix_loader import MAX_LOADS, PrefixLoader, TierMatch
from inferflux.engine.kv.rates import Rates
from inferflux.engine.request import Request
from inferflux.engine.stats import EngineStats
from inferflux.engine.step import FileChange, MoveResult, PageMove

_NO_MATCH = TierMatch([], None)


class KVManager:
    """Pages of one device pool, `page_tokens` tokens each.

    fingerprint: names the model (see `hashing`). prefix_cache: False: no page is kept after its request.
    tiers: with host_pages 0 evicted pages are lost. clock: monotonic seconds.
    """

    def __init__(
        self,
        num_pages: int,
        page_tokens: int,
        fingerprint: bytes,
        prefix_cache: bool,
        tiers: TierSettings = TierSettings(host_pages=0),  # noqa: B008 (immutable)
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.page_tokens = page_tokens
        self.pool = PagePool(num_pages, EVICTION[tiers.eviction](), tiers.cache_pages)
        self.index = PrefixIndex()
        self.rates = Rates()
        self._tiers = LowerTiers(tiers) if tiers.host_pages and prefix_cache else None
        self._loader = (
            None if self._tiers is None else PrefixLoader(self.pool, self.index, self._tiers, self.rates, clock)
        )
        self._prefix_cache = prefix_cache
        self._query_tokens = 0
        self._hit_tokens = 0
        self._num_evictions = 0
        self._namer = PageNamer(fingerprint, page_tokens)

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the whole pool holds."""
        return self.pool.num_pages * self.page_tokens

    def fits(self, num_tokens: int) -> bool:
        """True when one request of that many computed tokens fits into the pool when it is alone."""
        return num_tokens <= self.capacity_tokens

    def has_room(self, num_pages: int) -> bool:
        """True when so many pages can be allocated now."""
        return num_pages <= self.pool.num_available

    def match_prefix(self, request: Request) -> list[int]:
        """Returns the pages that hold the request's longest cached prefix, leaving tokens to compute
        (see `_num_reusable`).

        Takes no reference: the result is valid until the next call that changes the pool. Mutates nothing but
        `request.page_names`. Requests whose prompt is still to be scored or mean-pooled match nothing: they need the
        hidden states of every token.
        """
        if not self._reads_prefix(request):
            return []
        limit = self._num_reusable(request)
        known = request.page_names[:limit]
        # The rest are named lazily as the chain is followed, so that a miss costs one hash.
        unnamed = (self._name(request, position) for position in range(len(known), limit))
        return self.index.longest_chain(chain(known, unnamed))

    def num_uncached_tokens(self, request: Request, matched: Sequence[int]) -> int:
        """Returns how many tokens of a waiting request are to be computed besides its `matched` prefix."""
        return len(request.tokens) - len(matched) * self.page_tokens

    def num_pages_still_needed(self, request: Request) -> int:
        """Pages a request still needs for its known tokens and the next page_tokens it may generate."""
        num_soon = min(len(request.tokens) + self.page_tokens, request.max_total_tokens - 1)
        return self.num_pages_for(num_soon) - len(request.pages)

    def num_cached_tokens(self, request: Request) -> int:
        """Returns how many tokens of a waiting request's longest cached prefix need not be computed.

        Cheap enough to be asked for each waiting request again and again: a page is evicted before its predecessor, so
        a binary search finds the end. Where a page in between is missing nevertheless, the number is an estimate.
        """
        names = request.page_names[: self._num_reusable(request)]
        if names and self._reads_prefix(request) and self._is_missing(names[-1]):
            return bisect_left(names, True, key=self._is_missing) * self.page_tokens
        return len(self.match_prefix(request)) * self.page_tokens

    def admit(self, request: Request, matched: list[int], max_new_tokens: int, num_reserved: int) -> bool:
        """Gives a request without pages its `matched` prefix and fresh pages for at most max_new_tokens more tokens.

        False, and nothing changed, unless the pool could hold all its tokens besides `num_reserved` further pages.
        `matched` must come from `match_prefix` with no change in between. Sets `pages` and `num_computed`.
        """
        assert not request.pages
        pool, num_tokens = self.pool, len(request.tokens)
        num_cached = sum(map(pool.is_cached, matched))
        num_fresh = self.num_pages_for(num_tokens) - len(matched)
        if num_fresh + num_cached + num_reserved > pool.num_available:
            return False
        for page in matched:
            pool.share(page)
        request.pages = matched.copy()
        request.num_computed = len(matched) * self.page_tokens
        fresh = self.allocate(request, min(num_tokens - request.num_computed, max_new_tokens))
        assert fresh is not None, "room was checked above"
        if request.num_preemptions == 0 and self._reads_prefix(request):
            self._query_tokens += num_tokens
            self._hit_tokens += request.num_computed
            self._count_loaded(request)
        request.num_loads = 0
        return True

    def allocate(self, request: Request, num_new_tokens: int) -> list[int] | None:
        """Appends pages to a running request until its next num_new_tokens tokens have a place; returns those pages.

        None when there is no room: nothing changed. Evicts least recently used cached pages when none is free.
        """
        pages = request.pages
        num_missing = (request.num_computed + num_new_tokens - 1) // self.page_tokens + 1 - len(pages)
        if num_missing <= 0:
            return []
        if num_missing > self.pool.num_available:
            return None
        fresh, evicted = self.pool.take(num_missing)
        self._evict(evicted)
        pages += fresh
        return fresh

    def commit(self, request: Request, num_tokens: int) -> None:
        """Records that the request's next num_tokens tokens are computed; pages that became full can be found now.

        If another page already has the name, it keeps it.
        """
        before = request.num_computed // self.page_tokens
        request.num_computed += num_tokens
        after = request.num_computed // self.page_tokens
        if before == after or not self._prefix_cache:
            return
        for position in range(before, after):
            self.index.hold(self._name(request, position), request.pages[position])

    def release(self, request: Request) -> None:
        """Takes all pages back from a request that ended or was preempted; clears its `pages` and `num_computed`.

        Computed full pages stay cached under their names. The last page is released first, so that a page is always
        evicted before its parent, without which it could not be found.
        """
        pages, pool = request.pages, self.pool
        num_full = request.num_computed // self.page_tokens if self._prefix_cache else 0
        for page in reversed(pages[num_full:]):
            pool.release(page, keep=False)
        for page, name in zip(reversed(pages[:num_full]), reversed(request.page_names[:num_full]), strict=True):
            # The index may have named another page, evicted since: then this page takes the name.
            holder = self.index.hold(name, page)
            pool.release(page, keep=holder == page)
            if holder != page:
                pool.touch(holder)
        request.pages = []
        request.num_computed = 0

    def match_lower_tiers(self, request: Request, num_matched: int) -> TierMatch:
        """Returns what the lower tiers have of the request's prefix, beyond the num_matched pages on the device.

        Valid until the next call that changes the pool. Mutates nothing but `request.page_names`.
        """
        if self._loader is None or request.num_loads >= MAX_LOADS or not self._reads_prefix(request):
            return _NO_MATCH
        limit = self._num_reusable(request)
        names = (self._name(request, position) for position in range(num_matched, limit))
        return self._loader.match(names, self.page_tokens)

    def start_load(self, request: Request, matched: list[int], match: TierMatch, num_reserved: int) -> bool:
        """Gives a waiting request the pages of its prefix and starts to load those that are in a lower tier.

        False, and nothing changed, unless the pool could hold all its tokens besides `num_reserved` further pages.
        `matched` and `match` must come from `match_prefix` and `match_lower_tiers` with no change in between.
        """
        assert self._loader is not None
        assert not request.pages
        held = matched + [source.slot for source in match.sources if source.tier is None]
        num_cached = sum(map(self.pool.is_cached, held))
        num_fresh = self.num_pages_for(len(request.tokens)) - len(held)
        if num_fresh + num_cached + num_reserved > self.pool.num_available:
            return False
        num_tokens = (len(matched) + len(match.sources)) * self.page_tokens
        evicted = self._loader.start(request, matched, match.sources, self.rates.patience_s(num_tokens))
        self._evict(evicted)
        return True

    def is_loaded(self, request: Request) -> bool:
        """True when a loading request has nothing more to wait for."""
        assert self._loader is not None
        return self._loader.is_over(request)

    def finish_load(self, request: Request) -> None:
        """Takes a loading request's pages back, whether or not all have arrived; those that have are cached."""
        assert self._loader is not None
        self._loader.finish(request)

    def note_declined(self, match: TierMatch) -> None:
        """Counts a request that computes what it could have loaded, since that is faster."""
        if match.declined is not None and self._tiers is not None:
            self._tiers.note_recompute(match.declined)

    def is_being_loaded(self, name: bytes | None) -> bool:
        """True while the page of this name is being loaded to the device, and not overdue."""
        return name is not None and self._loader is not None and self._loader.is_being_loaded(name)

    @property
    def num_moves_in_progress(self) -> int:
        """Page moves in progress."""
        return 0 if self._tiers is None else self._tiers.num_moves_in_progress

    @property
    def has_background_work(self) -> bool:
        """True while the tiers have work that no request waits for."""
        tiers = self._tiers
        return self.is_writing or (tiers is not None and (tiers.is_waiting_for_file or tiers.has_wipe))

    def take_moves(self) -> tuple[list[PageMove], bool]:
        """Returns the moves for the next plan, which must start in this order, and whether to wipe the file first."""
        if self._loader is None or self._tiers is None:
            return [], False
        self._loader.start_pending()
        self._tiers.store()
        return self._tiers.take_moves(), self._tiers.take_wipe()

    def end_moves(self, results: Sequence[MoveResult], file_changes: Sequence[FileChange]) -> None:
        """Applies the results of moves, then changes of the file tier."""
        if self._loader is None or self._tiers is None:
            return
        self._loader.end(results)
        for change in file_changes:
            if change.state == "off":
                self._loader.lose_file()
            self._tiers.note_file(change)

    @property
    def is_writing(self) -> bool:
        """True while pages are being moved, or wait to be written to the file."""
        return self._tiers is not None and (self._tiers.num_moves_in_progress > 0 or self._tiers.has_unstored)

    def flush(self, max_pages: int) -> int:
        """Copies up to max_pages cached device pages that no lower tier has to host memory, most recently used first;
        returns how many. They stay cached."""
        if self._tiers is None:
            return 0
        count, max_pages = 0, min(max_pages, self._tiers.flush_room)
        for page in reversed(self.pool.cached_pages()):
            if count == max_pages:
                break
            name = self.index.name_of(page)
            if name is not None and self._tiers.locate(name) is None:
                count += self._tiers.demote(name, page)
        return count

    def first_missing_name(self, request: Request, num_matched: int) -> bytes | None:
        """Returns the name of the first page that `match_prefix` missed; None when the request could not use it."""
        if not self._reads_prefix(request) or num_matched >= self._num_reusable(request):
            return None
        return self._name(request, num_matched)

    def next_page_name(self, request: Request) -> bytes | None:
        """Returns the name that the request's first unfinished page will have; None while its tokens are not known."""
        position = request.num_computed // self.page_tokens
        if not self._prefix_cache or position >= len(request.tokens) // self.page_tokens:
            return None
        return self._name(request, position)

    def num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_tokens)

    def reset_prefix_cache(self) -> None:
        """Forgets every cached page in every tier. Running requests keep theirs, which are cached when they end."""
        self.index.clear()
        self.pool.drop_cached()
        if self._tiers is not None:
            self._tiers.clear()

    def report(self, stats: EngineStats) -> None:
        """Fills in the numbers of pages and of the prefix cache.

        prefix_query_tokens counts requests that look for a cached prefix, once each: resuming does not count.
        """
        stats.device_pages_total = self.pool.num_pages
        stats.device_pages_in_use = self.pool.num_used
        stats.device_pages_cached = self.pool.num_cached
        stats.prefix_query_tokens = self._query_tokens
        stats.prefix_hit_tokens = self._hit_tokens
        stats.evictions = self._num_evictions
        if self._tiers is not None:
            stats.tiers = self._tiers.report()

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Asserts that the books agree with `requests`, all that hold pages. Linear in the pool: not for every step."""
        owners = Counter(page for request in requests for page in request.pages)
        if self._loader is not None:
            owners.update(self._loader.held_pages())
            self._loader.check_integrity()
        self.pool.check_integrity(owners)
        self.index.check_integrity()
        for page in self.pool.cached_pages():
            assert self.index.name_of(page) is not None, f"page {page} is cached but cannot be found"
        assert len(self.index) <= self.pool.num_cached + self.pool.num_used, "the index names a free page"

    def _evict(self, pages: Iterable[int]) -> None:
        """Forgets the names of evicted pages; their bytes go to a lower tier if it has room."""
        for page in pages:
            name = self.index.forget(page)
            self._num_evictions += 1
            if self._tiers is not None:
                self._tiers.demote(name, page)

    def _count_loaded(self, request: Request) -> None:
        left = request.num_computed
        for tier, num_pages in request.num_loaded.items():
            num_tokens = min(left, num_pages * self.page_tokens)
            left -= num_tokens
            if self._tiers is not None:
                self._tiers.note_hit(tier, num_tokens)

    def _num_reusable(self, request: Request) -> int:
        """Returns how many of the request's pages may be cached ones: at least the last two tokens are computed, one
        for its logits and another because a prompt's token is never computed alone (see `StepPlanner`)."""
        return max(0, len(request.tokens) - 2) // self.page_tokens

    def _reads_prefix(self, request: Request) -> bool:
        scores_prompt = request.sampling.prompt_logprobs is not None and request.num_output_tokens == 0
        sums_prompt = request.sampling.pooling not in (None, "last")
        return self._prefix_cache and not (scores_prompt or sums_prompt)

    def _is_missing(self, name: bytes) -> bool:
        return self.index.page_of(name) is None

    def _name(self, request: Request, position: int) -> bytes:
        if position >= len(request.page_names):
            names, tokens = request.page_names, request.tokens
            self._namer.extend(names, tokens, position + 1, request.salt, request.adapter_name)
        return request.page_names[position]
