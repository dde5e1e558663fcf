"""What handlers find on the application and on a request: typed keys, one value each.

Filled by `app` and `middleware`; holds references, does nothing.
"""

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from inferflux.config import Config
from inferflux.server.access.attempts import FailedAttempts
from inferflux.server.access.bucket import Allowance
from inferflux.server.access.chain import AuthenticationChain
from inferflux.server.access.principal import Principal
from inferflux.server.access.rate_limit import LimitKind, RateLimiter
from inferflux.server.admission import Admission
from inferflux.server.audit import AuditLog, UnauthenticatedRequests
from inferflux.server.backends import BackendManager
from inferflux.server.metrics import Metrics
from inferflux.server.models.models import Models
from inferflux.server.policy.gate import Gate
from inferflux.server.policy.store import PolicyStore
from inferflux.server.text_work import TextWork
from inferflux.server.tracing import RequestTrace, Tracing


@dataclass(frozen=True)
class ServerContext:
    """All the server's rooms. bulk_work: for large bodies and answers, behind which no other text should wait.
    started: `time.monotonic()` of the server's start. guardrails_turn: held while the guardrails are changed.
    background: changes that may outlast the request that asked for them."""

    config: Config
    models: Models
    access: AuthenticationChain
    admission: Admission
    metrics: Metrics
    text_work: TextWork
    bulk_work: TextWork
    policy: PolicyStore
    gate: Gate
    unauthenticated: UnauthenticatedRequests
    audit: AuditLog | None = None
    tracing: Tracing | None = None
    guardrails_turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    background: set[asyncio.Task[Any]] = field(default_factory=set)
    limiter: RateLimiter = field(default_factory=RateLimiter)
    attempts: FailedAttempts = field(default_factory=FailedAttempts)
    started: float = field(default_factory=time.monotonic)

    @property
    def backends(self) -> BackendManager:
        return self.models.backends


@dataclass(slots=True)
class RequestInfo:
    """What is known of one request while it is answered.

    id: the `x-request-id` of its response. started, deadline: `time.monotonic()` times. endpoint: the route's
    template. address: of the connection's other end. principal: set by authentication. model: the label of the model
    it asks for; adapter: the one of that name, None: it is a model's. outcome: the status to count and log when it is
    not the response's own (a stream that failed midway). allowances: what is left of the limits that count for it.
    decision: whether it was let pass, for the audit log, as are the texts and their tokens: prompt, those the caller
    sent; response, those that were sent back. held: what it keeps in use until it has been answered. num_body_bytes: of
    the body, once it has been read. shape: the field that says what the answer must look like.
    """

    id: str
    started: float
    deadline: float
    method: str
    endpoint: str
    address: str | None = None
    principal: Principal | None = None
    model: str = ""
    adapter: str | None = None
    outcome: int | None = None
    decision: str = "allowed"
    prompt: tuple[str, ...] = ()
    response: tuple[str, ...] = ()
    num_body_bytes: int = 0
    shape: str | None = None
    num_prompt_tokens: int | None = None
    num_completion_tokens: int | None = None
    allowances: dict[LimitKind, Allowance] = field(default_factory=dict)
    trace: RequestTrace | None = None
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


CONTEXT = web.AppKey("context", ServerContext)
INFO = web.RequestKey("info", RequestInfo)
OPENAPI = web.AppKey("openapi", bytes)
