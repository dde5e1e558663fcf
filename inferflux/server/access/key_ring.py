"""Looks API keys up among the records in force, whichever those are at the moment of asking.

A way of the authentication chain. The records come from a function, so a key revoked in the policy store is unknown
to the next request. Knows no HTTP and no file.
"""

import hmac
from collections.abc import Callable

from inferflux.server.access.key_generation import digest_of, is_generated
from inferflux.server.access.key_record import KeyRecord
from inferflux.server.access.principal import Principal, tenant_salt

_INDEX_DIGITS = 16


class KeyRing:
    """records: returns the records in force; a new tuple whenever they change, never one changed in place.

    shared_cache: all tenants share cached prefixes (runtime.prefix_cache.isolation: shared).
    """

    def __init__(self, records: Callable[[], tuple[KeyRecord, ...]], *, shared_cache: bool = False) -> None:
        self._records = records
        self._shared_cache = shared_cache
        self._indexed: tuple[KeyRecord, ...] = ()
        self._index: dict[str, list[tuple[str, Principal]]] = {}

    def __len__(self) -> int:
        return len(self._records())

    async def authenticate(self, token: str) -> Principal | None:
        """Returns who holds this key, or None for a token that is no key of ours.

        A record is found by the first digits of the key's digest and the whole digest compared in constant time. What
        an attacker could learn from the time of the first step is about SHA-256 sums, which nobody can steer.
        """
        if self._records() is not self._indexed:
            self._build_index()
        digest = digest_of(token)
        found = None
        for known, principal in self._index.get(digest[:_INDEX_DIGITS], ()):
            if hmac.compare_digest(known, digest):
                found = principal
        return found

    def _build_index(self) -> None:
        self._indexed = self._records()
        self._index = {}
        for record in self._indexed:
            entry = (record.digest, _principal(record, self._shared_cache))
            self._index.setdefault(record.digest[:_INDEX_DIGITS], []).append(entry)


def _principal(record: KeyRecord, shared_cache: bool) -> Principal:
    return Principal(
        id=record.id,
        name=record.name,
        tenant=record.tenant,
        scopes=frozenset(record.scopes),
        max_priority=record.max_priority,
        salt=b"" if shared_cache else tenant_salt(record.tenant),
        requests_per_minute=record.rate_limit_per_minute,
        tokens_per_minute=record.tokens_per_minute,
        unguessable=is_generated(record.prefix),
    )
