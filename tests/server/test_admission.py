"""Admission's promises: never more inside than allowed, first come first served, nothing lost when a waiter leaves."""

import asyncio
import contextlib
import random
from collections import Counter
from typing import Any

import pytest

from inferflux.server.access.rate_limit import MAX_RETRY_AFTER_S
from inferflux.server.admission import Admission
from inferflux.server.errors import BusyError, NotReadyError
from tests.support.waiting import patience


async def hold(admission: Admission, name: str, log: list[str], release: asyncio.Event) -> None:
    async with admission.enter("m"):
        log.append(name)
        await release.wait()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_places_are_handed_on_in_order_of_arrival():
    admission, log = Admission(1, 8), []
    doors = [asyncio.Event() for _ in range(3)]
    tasks = [asyncio.create_task(hold(admission, name, log, door)) for name, door in zip("abc", doors, strict=True)]
    await settle()
    assert (log, admission.running, admission.waiting["m"]) == (["a"], 1, 2)
    doors[0].set()
    await settle()
    assert (log, admission.running, admission.waiting["m"]) == (["a", "b"], 1, 1)
    doors[1].set()
    doors[2].set()
    await asyncio.gather(*tasks)
    assert (log, admission.running, admission.waiting["m"]) == (["a", "b", "c"], 0, 0)


async def test_a_full_queue_turns_away_at_once():
    admission = Admission(1, 0)
    async with admission.enter("m"):
        with pytest.raises(BusyError, match="queue is full"):
            async with admission.enter("m"):
                pytest.fail("entered a full house")
    async with admission.enter("m"):
        assert admission.running == 1


@pytest.mark.parametrize("handed_over", [False, True])
async def test_a_waiter_that_gives_up_loses_no_place(handed_over: bool):
    """Also when the place was handed to it in the very step in which it was cancelled."""
    admission, log, door = Admission(1, 8), [], asyncio.Event()
    first = asyncio.create_task(hold(admission, "a", log, door))
    await settle()
    waiter = asyncio.create_task(hold(admission, "b", log, door))
    await settle()
    if handed_over:
        first.cancel()
        await asyncio.sleep(0)
    waiter.cancel()
    for task in (first, waiter):
        door.set()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert admission.running == 0
    assert admission.waiting["m"] == 0
    async with patience(), admission.enter("m"):
        assert admission.running == 1


async def test_a_waiter_cancelled_in_the_step_in_which_a_place_falls_free_is_passed_over():
    admission, log, door = Admission(1, 8), [], asyncio.Event()
    tasks = [asyncio.create_task(hold(admission, name, log, door)) for name in "abc"]
    await settle()
    await settle()
    door.set()  # a leaves in the next step; by then b's turn is cancelled, but b has not run yet
    tasks[1].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert log == ["a", "c"]
    assert (admission.running, admission.waiting["m"]) == (0, 0)


async def test_retry_after_follows_the_measured_pace(monkeypatch: pytest.MonkeyPatch):
    """A house of two whose places fall free every three seconds, and one that nobody leaves."""
    now = 1000.0
    monkeypatch.setattr("inferflux.server.admission.time.monotonic", lambda: now)
    admission, doors = Admission(2, 3), [asyncio.Event() for _ in range(40)]
    tasks = [asyncio.create_task(hold(admission, str(n), [], door)) for n, door in enumerate(doors[:5])]
    await settle()
    for door in doors[:35]:
        now += 3.0
        door.set()
        await settle()
        tasks.append(asyncio.create_task(hold(admission, "", [], doors[len(tasks)])))
        await settle()
    retry_after = await _refused(admission)
    assert 11 <= retry_after <= 12, "three wait, so the next one's place is the fourth to fall free"
    now += 50.0
    assert await _refused(admission) > 55
    now += 1000.0
    assert await _refused(admission) == MAX_RETRY_AFTER_S
    for door in doors:
        door.set()
    await asyncio.gather(*tasks)


