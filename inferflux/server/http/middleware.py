"""What happens to every request, in order: observe (id, log, metrics) → shape errors → refuse foreign pages (`cors`) →
authenticate and count → handler.

Nothing here knows a single route; scopes are declared in `routes` and looked up here.
"""

import logging
import re
import time
import uuid
from collections.abc import Mapping
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler

from inferflux.config.tree import Scope
from inferflux.server.access.principal import ScopeError
from inferflux.server.http.auditing import record_request, request_event, trace_attributes
from inferflux.server.http.context import CONTEXT, INFO, RequestInfo
from inferflux.server.http.credentials import identify
from inferflux.server.http.limits import count_request
from inferflux.server.http.problems import problem_of

logger = logging.getLogger(__name__)

PUBLIC: Final = "public"
CLIENT_GONE = 499
REQUEST_ID_HEADER = "x-request-id"
SERVER_NAME = "InferFlux"

# Scope by (method, path template): what is not in it is nobody's to call.
SCOPES: web.AppKey[Mapping[tuple[str, str], Scope | str]] = web.AppKey("scopes", Mapping)

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_QUIET_PATHS = frozenset(("/livez", "/health", "/readyz", "/healthz", "/metrics"))


def request_id(offered: str | None) -> str:
    """Returns the caller's request id if it is a sane one, else a new one."""
    return offered if offered and _SANE_ID.fullmatch(offered) else f"req_{uuid.uuid4().hex}"


@web.middleware
async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Gives the request its id, and counts and logs how it ended."""
    context = request.app[CONTEXT]
    started = time.monotonic()
    info = RequestInfo(
        id=request_id(request.headers.get(REQUEST_ID_HEADER)),
        started=started,
        deadline=started + context.config.server.request_timeout_s,
        method=request.method,
        endpoint=route_template(request) or "other",
        address=request.remote,
    )
    request[INFO] = info
    if context.tracing is not None and request.path not in _QUIET_PATHS:
        info.trace = context.tracing.begin(f"{request.method} {info.endpoint}", request.headers)
    status = CLIENT_GONE
    try:
        response = await handler(request)
        status = info.outcome or response.status
        return response
    finally:
        info.held.close()
        seconds = time.monotonic() - started
        context.metrics.requests.labels(info.endpoint, info.model, str(status)).inc()
        context.metrics.request_duration.labels(info.endpoint).observe(seconds)
        if request.path not in _QUIET_PATHS:
            record_request(context, request_event(info, status))
        _log(request, info, status, seconds)
        if info.trace is not None:
            info.trace.end(status, trace_attributes(info))


@web.middleware
async def shape_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns whatever goes wrong before an answer has begun into an error answer."""
    try:
        return await handler(request)
    except Exception as error:
        info = request[INFO]
        problem = problem_of(error, info.id)
        if problem.unexpected:
            logger.exception("%s failed", info.endpoint, extra={"request_id": info.id})
        elif problem.status == web.HTTPInternalServerError.status_code:
            logger.error("%s failed: %s", info.endpoint, error, extra={"request_id": info.id})
        if problem.denial is not None:
            info.decision = f"denied:{problem.denial}"
        info.response = ()
        if problem.limit is not None:
            request.app[CONTEXT].metrics.rate_limited.labels(problem.limit).inc()
        return problem.response()


@web.middleware
async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuses callers without the route's scope, and every caller of a route that declares none."""
    if request.match_info.http_exception is not None:
        return await handler(request)  # no such route: the handler says so
    scope = request.app[SCOPES].get((request.method, route_template(request) or ""))
    if scope == PUBLIC:
        return await handler(request)
    principal = await identify(request)
    request[INFO].principal = principal
    count_request(request, principal)
    match scope:
        case "generate" | "read" | "admin":
            principal.require(scope)
        case _:
            raise ScopeError("this URL is not open to any caller")
    return await handler(request)


def route_template(request: web.Request) -> str | None:
    """Returns the matched route's path with its placeholders; None when no route matched."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else None


def _log(request: web.Request, info: RequestInfo, status: int, seconds: float) -> None:
    """Names the route, not the URL, in which a caller may have put what belongs in no log."""
    level = logging.DEBUG if request.path in _QUIET_PATHS else logging.INFO
    if not logger.isEnabledFor(level):
        return
    caller = info.principal.id if info.principal is not None else "-"
    logger.log(
        level,
        "%s %s %d %.3f s by %s",
        request.method,
        info.endpoint,
        status,
        seconds,
        caller,
        extra={"request_id": info.id},
    )
