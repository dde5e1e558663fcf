"""Writes the audit log's lines, one for each request when it has ended and one before each administrator's change; and
the attributes of traces, which are fewer."""

from collections.abc import Mapping
from typing import Any, Final

from inferflux.server.audit import AuditEvent
from inferflux.server.http.context import RequestInfo, ServerContext

NO_STATUS_YET: Final = 0
UNREADABLE: Final = "unreadable"


def record_request(context: ServerContext, event: AuditEvent) -> None:
    """Every request of a known caller has a line; those of unauthenticated as long as they are not too many."""
    if event.caller is None:
        context.unauthenticated.record(event)
    elif context.audit is not None:
        context.audit.record(event)


def request_event(info: RequestInfo, status: int) -> AuditEvent:
    principal = info.principal
    return AuditEvent(
        request_id=info.id,
        route=info.endpoint,
        decision=info.decision,
        status=status,
        caller=principal.id if principal is not None else None,
        address=info.address,
        method=info.method,
        tenant=principal.tenant if principal is not None else None,
        model=info.model or None,
        prompt_tokens=info.num_prompt_tokens,
        completion_tokens=info.num_completion_tokens,
        prompt=info.prompt,
        response=info.response,
    )


def unreadable_event(request_id: str, address: str | None, status: int) -> AuditEvent:
    """What is not HTTP: no middleware ever sees it, and who it was may matter all the same."""
    return AuditEvent(
        request_id=request_id, route=UNREADABLE, decision=f"denied:{UNREADABLE}", status=status, address=address
    )


def trace_attributes(info: RequestInfo) -> dict[str, str | int | None]:
    return {
        "http.request.method": info.method,
        "http.route": info.endpoint,
        "inferflux.request_id": info.id,
        "gen_ai.request.model": info.model,
        "gen_ai.usage.input_tokens": info.num_prompt_tokens,
        "gen_ai.usage.output_tokens": info.num_completion_tokens,
    }


def change_event(info: RequestInfo, what: Mapping[str, Any]) -> AuditEvent:
    """A change that is about to be made. How it went says the line of its request, which has the same request id."""
    assert info.principal is not None, "admin routes declare a scope"
    return AuditEvent(
        kind="admin",
        request_id=info.id,
        route=info.endpoint,
        decision="allowed",
        status=NO_STATUS_YET,
        caller=info.principal.id,
        address=info.address,
        method=info.method,
        tenant=info.principal.tenant,
        change=what,
    )
