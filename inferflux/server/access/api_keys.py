"""API keys: a secret the caller sends, looked up by its SHA-256.

The secrets themselves are not kept. Looking a digest up takes a time that depends on the digest, from which nothing
about other keys can be learnt: an attacker would have to steer SHA-256's output. Knows no HTTP.
"""

import hashlib
from collections.abc import Iterable

from inferflux.config.tree import ApiKeyConfig
from inferflux.server.access.principal import Principal, tenant_salt

ID_HEX_DIGITS = 12


class ApiKeys:
    """The known keys. One way of the authentication chain: answers a Principal, or None for a token not its own."""

    def __init__(self, entries: Iterable[ApiKeyConfig], *, shared_cache: bool = False) -> None:
        """shared_cache: all tenants share cached prefixes (runtime.prefix_cache.isolation: shared)."""
        self._principals: dict[bytes, Principal] = {}
        for entry in entries:
            digest = _digest_of(entry)
            self._principals[digest] = _principal(entry, digest, shared_cache)

    def __len__(self) -> int:
        return len(self._principals)

    async def authenticate(self, token: str) -> Principal | None:
        return self._principals.get(hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest())


def _digest_of(entry: ApiKeyConfig) -> bytes:
    if entry.key_sha256 is not None:
        return bytes.fromhex(entry.key_sha256)
    assert entry.key is not None, "the configuration demands one of key and key_sha256"
    return hashlib.sha256(entry.key.encode()).digest()


def _principal(entry: ApiKeyConfig, digest: bytes, shared_cache: bool) -> Principal:
    """A key without a tenant is a tenant of its own: two strangers never share a cache by default."""
    key_id = f"key_{digest.hex()[:ID_HEX_DIGITS]}"
    tenant = entry.tenant or key_id
    return Principal(
        id=key_id,
        name=entry.name or key_id,
        tenant=tenant,
        scopes=frozenset(entry.scopes),
        max_priority=entry.max_priority,
        salt=b"" if shared_cache else tenant_salt(tenant),
    )