async def _refused(admission: Admission) -> int:
    with pytest.raises(BusyError) as busy:
        async with admission.enter("m"):
            pytest.fail("entered a full house")
    return busy.value.retry_after_s


async def test_waiting_prompts_are_bounded_by_their_tokens():
    admission, door = Admission(1, 8, max_queue_tokens=100), asyncio.Event()
    tasks = [asyncio.create_task(visit(admission, door, tokens=tokens)) for tokens in (1, 500)]
    await settle()
    assert admission.waiting_tokens == 500, "however long, alone it may wait"
    with pytest.raises(BusyError, match="500 prompt tokens wait"):
        async with admission.enter("m", tokens=1):
            pytest.fail("entered a full house")
    tasks[1].cancel()
    await settle()
    tasks += [asyncio.create_task(visit(admission, door, tokens=50)) for _ in range(2)]
    await settle()
    assert admission.waiting_tokens == 100
    with pytest.raises(BusyError):
        async with admission.enter("m", tokens=1):
            pytest.fail("entered a full house")
    door.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (admission.waiting_tokens, admission.running) == (0, 0)


async def visit(admission: Admission, door: asyncio.Event, log: list[str] | None = None, **visitor: Any) -> None:
    async with admission.enter("m", **visitor):
        if log is not None:
            log.append(visitor["tenant"])
        await door.wait()
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("fcfs", "aaabc"), ("longest_prefix", "aaabc"), ("priority_age", "aacab"), ("fair", "aabac")],
)
async def test_the_policy_says_who_gets_in_first(policy: str, expected: str):
    admission, log, door = Admission(2, 8, policy=policy), [], asyncio.Event()
    visitors = [("a", 0), ("a", 0), ("a", 0), ("b", -1), ("c", 5)]
    tasks = []
    for tenant, priority in visitors:
        tasks.append(asyncio.create_task(visit(admission, door, log, tenant=tenant, priority=priority)))
        await settle()
    door.set()
    await asyncio.gather(*tasks)
    assert "".join(log) == expected


@pytest.mark.parametrize("seed", range(40))
async def test_whoever_comes_and_however_they_leave_nothing_of_them_stays(seed: int):
    """Else a queue of waiters that have long left is full one day, and turns everybody away."""
    chance = random.Random(seed)
    max_concurrent, max_queue = chance.randint(1, 3), chance.randint(0, 5)
    admission, inside = Admission(max_concurrent, max_queue, max_queue_tokens=10, policy="fair"), 0

    async def come() -> None:
        nonlocal inside
        async with admission.enter("m", tenant=chance.choice("xyz"), tokens=chance.randrange(8)):
            inside += 1
            assert inside <= max_concurrent
            try:
                for _ in range(chance.randrange(3)):
                    await asyncio.sleep(0)
            finally:
                inside -= 1

    visits = []
    for _ in range(20):
        visits.append(asyncio.create_task(come()))
        if chance.random() < 0.4:
            chance.choice(visits).cancel()
        if chance.random() < 0.4:
            await asyncio.sleep(0)
    for end in await asyncio.gather(*visits, return_exceptions=True):
        assert end is None or isinstance(end, BusyError | asyncio.CancelledError), end
    assert (admission.running, admission.waiting_tokens, +admission.waiting) == (0, 0, Counter())
    assert (admission._queue, dict(admission._places)) == ([], {})


async def test_a_closed_door_lets_those_inside_and_those_waiting_finish():
    admission, log, door = Admission(1, 8), [], asyncio.Event()
    tasks = [asyncio.create_task(hold(admission, name, log, door)) for name in "ab"]
    await settle()
    admission.close()
    with pytest.raises(NotReadyError, match="shutting down"):
        async with admission.enter("m"):
            pytest.fail("entered through a closed door")
    emptied = asyncio.create_task(admission.wait_empty())
    await settle()
    assert not emptied.done()
    door.set()
    await asyncio.gather(*tasks, emptied)
    assert log == ["a", "b"]
