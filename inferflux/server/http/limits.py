"""Rate limits at the HTTP edge: which limit counts for whom, and the `x-ratelimit-*` headers that tell callers."""

import math
from collections.abc import MutableMapping

from aiohttp import web

from inferflux.server.access.principal import Principal
from inferflux.server.access.rate_limit import Limits, RateLimitedError, Reservation
from inferflux.server.http.context import CONTEXT, INFO, RequestInfo


def count_request(request: web.Request, principal: Principal) -> None:
    """Counts a request of this principal's: against its own limit, else against the server's.

    Raises RateLimitedError.
    """
    context, info = request.app[CONTEXT], request[INFO]
    limit = principal.requests_per_minute
    if limit is None:
        limit = context.policy.document.rate_limit.requests_per_minute
    try:
        allowance = context.limiter.take_request(principal.id, Limits(requests_per_minute=limit))
    except RateLimitedError as error:
        info.allowances[error.kind] = error.allowance
        raise
    if allowance is not None:
        info.allowances["requests"] = allowance


def reserve_tokens(request: web.Request, num_tokens: int) -> Reservation:
    """Sets aside the most tokens a request can use. Raises RateLimitedError."""
    context, info = request.app[CONTEXT], request[INFO]
    principal = info.principal
    assert principal is not None, "routes that generate declare a scope"
    limit = principal.tokens_per_minute
    if limit is None:
        limit = context.config.auth.tokens_per_minute
    try:
        reservation = context.limiter.reserve_tokens(principal.id, Limits(tokens_per_minute=limit), num_tokens)
    except RateLimitedError as error:
        info.allowances[error.kind] = error.allowance
        raise
    if reservation.allowance is not None:
        info.allowances["tokens"] = reservation.allowance
    return reservation


def add_limit_headers(info: RequestInfo, headers: MutableMapping[str, str]) -> None:
    """Says what is left of each limit that counts: in whole units, and when all of it is back in seconds (`12s`)."""
    for kind, allowance in info.allowances.items():
        headers[f"x-ratelimit-limit-{kind}"] = str(allowance.limit)
        headers[f"x-ratelimit-remaining-{kind}"] = str(allowance.remaining)
        headers[f"x-ratelimit-reset-{kind}"] = f"{math.ceil(allowance.reset_s)}s"
