"""Scheduling policies: which waiting request goes first, and who yields pages last.

A policy gives each request a number once, when it is added; the smallest goes first. So the queue stays sorted and is
never sorted anew. Knows no queue and no pages.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from inferflux.engine.request import Request
from inferflux.errors import ConfigError, did_you_mean

AGE_STEP_S = 10.0

Policy = Callable[[Request], float]


def fcfs(request: Request) -> float:
    """First come, first served."""
    return request.arrival_time


def priority_age(request: Request) -> float:
    """Higher priority first, with aging: each AGE_STEP_S seconds of waiting count as one level, so nobody starves.

    Effective priority is priority + (now - arrival_time) / AGE_STEP_S. All requests age alike, so `now` drops out of
    every comparison, and what is left can be computed once.
    """
    return request.arrival_time - AGE_STEP_S * request.priority


POLICIES: Mapping[str, Policy] = MappingProxyType({"fcfs": fcfs, "priority_age": priority_age})


def policy_named(name: str) -> Policy:
    """Returns the policy. Raises ConfigError when there is none of that name."""
    if name not in POLICIES:
        accepted = ", ".join(POLICIES)
        raise ConfigError(
            f"runtime.scheduler.policy: must be one of {accepted} (got {name!r}{did_you_mean(name, POLICIES)})"
        )
    return POLICIES[name]
