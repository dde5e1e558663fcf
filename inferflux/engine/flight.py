"""Flight: what the scheduler remembers of a step in flight, until its results are in.

A row's result counts only if its request has neither ended nor been preempted since the row was planned.
"""

from collections.abc import Iterator
from typing import NamedTuple

from inferflux.engine.favour import SharedStep
from inferflux.engine.pace import Load
from inferflux.engine.request import Request, RequestState


class Flight(NamedTuple):
    """One step in flight. requests: of its rows, each with its number of preemptions when the row was planned (`life`).
    started: when it was planned. load: what it computes. shared: set when favoured requests take part."""

    step_id: int
    requests: list[tuple[Request, int]]
    started: float
    load: Load
    shared: SharedStep | None


def is_own(request: Request, life: int) -> bool:
    """Whether the request still runs, without a preemption since the row was planned."""
    return request.state is RequestState.RUNNING and request.num_preemptions == life


def living(flight: Flight) -> Iterator[Request]:
    """Yields the requests that still need the step's results."""
    return (request for request, life in flight.requests if is_own(request, life))


def is_alive(flight: Flight) -> bool:
    """Whether any request still needs the step's results."""
    return any(is_own(request, life) for request, life in flight.requests)
