"""InFlightStep: what the scheduler remembers of a launched step until its results are in.

A row's result counts only if its request still runs and has not been preempted since the row was planned.
"""

from collections.abc import Iterator
from typing import NamedTuple

from inferflux.engine.request import Request, RequestState
from inferflux.engine.scheduler.fair_share import SharedStep
from inferflux.engine.scheduler.step_time import StepSize


class InFlightStep(NamedTuple):
    """requests: of its rows, each with its number of preemptions when the row was planned. started: when it was
    planned. size: what it computes. shared: set when requests of favoured tenants take part."""

    step_id: int
    requests: list[tuple[Request, int]]
    started: float
    size: StepSize
    shared: SharedStep | None

    @property
    def is_live(self) -> bool:
        """Whether any request still needs the step's results."""
        return any(is_current(request, num_preemptions) for request, num_preemptions in self.requests)

    def live_requests(self) -> Iterator[Request]:
        """Yields the requests that still need the step's results."""
        return (request for request, num_preemptions in self.requests if is_current(request, num_preemptions))


def is_current(request: Request, num_preemptions: int) -> bool:
    """Whether the request still runs, and has not been preempted since it had this number of preemptions."""
    return request.state is RequestState.RUNNING and request.num_preemptions == num_preemptions
