"""The keys of an identity provider: found by OpenID Connect discovery, cached, fetched again with restraint.

Keys are fetched again every quarter of an hour, and when a token names one that is not known, at most once in
COOLDOWN_S however many tokens do. While the provider cannot be reached, known keys go on until MAX_AGE_S after they
were last confirmed. Only RSA keys for RS256 and P-256 keys for ES256 are taken, of a size that is neither weak nor
costly. Takes a fetcher and a clock; knows no HTTP. Lives on one event loop.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from msgspec import Meta

from inferflux.config.urls import is_safe_url
from inferflux.errors import InferFluxError

logger = logging.getLogger(__name__)

Fetch = Callable[[str, int], Awaitable[bytes]]
"""`await fetch(url, max_bytes)`: the body of a 200 answer of at most that size. Follows no redirect, takes bounded
time, checks certificates. Raises FetchError or OSError for anything else."""

COOLDOWN_S: Final = 15.0
REFRESH_S: Final = 900.0
MAX_AGE_S: Final = 6 * 3600.0
MAX_DISCOVERY_BYTES: Final = 65_536
MAX_JWKS_BYTES: Final = 262_144
MAX_KEYS: Final = 128
_MIN_RSA_BITS: Final = 2048
_MAX_RSA_BITS: Final = 8192
_MAX_RSA_EXPONENT: Final = 2**32


class FetchError(InferFluxError):
    """A document could not be fetched."""


class ProviderUnavailableError(InferFluxError):
    """No key can be looked up: the identity provider was not reached, for too long or never."""


class _Discovery(msgspec.Struct, frozen=True):
    issuer: str
    jwks_uri: Annotated[str, Meta(max_length=2048)]


class _Jwks(msgspec.Struct, frozen=True):
    keys: Annotated[list[dict[str, Any]], Meta(max_length=MAX_KEYS)]


class ProviderKeys:
    """One provider's signing keys by (key id, algorithm).

    clock: seconds, never going back; it measures ages only.
    """

    def __init__(self, issuer: str, fetch: Fetch, clock: Callable[[], float] = time.monotonic) -> None:
        self._issuer = issuer
        self._fetch = fetch
        self._clock = clock
        self._keys: Mapping[tuple[str, str], jwt.PyJWK] = {}
        self._confirmed: float | None = None
        self._tried: float | None = None
        self._refreshing: asyncio.Task[None] | None = None

    async def find(self, key_id: str, algorithm: str) -> jwt.PyJWK | None:
        """Returns the key; None when the provider has no such key for such an algorithm.

        Known keys are returned without waiting for the provider. Raises ProviderUnavailableError.
        """
        key = self._known(key_id, algorithm)
        if key is not None:
            if self._age() > REFRESH_S:
                self._start_refresh()
            return key
        task = self._start_refresh()
        if task is not None:
            await asyncio.shield(task)
        key = self._known(key_id, algorithm)
        if key is None and self._last_try_failed():
            raise ProviderUnavailableError("the identity provider cannot be reached")
        return key

    def _known(self, key_id: str, algorithm: str) -> jwt.PyJWK | None:
        return self._keys.get((key_id, algorithm)) if self._age() <= MAX_AGE_S else None

    def _age(self) -> float:
        """Seconds since the keys were last confirmed."""
        return float("inf") if self._confirmed is None else self._clock() - self._confirmed

    def _last_try_failed(self) -> bool:
        return self._tried is not None and (self._confirmed is None or self._confirmed < self._tried)

    def _start_refresh(self) -> "asyncio.Task[None] | None":
        """Returns the refresh that runs, a new one if it is time for one, else None."""
        if self._refreshing is not None:
            return self._refreshing
        if self._tried is not None and self._clock() - self._tried < COOLDOWN_S:
            return None
        self._tried = self._clock()
        self._refreshing = asyncio.create_task(self._refresh())
        return self._refreshing

    async def _refresh(self) -> None:
        try:
            keys = read_keys(await self._fetch_jwks())
        except (InferFluxError, OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            logger.warning("the keys of %s cannot be fetched: %s", self._issuer, str(error) or type(error).__name__)
        else:
            self._keys = keys
            self._confirmed = self._tried = self._clock()
        finally:
            self._refreshing = None

    async def _fetch_jwks(self) -> bytes:
        url = self._issuer.removesuffix("/") + "/.well-known/openid-configuration"
        discovery = msgspec.json.decode(await self._fetch(url, MAX_DISCOVERY_BYTES), type=_Discovery)
        if discovery.issuer != self._issuer:
            raise FetchError(f'its discovery document names another issuer ("{discovery.issuer[:200]}")')
        if not is_safe_url(discovery.jwks_uri) or urlsplit(discovery.jwks_uri).scheme != urlsplit(self._issuer).scheme:
            raise FetchError("its jwks_uri is not an https URL")
        return await self._fetch(discovery.jwks_uri, MAX_JWKS_BYTES)


def read_keys(content: bytes) -> Mapping[tuple[str, str], jwt.PyJWK]:
    """Returns the usable keys of a JSON Web Key Set (RFC 7517); others are passed over.

    Raises msgspec.MsgspecError for what is no key set, FetchError when two usable keys have one name.
    """
    keys: dict[tuple[str, str], jwt.PyJWK] = {}
    for entry in msgspec.json.decode(content, type=_Jwks).keys:
        key_id, algorithm = entry.get("kid"), _algorithm_of(entry)
        if not isinstance(key_id, str) or algorithm is None:
            continue
        try:
            key = jwt.PyJWK(entry, algorithm)
        except (jwt.PyJWTError, ValueError, TypeError, KeyError):
            continue
        if not _is_sound(key.key):
            continue
        if (key_id, algorithm) in keys:
            raise FetchError("two of its keys have the same kid")
        keys[key_id, algorithm] = key
    return keys


def _algorithm_of(entry: Mapping[str, Any]) -> str | None:
    """The one algorithm a key is taken for, by its type alone; None when it is for another one or not for signing.

    None also for a private key: who publishes one cannot be trusted with it.
    """
    if "d" in entry:
        return None
    algorithm = {"RSA": "RS256", "EC": "ES256"}.get(str(entry.get("kty")))
    if entry.get("alg", algorithm) != algorithm or entry.get("use", "sig") != "sig":
        return None
    operations = entry.get("key_ops", ["verify"])
    return algorithm if isinstance(operations, list) and "verify" in operations else None


def _is_sound(key: object) -> bool:
    """A public key of a size that is neither weak nor costly."""
    if isinstance(key, RSAPublicKey):
        exponent = key.public_numbers().e
        return _MIN_RSA_BITS <= key.key_size <= _MAX_RSA_BITS and exponent < _MAX_RSA_EXPONENT
    return isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1)
