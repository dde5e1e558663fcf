"""Principal: who asks, which tenant they belong to and what they may do.

Values and errors only: how a caller proves who they are is the work of `chain` and its ways. Knows no HTTP.
"""

import hashlib
from dataclasses import dataclass
from typing import Final, Literal

from inferflux.config.tree import Scope
from inferflux.errors import InferFluxError

ANONYMOUS: Final = "anonymous"
FailureReason = Literal["missing", "malformed", "unknown", "invalid", "expired", "unavailable"]


class AuthenticationError(InferFluxError):
    """The caller is not known. `reason` says why in one of a few words, for metrics."""

    def __init__(self, message: str, reason: FailureReason) -> None:
        super().__init__(message)
        self.reason = reason


class ScopeError(InferFluxError):
    """The caller is known and may not do this."""


@dataclass(frozen=True, slots=True)
class Principal:
    """id: stable and safe to log. tenant: whose caches, budgets and queues count. max_priority: the highest
    `priority` a request of theirs gets. salt: separates their cached prefixes from other tenants'.
    requests_per_minute, tokens_per_minute: limits of their own; None for the server's. unguessable: they proved
    themselves with a secret of ours or a signature, which nobody finds by trying."""

    id: str
    name: str
    tenant: str
    scopes: frozenset[Scope]
    max_priority: int = 0
    salt: bytes = b""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    unguessable: bool = False

    def require(self, scope: Scope) -> None:
        """Raises ScopeError when `scope` is not among the caller's."""
        if scope not in self.scopes:
            raise ScopeError(f'{self._called} lacks the scope "{scope}"')

    @property
    def _called(self) -> str:
        return "a caller without a key" if self.id == ANONYMOUS else "this key"

    def cache_salt(self, requested: str | None) -> bytes:
        """Returns the salt of one request: the tenant's own, narrowed further by the one the request asks for.

        No value of `requested` leads into another tenant's name space: the tenant's salt has a fixed length.
        """
        return cache_salt(self.salt, requested)


def cache_salt(salt: bytes, requested: str | None) -> bytes:
    """Returns a tenant's salt, narrowed by the one that a request asks for."""
    if not requested:
        return salt
    return hashlib.sha256(salt.ljust(hashlib.sha256().digest_size, b"\0") + requested.encode()).digest()


def tenant_salt(tenant: str) -> bytes:
    """Returns the salt that keeps one tenant's cached prefixes from all others'."""
    return hashlib.sha256(b"inferflux tenant\0" + tenant.encode()).digest()
