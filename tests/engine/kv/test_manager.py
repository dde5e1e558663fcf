"""KVManager: what is reused, what is never shared, and in which order pages are given up."""

from typing import Any

import pytest

from inferflux.engine.kv.manager import KVManager
from inferflux.engine.request import Request
from inferflux.engine.stats import EngineStats
from inferflux.sampling_params import SamplingParams


def make_request(tokens: list[int], salt: bytes = b"", prompt_logprobs: int | None = None) -> Request:
    sampling = SamplingParams(max_tokens=10, prompt_logprobs=prompt_logprobs)
    return Request(1, list(tokens), sampling, seed=0, max_total_tokens=len(tokens) + 10, salt=salt)


def admit(kv: KVManager, request: Request, num_reserved: int = 0) -> bool:
    return kv.admit(request, kv.match_prefix(request), 1000, num_reserved)


def compute(kv: KVManager, tokens: list[int], **kwargs: Any) -> Request:
    """Returns a running request whose tokens are all computed."""
    request = make_request(tokens, **kwargs)
    assert admit(kv, request)
    kv.commit(request, request.num_uncomputed)
    return request


def make_manager(num_pages: int = 8, page_tokens: int = 4, prefix_cache: bool = True) -> KVManager:
    return KVManager(num_pages, page_tokens, b"model", prefix_cache)


def stats_of(kv: KVManager) -> EngineStats:
    stats = EngineStats()
    kv.report(stats)
    return stats


TOKENS = list(range(14))


def test_full_pages_are_found_only_once_they_are_computed() -> None:
    kv = make_manager()
    request = make_request(TOKENS)
    assert admit(kv, request)
    assert kv.match_prefix(make_request(TOKENS)) == []
    kv.commit(request, 7)
    assert kv.match_prefix(make_request(TOKENS)) == request.pages[:1]
    kv.commit(request, 1)
    assert kv.match_prefix(make_request(TOKENS)) == request.pages[:2]
    kv.commit(request, 6)
    assert kv.match_prefix(make_request(TOKENS)) == request.pages[:3], "the last page is not full"


def test_running_requests_share_pages_and_count_them() -> None:
    kv = make_manager()
    first, second = compute(kv, TOKENS), make_request([*TOKENS, 99])
    assert admit(kv, second)
    assert second.pages[:3] == first.pages[:3]
    assert second.pages[3] != first.pages[3]
    assert second.num_computed == 12
    stats = stats_of(kv)
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (14 + 15, 12)
    kv.check_integrity([first, second])
    kv.release(first)
    kv.release(second)
    kv.check_integrity([])


def test_at_least_two_tokens_are_left_to_compute() -> None:
    kv = make_manager()
    kv.release(compute(kv, TOKENS[:8]))
    assert len(kv.match_prefix(make_request(TOKENS[:8]))) == 1
    assert len(kv.match_prefix(make_request(TOKENS[:9]))) == 1
    assert len(kv.match_prefix(make_request(TOKENS[:10]))) == 2
    single = make_manager(page_tokens=1)
    single.release(compute(single, TOKENS[:3]))
    assert len(single.match_prefix(make_request(TOKENS[:3]))) == 1
    assert single.match_prefix(make_request(TOKENS[:2])) == []
    assert single.match_prefix(make_request(TOKENS[:1])) == []


def test_salt_and_scored_prompts_find_nothing() -> None:
    kv = make_manager()
    kv.release(compute(kv, TOKENS))
    assert kv.match_prefix(make_request(TOKENS, salt=b"other")) == []
    assert kv.match_prefix(make_request(TOKENS, prompt_logprobs=0)) == []
    assert len(kv.match_prefix(make_request(TOKENS))) == 3


