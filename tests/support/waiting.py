"""Waiting until something holds: by looking again and again, for as long as the slowest machine may need.

A limit here measures nothing; it only ends a test that would hang.
"""

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Well within pytest's own limit for one test.
PATIENCE_S = 120.0
_PAUSE_S = 0.005


def patience() -> asyncio.Timeout:
    """Returns a context that raises TimeoutError when what is awaited in it never comes."""
    return asyncio.timeout(PATIENCE_S)


async def until(condition: Callable[[], T]) -> T:
    """Waits until `condition()` is true, and returns what it said then."""
    async with patience():
        while not (found := condition()):
            await asyncio.sleep(_PAUSE_S)
    return found


def wait_until(condition: Callable[[], T], step: Callable[[], object] = lambda: None) -> T:
    """As `until`, without an event loop; `step` is called between two looks."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came true"
        step()
        time.sleep(_PAUSE_S)
    return found
