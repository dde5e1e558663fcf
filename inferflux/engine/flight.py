"""Flight: what the scheduler remembers of a step until its results are in.

A row's results count only while its request lives as it did when the row was planned: not after it has ended, nor
after it has yielded its pages.
"""

from collections.abc import Iterator
from typing import NamedTuple

from inferflux.engine.favour import Beside
from inferflux.engine.pace import Load
from inferflux.engine.request import Request, RequestState


class Flight(NamedTuple):
    """A step without results so far. requests: its rows', each with the life it was in: its preemptions until then.
    started: when it was planned. load: what it computes. beside: how that is shared, with favoured requests in it."""

    step_id: int
    requests: list[tuple[Request, int]]
    started: float
    load: Load
    beside: Beside | None


def is_own(request: Request, life: int) -> bool:
    """Whether a row planned in the request's given life is still its own."""
    return request.state is RequestState.RUNNING and request.num_preemptions == life


def living(flight: Flight) -> Iterator[Request]:
    """Yields the requests that wait for the step's results."""
    return (request for request, life in flight.requests if is_own(request, life))


def is_alive(flight: Flight) -> bool:
    """Whether somebody waits for the step's results."""
    return any(is_own(request, life) for request, life in flight.requests)
