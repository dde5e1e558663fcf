"""The audit log: one line per request and per administrator's change, chained so that what is altered shows."""

from inferflux.server.audit.errors import AuditError
from inferflux.server.audit.event import AuditEvent
from inferflux.server.audit.keys import key_path, open_keys
from inferflux.server.audit.log import AuditLog
from inferflux.server.audit.unauthenticated import UnauthenticatedRequests

__all__ = ["AuditError", "AuditEvent", "AuditLog", "UnauthenticatedRequests", "key_path", "open_keys"]
