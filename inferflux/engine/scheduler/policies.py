"""Scheduling policies: which waiting request runs first, and which running one is preempted last.

A policy is a pure function that gives a request a number; the smallest goes first. `order` applies the policies.
Knows no queue and no pages.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple

from inferflux.engine.request import Request
from inferflux.errors import ConfigError, did_you_mean

AGE_STEP_S: Final = 10.0
PATIENCE_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy may know besides the request. now: monotonic seconds. served: what a tenant has been served so far
    (see `tenants`). num_cached: how many tokens of a waiting request are cached."""

    now: float
    served: Callable[[str], float]
    num_cached: Callable[[Request], int]


def fcfs(request: Request, _context: PolicyContext) -> float:
    """First come, first served."""
    return request.queued_time


def priority_age(request: Request, _context: PolicyContext) -> float:
    """Higher priority first, with aging: each AGE_STEP_S seconds of waiting count as one level, so nobody starves.

    Effective priority is priority + (now - queued_time) / AGE_STEP_S. All requests age alike, so `now` drops out of
    every comparison, and what is left never changes.
    """
    return request.queued_time - AGE_STEP_S * request.priority


def fair(request: Request, context: PolicyContext) -> float:
    """The tenant that has been served least goes first (the virtual token counter of Sheng et al., OSDI 2024)."""
    return context.served(request.tenant)


def longest_prefix(request: Request, context: PolicyContext) -> float:
    """The request that saves most by what is cached goes first; nobody is passed over for more than PATIENCE_S seconds.

    Of the running ones, who has computed most yields last. Who has had a timeslice finds its own pages cached, which
    must not make its next turn come before the others'.
    """
    if context.now - request.queued_time >= PATIENCE_S:
        return float("-inf")
    if request.num_computed:
        return -float(request.num_computed)
    return 0.0 if request.num_turns else -float(context.num_cached(request))


class Policy(NamedTuple):
    """value: the policy's number for a request; the smallest goes first.
    is_dynamic: numbers change while requests wait, so they are computed again before each step in which they matter.
    weighs_priority: it weighs priority against waiting; under the others a request of high priority goes first.
    by_tenant: a number is a tenant's, the same for all its requests, and grows with what it is served; slots are shared
    among tenants. reads_cache: it may ask what is cached, which takes time."""

    value: Callable[[Request, PolicyContext], float]
    is_dynamic: bool = False
    weighs_priority: bool = False
    by_tenant: bool = False
    reads_cache: bool = True


POLICIES: Final[Mapping[str, Policy]] = MappingProxyType(
    {
        "priority_age": Policy(priority_age, weighs_priority=True),
        "fcfs": Policy(fcfs),
        "fair": Policy(fair, is_dynamic=True, by_tenant=True, reads_cache=False),
        "longest_prefix": Policy(longest_prefix, is_dynamic=True),
    }
)


def policy_named(name: str) -> Policy:
    """Returns the policy. Raises ConfigError when there is none of that name."""
    if name not in POLICIES:
        accepted = ", ".join(POLICIES)
        raise ConfigError(
            f"runtime.scheduler.policy: must be one of {accepted} (got {name!r}{did_you_mean(name, POLICIES)})"
        )
    return POLICIES[name]
