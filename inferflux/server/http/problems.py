"""From an error to what the client sees of it: status, body, headers. The only place that knows both sides."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import msgspec
from aiohttp import web

from inferflux.errors import EngineDeadError, EngineError, RequestError
from inferflux.server.access.attempts import TooManyAttemptsError
from inferflux.server.access.principal import AuthenticationError, ScopeError
from inferflux.server.access.rate_limit import RateLimitedError
from inferflux.server.audit import AuditError
from inferflux.server.errors import (
    BusyError,
    ChangedMeanwhileError,
    NotReadyError,
    SlowBodyError,
    SupersededError,
    UnknownModelError,
)
from inferflux.server.http.schemas.errors import ErrorBody, ErrorDetail
from inferflux.server.policy.document import LastAdminKeyError, UnknownKeyError
from inferflux.server.policy.gate import GuardrailBlockedError
from inferflux.server.policy.store_file import PolicyPersistError

RETRY_ENGINE_S = 2
RETRY_ENGINE: Final = MappingProxyType({"Retry-After": str(RETRY_ENGINE_S)})
_INVALID = "invalid_request_error"
_BAD_CREDENTIAL: Final = frozenset(("unknown", "invalid", "expired"))


@dataclass(frozen=True)
class Problem:
    """An error answer. unexpected: our own mistake, to be logged with its traceback. limit: which limit was reached, in
    one of a few words for metrics. denial: why the caller may not, in such a word for the audit log."""

    status: int
    message: str
    type: str = _INVALID
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    unexpected: bool = False
    limit: str | None = None
    denial: str | None = None

    def body(self) -> bytes:
        # A header's bytes that are no UTF-8 come as lone surrogates, which JSON cannot have.
        message = self.message.encode(errors="backslashreplace").decode()
        return msgspec.json.encode(ErrorBody(ErrorDetail(message, self.type, self.param, self.code)))

    def response(self) -> web.Response:
        return web.Response(status=self.status, body=self.body(), content_type="application/json", headers=self.headers)


def problem_of(error: BaseException, request_id: str) -> Problem:
    """Returns the answer for the client. An unexpected error is a 500 that gives nothing but the request's id."""
    match error:
        case RequestError():
            return Problem(400, str(error), param=error.param, code=error.code)
        case RecursionError():
            # Only what a caller sends is nested without bound; what the body's reader just took can be too deep later.
            return Problem(400, "the body is nested too deeply")
        case AuthenticationError():
            return _unauthenticated(error)
        case ScopeError():
            code, headers = "insufficient_scope", _challenge("insufficient_scope")
            return Problem(403, str(error), "permission_error", code=code, headers=headers, denial="scope")
        case GuardrailBlockedError():
            return Problem(403, str(error), "permission_error", code=error.code, denial=error.reason)
        case UnknownModelError():
            return Problem(404, str(error), param="model", code="model_not_found")
        case BusyError():
            return _too_many(str(error), "queue_full", error.retry_after_s, "queue_full")
        case RateLimitedError():
            return _too_many(str(error), "rate_limit_exceeded", error.retry_after_s, error.kind)
        case TooManyAttemptsError():
            return _too_many(str(error), "too_many_attempts", error.retry_after_s, "attempts")
        case UnknownKeyError():
            return Problem(404, str(error), param="id", code="key_not_found")
        case LastAdminKeyError():
            return Problem(409, str(error), param="id", code="last_admin_key")
        case PolicyPersistError():
            return Problem(500, str(error), "server_error", code="policy_persist_failed")
        case AuditError():
            return Problem(500, str(error), "server_error", code="audit_failed")
        case SupersededError():
            return Problem(409, str(error), code="superseded")
        case ChangedMeanwhileError():
            return Problem(412, str(error), code="precondition_failed")
        case NotReadyError():
            return _unavailable(str(error), error.reason)
        case EngineDeadError():
            return _unavailable(f"the engine was lost: {error}", "engine_lost")
        case EngineError():
            return Problem(500, str(error), "server_error", code="engine_error")
        case SlowBodyError():
            return Problem(408, str(error), "timeout_error", code="body_timeout")
        case TimeoutError() | asyncio.TimeoutError():
            return Problem(
                408, "the request took longer than server.request_timeout_s", "timeout_error", code="timeout"
            )
        case web.HTTPException():
            return _http_problem(error)
        case web.RequestPayloadError():
            return Problem(400, f"the body cannot be read: {error}")
    return internal_problem(request_id)


def internal_problem(request_id: str) -> Problem:
    message = f"internal error; the server's log has it under request id {request_id}"
    return Problem(500, message, "server_error", code="internal_error", unexpected=True)


def _unauthenticated(error: AuthenticationError) -> Problem:
    headers = _challenge("invalid_token" if error.reason in _BAD_CREDENTIAL else None)
    kind, code = "authentication_error", "invalid_api_key"
    return Problem(401, str(error), kind, code=code, headers=headers, denial="unauthenticated")


def _challenge(error: str | None) -> Mapping[str, str]:
    """RFC 6750, section 3. error: what is wrong with the credential; None when there was none to judge."""
    return {"WWW-Authenticate": 'Bearer realm="inferflux"' + (f', error="{error}"' if error is not None else "")}


def _too_many(message: str, code: str, retry_after_s: int, limit: str) -> Problem:
    headers = {"Retry-After": str(retry_after_s)}
    return Problem(429, message, "rate_limit_error", code=code, headers=headers, limit=limit, denial=limit)


def _unavailable(message: str, code: str) -> Problem:
    return Problem(503, message, "server_error", code=code, headers=RETRY_ENGINE)


def _http_problem(error: web.HTTPException) -> Problem:
    """aiohttp's own refusals: no such URL, wrong method, body too large and the like."""
    headers = {name: value for name, value in error.headers.items() if name in ("Allow", "Location")}
    match error:
        case web.HTTPRequestEntityTooLarge():
            return Problem(413, "the body is larger than server.max_body_mb", code="body_too_large")
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            message = f"{error.method} is not allowed here; allowed: {allowed}"
            return Problem(405, message, code="method_not_allowed", headers=headers)
        case web.HTTPNotFound():
            return Problem(404, "no such URL", code="not_found")
    return Problem(error.status, error.reason.lower(), headers=headers)
