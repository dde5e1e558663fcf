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
