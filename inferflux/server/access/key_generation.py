"""New API keys: `iflx_<12 hex digits>_<43 characters>`, 256 bits of the system's randomness in the last part.

The middle part is the key's public name, so a key found somewhere it should not be can be told and revoked without
knowing the rest. Knows neither who asks for a key nor where records are kept.
"""

import hashlib
import re
import secrets
from typing import NamedTuple

_MARK = "iflx"
_NAME_BYTES = 6
_SECRET_BYTES = 32
_PREFIX = re.compile(rf"{_MARK}_[0-9a-f]{{{2 * _NAME_BYTES}}}")


class NewKey(NamedTuple):
    """key: the secret, to be shown once and then forgotten. id, prefix, digest: what to keep (see KeyRecord)."""

    key: str
    id: str
    prefix: str
    digest: str


def generate_key() -> NewKey:
    name = secrets.token_hex(_NAME_BYTES)
    prefix = f"{_MARK}_{name}"
    key = f"{prefix}_{secrets.token_urlsafe(_SECRET_BYTES)}"
    return NewKey(key=key, id=f"key_{name}", prefix=prefix, digest=digest_of(key))


def is_generated(prefix: str) -> bool:
    """Whether a key that begins so was made here; for keys that others made the prefix is shorter, or empty."""
    return _PREFIX.fullmatch(prefix) is not None


def digest_of(key: str) -> str:
    """Returns the hex SHA-256 of a key. A plain hash is right for 256 random bits: there is nothing to guess.

    Any text has a digest, also what arrived in a header as bytes that are no UTF-8.
    """
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
