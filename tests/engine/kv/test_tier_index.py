"""A lower tier's books, the order of eviction, and when a page is worth loading."""

import pytest

from inferflux.engine.kv.eviction import MAX_SWEEP, Clock, Lru
from inferflux.engine.kv.lower_tiers import LowerTiers, TierSettings
from inferflux.engine.kv.rates import RETRY_S, Rates
from inferflux.engine.kv.tier_index import TierIndex
from inferflux.engine.step import FileChange, MoveResult

A, B, C, D = (letter * 32 for letter in (b"a", b"b", b"c", b"d"))


def stored(index: TierIndex, *names: bytes) -> list[int]:
    slots = []
    for name in names:
        slot = index.reserve(name)
        assert slot is not None
        index.settle(slot, ok=True)
        slots.append(slot)
    index.check_integrity()
    return slots


def test_a_page_is_found_once_it_has_arrived():
    index = TierIndex(2, Lru)
    slot = index.reserve(A)
    assert slot is not None
    assert (index.find(A), index.knows(A), len(index)) == (None, True, 0)
    index.settle(slot, ok=True)
    assert (index.find(A), len(index)) == (slot, 1)
    failed = index.reserve(B)
    assert failed is not None
    index.settle(failed, ok=False)
    assert not index.knows(B)
    assert index.reserve(C) == failed
    index.check_integrity()


def test_the_least_recently_used_goes_and_pinned_ones_stay():
    index = TierIndex(3, Lru)
    a, b, c = stored(index, A, B, C)
    index.touch(a)
    index.pin(b)
    assert index.reserve(D) == c
    assert (index.find(C), index.find(A), index.find(B)) == (None, a, b)
    index.pin(a)
    assert index.reserve(C) is None, "everything is pinned"
    index.unpin(a)
    index.unpin(b)
    index.check_integrity()
    assert index.num_evictions == 1


def test_what_is_kept_goes_after_all_others_the_least_recently_used_first():
    index = TierIndex(3, Lru)
    a, b, c = stored(index, A, B, C)
    for slot in (a, b):
        index.keep(slot, kept=True)
    index.pin(a)
    index.unpin(a)
    index.check_integrity()
    assert index.reserve(D) == c
    assert index.reserve(C) == b, "a was used since"
    index.keep(a, kept=False)
    index.check_integrity()
    assert index.find(A) == a


def test_a_page_that_the_file_has_gives_way_to_one_that_it_has_not():
    """Also if it was used last, by the very write: host memory is where pages wait for the disk."""
    tiers = LowerTiers(TierSettings(4, has_file=True, queue_depth=4))
    tiers.note_file(FileChange("on", 100, pages=[]))

    pages = [bytes([number]) * 32 for number in range(6)]
    for page, name in enumerate(pages[:4]):
        assert tiers.demote(name, page)
    moves = tiers.take_moves()
    tiers.store()
    moves += tiers.take_moves()
    assert [move.name for move in moves if move.kind == "store"] == pages[:2]
    for move in moves:
        tiers.end(MoveResult(move.id, 0.0))
    for page, name in enumerate(pages[4:]):
        assert tiers.demote(name, page)
    assert [tiers.locate(name) is not None for name in pages] == [True] * 6
    tiers.check_integrity([])


def test_what_is_forgotten_while_it_is_read_is_free_only_afterwards():
    index = TierIndex(1, Lru)
    (slot,) = stored(index, A)
    index.pin(slot)
    index.clear()
    assert index.reserve(B) is None
    index.check_integrity()
    index.unpin(slot)
    assert index.reserve(B) == slot


def test_a_tier_that_shrank_and_grew_again():
    index = TierIndex(4, Lru)
    a, b, c = stored(index, A, B, C)
    index.resize(1)
    index.forget(b)
    index.forget(c)
    assert index.reserve(D) == a, "only what is left is used"
    index.check_integrity()
    index.resize(4)
    assert {index.reserve(B), index.reserve(C)} <= {b, c, 3}
    index.check_integrity()


def test_refilling_leaves_alone_what_a_move_still_uses():
    index = TierIndex(4, Lru)
    slot = index.reserve(A)
    assert slot == 0
    index.refill(3, [(2, B), (0, C), (1, D), (9, A)])
    assert (index.find(B), index.find(C), index.find(D), index.find(A)) == (2, None, 1, None)
    index.check_integrity()
    index.settle(0, ok=True)
    assert index.reserve(A) == 0
    index.check_integrity()


def test_clock_gives_what_was_used_a_second_chance():
    clock = Clock()
    for slot in range(3):
        clock.add(slot)
    assert clock.pop() == 0, "all were used when they came"
    clock.touch(1)
    assert [clock.pop(), clock.pop()] == [2, 1]
    for slot in range(10 * MAX_SWEEP):
        clock.add(slot)
    clock.pop()
    assert len(clock) == 10 * MAX_SWEEP - 1


def test_a_page_is_loaded_while_that_is_faster():
    rates = Rates()
    assert rates.prefers_load("nvme", 16, 0.0), "nothing is known yet"
    rates.note_step(100, 100, 1.0)
    rates.note_step(1, 100, 50.0)
    assert rates.prefill_s_per_token == 0.01, "steps that mostly decode say nothing"
    rates.note_load("nvme", 10, 1.0, now=0.0)
    assert rates.prefers_load("nvme", 16, 1.0)
    rates.note_load("nvme", 1, 5.0, now=1.0)
    assert not rates.prefers_load("nvme", 16, 2.0)
    assert rates.prefers_load("cpu", 16, 2.0)
    assert rates.prefers_load("nvme", 16, 1.5 + RETRY_S), "it is tried again"
    assert rates.patience_s(1000) == pytest.approx(20.0)
    assert rates.patience_s(1) == 1.0
