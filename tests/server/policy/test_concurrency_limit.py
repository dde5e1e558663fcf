"""ConcurrencyLimit: a burst does not count against a service that answers, silence does, and no turn gets lost."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from inferflux.server.policy.concurrency_limit import ConcurrencyLimit

PATIENCE_S = 0.05


async def test_who_waits_is_not_counted_while_others_are_answered():
    turns, asked = ConcurrencyLimit(2, PATIENCE_S), []

    async def question(number: int) -> int:
        asked.append(number)
        await asyncio.sleep(PATIENCE_S / 4)
        return number

    # Ten rounds of a quarter of the patience each.
    assert await asyncio.gather(*(turns.ask(lambda one=n: question(one)) for n in range(20))) == list(range(20))
    assert asked == list(range(20)), "first come, first served"


async def test_a_busy_loop_is_not_the_services_fault():
    async def question() -> str:
        await asyncio.sleep(PATIENCE_S / 10)
        return "here"

    turns = ConcurrencyLimit(1, PATIENCE_S)
    answers = [asyncio.create_task(turns.ask(question)) for _ in range(3)]
    for _ in range(3):
        await asyncio.sleep(0)
        time.sleep(2 * PATIENCE_S)
    assert await asyncio.gather(*answers) == ["here"] * 3


async def test_a_silent_service_fails_all_who_wait_and_the_next_are_asked_again():
    turns, silence, num_asked = ConcurrencyLimit(1, PATIENCE_S), asyncio.Event(), 0

    async def question() -> bool:
        nonlocal num_asked
        num_asked += 1
        return await silence.wait()

    asked = [asyncio.create_task(turns.ask(question)) for _ in range(200)]
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert {type(one) for one in results} == {TimeoutError}
    assert num_asked < 10, "not one after another"
    silence.set()
    assert await turns.ask(silence.wait)


async def leave_before_the_turn(task: asyncio.Task[bool], _end: Callable[[], None]) -> None:
    task.cancel()


async def leave_with_the_turn(task: asyncio.Task[bool], end: Callable[[], None]) -> None:
    end()
    await asyncio.sleep(0)
    task.cancel()


@pytest.mark.parametrize("leave", [leave_before_the_turn, leave_with_the_turn])
async def test_who_leaves_takes_no_turn_along(leave: Callable[..., Awaitable[None]]):
    turns, first = ConcurrencyLimit(1, 60.0), asyncio.Event()
    holder = asyncio.create_task(turns.ask(first.wait))
    leaver = asyncio.create_task(turns.ask(asyncio.Event().wait))
    last = asyncio.create_task(turns.ask(first.wait))
    await asyncio.sleep(0)
    await leave(leaver, first.set)
    first.set()
    assert await asyncio.gather(holder, last) == [True, True]
    assert leaver.cancelled()
    assert await turns.ask(first.wait), "the turn is free again"


async def test_what_a_question_raises_is_raised():
    async def fail() -> None:
        raise ConnectionRefusedError

    turns = ConcurrencyLimit(1, PATIENCE_S)
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            await turns.ask(fail)