def test_a_waiting_request_is_told_what_it_would_find_as_its_prefix_comes_and_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Asked again it takes a few looks, and not one per page."""
    tokens = list(range(1002))
    kv = make_manager(num_pages=400)
    waiting, first = make_request(tokens), make_request(tokens)
    assert kv.num_cached_tokens(waiting) == 0
    assert admit(kv, first)
    for _ in range(10):
        kv.commit(first, 100)
        assert kv.num_cached_tokens(waiting) == first.num_computed == 4 * len(kv.match_prefix(waiting))
    kv.release(first)
    for left in range(249, 0, -1):
        compute(kv, [-left] * (4 * (kv.pool.num_available - left)))
        assert kv.num_cached_tokens(waiting) == 4 * len(kv.match_prefix(waiting)) == 4 * left
    looks = []
    monkeypatch.setattr(kv.index, "page_of", lambda name: looks.append(name))
    assert kv.num_cached_tokens(waiting) == 0
    assert 0 < len(looks) < 12


def test_allocate_gives_pages_just_in_time_or_changes_nothing() -> None:
    kv = make_manager(num_pages=3)
    request = compute(kv, TOKENS[:4])
    fresh = kv.allocate(request, 1)
    assert fresh is not None
    assert request.pages[1:] == fresh
    assert kv.allocate(request, 4) == []
    assert kv.allocate(request, 9) is None
    assert len(request.pages) == 2
    assert kv.pool.num_free == 1


def test_admission_needs_room_for_all_tokens_and_the_reserve() -> None:
    kv = make_manager(num_pages=8)
    kv.release(compute(kv, TOKENS))
    before = kv.pool.cached_pages()
    request = make_request(TOKENS)
    assert not kv.admit(request, kv.match_prefix(request), 1, 5)
    assert (request.pages, request.num_computed, kv.pool.cached_pages()) == ([], 0, before)
    assert kv.admit(request, kv.match_prefix(request), 1, 4)
    assert len(request.pages) == 4


def test_the_tail_is_evicted_before_what_it_builds_on() -> None:
    kv = make_manager(num_pages=4)
    kv.release(compute(kv, TOKENS[:12]))
    compute(kv, [50] * 4)
    assert stats_of(kv).evictions == 0
    compute(kv, [60] * 4)
    assert stats_of(kv).evictions == 1
    assert len(kv.match_prefix(make_request(TOKENS))) == 2


def test_a_duplicate_page_becomes_free_and_refreshes_the_one_that_is_kept() -> None:
    kv = make_manager()
    kept = compute(kv, TOKENS[:8])
    kept_pages = list(kept.pages)
    kv.release(kept)
    twin = compute(kv, TOKENS[:8])
    assert twin.pages[0] == kept_pages[0]
    assert twin.pages[1] != kept_pages[1], "the last page of a fully cached prompt is computed again"
    other = compute(kv, [50] * 4)
    other_pages = list(other.pages)
    kv.release(other)
    kv.release(twin)
    assert kv.pool.cached_pages() == [*other_pages, kept_pages[1], kept_pages[0]]
    assert kv.pool.num_free == 5
    kv.check_integrity([])


def test_a_duplicate_takes_the_place_of_an_evicted_page() -> None:
    """Otherwise pages behind it would stay cached where no lookup can reach them."""
    kv = make_manager(num_pages=6, page_tokens=4)
    kv.release(compute(kv, TOKENS[:8]))
    twin = compute(kv, TOKENS[:8])
    twin.tokens += TOKENS[8:12]
    assert kv.allocate(twin, 4) is not None
    kv.commit(twin, 4)
    hog = compute(kv, [50] * 12)
    assert stats_of(kv).evictions == 1
    assert len(kv.match_prefix(make_request(TOKENS))) == 1
    kv.release(twin)
    assert len(kv.match_prefix(make_request(TOKENS))) == 3
    kv.check_integrity([hog])


def test_what_is_not_computed_is_not_kept() -> None:
    kv = make_manager()
    request = make_request(TOKENS)
    assert admit(kv, request)
    kv.commit(request, 5)
    kv.release(request)
    assert (kv.pool.num_cached, kv.pool.num_free) == (1, 7)


def test_without_prefix_cache_nothing_is_named() -> None:
    kv = make_manager(prefix_cache=False)
    request = compute(kv, TOKENS)
    assert (request.page_names, kv.next_page_name(request), kv.first_missing_name(request, 0)) == ([], None, None)
    kv.release(request)
    assert kv.pool.num_free == 8
    assert kv.match_prefix(make_request(TOKENS)) == []


def test_a_reset_forgets_the_cached_and_leaves_the_running() -> None:
    kv = make_manager()
    kv.release(compute(kv, [50] * 8))
    running = compute(kv, TOKENS)
    kv.reset_prefix_cache()
    kv.check_integrity([running])
    assert kv.pool.num_cached == 0
    assert kv.match_prefix(make_request(TOKENS)) == []
    kv.release(running)
    assert len(kv.match_prefix(make_request(TOKENS))) == 3
    kv.check_integrity([])


def test_a_waiter_knows_the_name_that_another_is_computing() -> None:
    kv = make_manager()
    first, second = make_request(TOKENS), make_request(TOKENS)
    assert admit(kv, first)
    assert kv.next_page_name(first) == kv.first_missing_name(second, 0) is not None
    kv.commit(first, 5)
    assert kv.next_page_name(first) == kv.first_missing_name(second, 1)
    assert kv.first_missing_name(second, 3) is None, "only whole pages are worth waiting for"
    assert kv.first_missing_name(make_request(TOKENS[:8]), 1) is None, "that page could not be used"
    assert kv.first_missing_name(make_request(TOKENS, prompt_logprobs=0), 0) is None
    kv.commit(first, 8)
    assert kv.next_page_name(first) is None, "the last page will not be full"


def test_capacity() -> None:
    kv = make_manager(num_pages=3, page_tokens=4)
    assert kv.capacity_tokens == 12
    assert (kv.fits(12), kv.fits(13)) == (True, False)
    assert [kv.num_pages_for(n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
