"""KeyRecord: what the server keeps of one API key. Never the key itself, only its SHA-256.

A word shared by those who make keys (`key_generation`), who keep them (`policy.document`) and who look them up
(`key_ring`). Knows no file and no HTTP.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from inferflux.config.tree import ApiKeyConfig, Positive, Scope, SecretSha256, Text
from inferflux.server.access.key_generation import digest_of

PREFIX_LENGTH = 8
_LONG_ENOUGH_FOR_A_PREFIX = 32

KeyId = Annotated[str, Meta(pattern=r"^key_[0-9a-f]{12}$")]


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One API key.

    id: names it in lists, logs and when it is revoked. prefix: how the key begins, for people who search for it; may
    be empty. digest: hex SHA-256 of the key. tenant: whose caches and budgets count. rate_limit_per_minute,
    tokens_per_minute: its own limits, None for the server's. created: Unix time in seconds.
    """

    id: KeyId
    prefix: Annotated[str, Meta(max_length=32)]
    digest: SecretSha256
    name: Text
    tenant: Text
    scopes: Annotated[tuple[Scope, ...], Meta(min_length=1)]
    rate_limit_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    max_priority: int = 0
    created: Annotated[int, Meta(ge=0)]


def record_of(entry: ApiKeyConfig, created: int) -> KeyRecord:
    """Returns the record of a key that the configuration names. A key without a tenant is a tenant of its own."""
    key = entry.key or ""
    digest = entry.key_sha256 or digest_of(key)
    key_id = f"key_{digest[:12]}"
    return KeyRecord(
        id=key_id,
        prefix=key[:PREFIX_LENGTH] if len(key) >= _LONG_ENOUGH_FOR_A_PREFIX else "",
        digest=digest,
        name=entry.name or key_id,
        tenant=entry.tenant or key_id,
        scopes=entry.scopes,
        rate_limit_per_minute=entry.rate_limit_per_minute,
        tokens_per_minute=entry.tokens_per_minute,
        max_priority=entry.max_priority,
        created=created,
    )
