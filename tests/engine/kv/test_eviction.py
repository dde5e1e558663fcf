"""Which slot is given up first: least recently used, or by the clock's second chance."""

import pytest

from inferflux.engine.kv import eviction
from inferflux.engine.kv.eviction import EVICTION, Clock, EvictionOrder, Lru


def filled(order: EvictionOrder, num_slots: int) -> EvictionOrder:
    for slot in range(num_slots):
        order.add(slot)
    return order


def emptied(order: EvictionOrder) -> list[int]:
    return [order.pop() for _ in range(len(order))]


@pytest.mark.parametrize("name", EVICTION)
def test_what_is_removed_is_never_given_up(name: str) -> None:
    order = filled(EVICTION[name](), 4)
    order.remove(1)
    assert 1 not in order
    assert emptied(order) == [0, 2, 3]


def test_lru_gives_up_what_was_not_used_for_longest() -> None:
    order = filled(Lru(), 4)
    order.touch(0)
    order.touch(2)
    assert list(order) == [1, 3, 0, 2]
    assert emptied(order) == [1, 3, 0, 2]


def test_clock_passes_once_by_what_was_used_and_by_what_is_new() -> None:
    order = filled(Clock(), 3)
    assert order.pop() == 0  # the hand has passed 1 and 2
    order.add(3)
    order.touch(1)
    assert emptied(order) == [2, 1, 3]


def test_clocks_sweep_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "MAX_SWEEP", 2)
    order = filled(Clock(), 5)
    assert order.pop() == 2
    assert list(order) == [3, 4, 0, 1]
