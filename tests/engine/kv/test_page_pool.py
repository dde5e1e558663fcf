"""The pool alone: states of a page, order of eviction, and an integrity check that notices each kind of damage."""

import pytest

from inferflux.engine.kv.eviction import Lru
from inferflux.engine.kv.page_pool import PagePool


def test_pages_go_from_free_to_used_to_cached_and_back() -> None:
    pool = PagePool(4, Lru())
    pages, evicted = pool.take(3)
    assert (len(set(pages)), evicted, pool.num_free, pool.num_used) == (3, [], 1, 3)
    pool.share(pages[0])
    pool.release(pages[0], keep=True)
    assert pool.references(pages[0]) == 1
    pool.release(pages[0], keep=True)
    pool.release(pages[1], keep=False)
    assert (pool.num_free, pool.num_cached, pool.num_used, pool.num_available) == (2, 1, 1, 3)
    pool.share(pages[0])
    assert (pool.num_cached, pool.references(pages[0])) == (0, 1)
    pool.check_integrity({pages[0]: 1, pages[2]: 1})


def test_free_pages_go_first_then_the_least_recently_used() -> None:
    pool = PagePool(4, Lru())
    (a, b, c, d), _ = pool.take(4)
    for page in (a, b, c):
        pool.release(page, keep=True)
    pool.touch(a)
    assert pool.cached_pages() == [b, c, a]
    pool.release(d, keep=False)
    pages, evicted = pool.take(3)
    assert (len(pages), evicted) == (3, [b, c])
    assert pool.references(b) == 1


def test_cached_pages_are_evicted_before_more_are_brought_into_use_than_the_cache_may() -> None:
    pool = PagePool(8, Lru(), cache_pages=3)
    (a, b), _ = pool.take(2)
    pool.release(a, keep=True)
    pool.release(b, keep=True)
    (c, d, e), evicted = pool.take(3)
    assert (evicted, {d, e}, pool.num_available) == ([a, b], {a, b}, 5)
    pool.check_integrity({a: 1, b: 1, c: 1})
    # Requests get all there are.
    pages, evicted = pool.take(5)
    assert (evicted, pool.num_free, pool.num_used) == ([], 0, 8)
    assert len({a, b, c, *pages}) == 8
    # What was in use once costs nothing more.
    pool.release(pages[0], keep=False)
    pool.release(pages[1], keep=True)
    assert pool.take(1) == ([pages[0]], [])


def test_a_cache_that_may_have_more_pages_than_there_are_evicts_when_all_were_in_use() -> None:
    """Others were taken that were not there, which ended the engine."""
    pool = PagePool(4, Lru(), cache_pages=9)
    pages, _ = pool.take(3)
    for page in pages:
        pool.release(page, keep=True)
    taken, evicted = pool.take(3)
    assert (sorted(taken), evicted) == ([0, 1, 3], [0, 1])
    pool.check_integrity(dict.fromkeys(taken, 1))


def test_what_was_in_use_goes_before_what_never_was() -> None:
    pool = PagePool(1000, Lru())
    (a, b), _ = pool.take(2)
    pool.release(b, keep=False)
    assert pool.take(1)[0] == [b]
    pool.release(a, keep=False)
    assert pool.take(2)[0] == [a, 2]


def test_touching_a_page_in_use_changes_nothing() -> None:
    pool = PagePool(2, Lru())
    (page,), _ = pool.take(1)
    pool.touch(page)
    assert not pool.is_cached(page)
    pool.check_integrity({page: 1})


def test_dropping_the_cache_frees_it() -> None:
    pool = PagePool(2, Lru())
    pages, _ = pool.take(2)
    pool.release(pages[0], keep=True)
    pool.drop_cached()
    assert (pool.num_free, pool.num_cached, pool.num_used) == (1, 0, 1)
    pool.check_integrity({pages[1]: 1})


def test_taking_or_releasing_too_much_is_our_mistake() -> None:
    pool = PagePool(1, Lru())
    with pytest.raises(AssertionError):
        pool.take(2)
    (page,), _ = pool.take(1)
    pool.release(page, keep=False)
    with pytest.raises(AssertionError):
        pool.release(page, keep=False)


def test_integrity_check_notices_wrong_owners() -> None:
    pool = PagePool(3, Lru())
    (page, other), _ = pool.take(2)
    for owners in ({}, {page: 1}, {page: 2, other: 1}, {page: 1, other: 1, 2: 1, 0: 1}):
        with pytest.raises(AssertionError, match="references"):
            pool.check_integrity(owners)


def test_integrity_check_notices_lost_and_double_pages() -> None:
    pool = PagePool(2, Lru())
    for page in pool.take(2)[0]:
        pool.release(page, keep=False)
    lost = pool._free.pop()
    with pytest.raises(AssertionError, match="lost"):
        pool.check_integrity({})
    pool._free += [lost, lost]
    with pytest.raises(AssertionError, match="free twice"):
        pool.check_integrity({})
    pool._free.pop()
    pool._cached.add(lost)
    with pytest.raises(AssertionError, match="both"):
        pool.check_integrity({})
