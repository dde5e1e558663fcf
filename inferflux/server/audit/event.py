"""AuditEvent: what the server tells the audit log about a request or a change, and the record made of it.

Texts become keyed digests here, unless the operator asked for the texts themselves. Knows no file.
"""

import hmac
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Final, Literal

import msgspec

from inferflux.server.audit.file import Record, timestamp
from inferflux.server.audit.keys import AuditKeys

# Of what callers choose themselves: a model's name in a refused request may be as long as a body.
MAX_NAME_CHARS: Final = 256


class AuditEvent(msgspec.Struct, frozen=True, kw_only=True):
    """caller: a key's id or a token's subject; None: unknown. address: where the connection comes from. method: HTTP's;
    None: it could not be read. decision: such as `allowed`, `denied:blocklist`, `denied:unauthenticated`. prompt: every
    text the caller sent; response: every text that was sent back. change: for an administrator's change, what it was,
    without secrets."""

    kind: Literal["request", "admin"] = "request"
    request_id: str
    route: str
    decision: str
    status: int
    caller: str | None = None
    address: str | None = None
    method: str | None = None
    tenant: str | None = None
    model: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt: tuple[str, ...] = ()
    response: tuple[str, ...] = ()
    change: Mapping[str, Any] | None = None

    @property
    def num_chars(self) -> int:
        """Roughly what the event holds in memory."""
        return sum(map(len, self.prompt)) + sum(map(len, self.response))


class OmittedRequests(msgspec.Struct, frozen=True):
    """Requests of unknown senders that were too many for a line each. statuses: how many of them ended with which."""

    statuses: Mapping[int, int]
    num_chars: ClassVar[int] = 0


def record_of(event: AuditEvent | OmittedRequests, seconds: float, keys: AuditKeys, *, with_text: bool) -> Record:
    """Returns the event as it stands in the log. seconds: Unix time of the event. Members without a value are left
    out."""
    if isinstance(event, OmittedRequests):
        statuses = {str(status): count for status, count in sorted(event.statuses.items())}
        count = sum(event.statuses.values())
        return Record("omitted", {"time": timestamp(seconds), "count": count, "statuses": statuses})
    fields = {
        "time": timestamp(seconds),
        "request_id": _short(event.request_id),
        "caller": _short(event.caller),
        "address": _short(event.address),
        "tenant": _short(event.tenant),
        "method": _short(event.method),
        "route": _short(event.route),
        "model": _short(event.model),
        "decision": _short(event.decision),
        "status": event.status,
        "prompt_tokens": event.prompt_tokens,
        "completion_tokens": event.completion_tokens,
        "prompt_hmac": text_digest(event.prompt, keys) if event.prompt else None,
        "response_hmac": text_digest(event.response, keys) if event.response else None,
        "prompt": event.prompt if with_text and event.prompt else None,
        "response": event.response if with_text and event.response else None,
        "change": event.change,
    }
    return Record(event.kind, {name: value for name, value in fields.items() if value is not None})


def text_digest(texts: Iterable[str], keys: AuditKeys) -> str:
    """Returns the HMAC-SHA256, in hexadecimal, of the texts: of each its length in UTF-8 (8 bytes, big-endian) and its
    UTF-8."""
    pieces: list[bytes] = []
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        pieces += (len(data).to_bytes(8, "big"), data)
    return hmac.digest(keys.text, b"".join(pieces), "sha256").hex()


def _short(text: str | None) -> str | None:
    return text[:MAX_NAME_CHARS] if text is not None else None
