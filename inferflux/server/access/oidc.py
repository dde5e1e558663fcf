"""OIDC: access tokens (JSON Web Tokens, RFC 7519 and 9068) of one identity provider, as a way of the chain.

A token must name one of the provider's keys, be signed with it by RS256 or ES256, come from exactly this issuer, be
meant for our audience, and be in its time. It grants only what the configuration maps its claims to. PyJWT checks the
signature and the names; the times are checked here, by a clock that is an argument. Knows no HTTP.
"""

import base64
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import jwt
import msgspec

from inferflux.config.tree import AuthConfig, Scope
from inferflux.server.access.jwks import ProviderKeys, ProviderUnavailableError
from inferflux.server.access.principal import AuthenticationError, FailureReason, Principal, tenant_salt

ALGORITHMS: Final = ("RS256", "ES256")
MAX_SKEW_S: Final = 60.0
MAX_TOKEN_LENGTH: Final = 16_384
_TYPES: Final = frozenset(("jwt", "at+jwt", "application/at+jwt"))
_MAX_KEY_ID_LENGTH: Final = 256
_MAX_SUBJECT_LENGTH: Final = 255
_MAX_TIME: Final = 1e12
_MAX_PROVEN: Final = 4096


class _Proven(NamedTuple):
    """What one token proves, by which key, and until when."""

    key: jwt.PyJWK
    expires: float
    principal: Principal


class OidcTokens:
    """clock: Unix time in seconds. shared_cache: all tenants share cached prefixes."""

    def __init__(
        self,
        auth: AuthConfig,
        keys: ProviderKeys,
        *,
        clock: Callable[[], float] = time.time,
        shared_cache: bool = False,
    ) -> None:
        assert auth.oidc_issuer is not None, "tokens of nobody"
        assert auth.oidc_audience is not None, "the configuration demands an audience with an issuer"
        self._issuer, self._audience = auth.oidc_issuer, auth.oidc_audience
        self._scope_claim = auth.oidc_scope_claim
        self._scope_map = auth.oidc_scope_map
        self._keys = keys
        self._clock = clock
        self._shared_cache = shared_cache
        self._proven: OrderedDict[bytes, _Proven] = OrderedDict()

    async def authenticate(self, token: str) -> Principal | None:
        """Returns whom the token names; None for what is no JSON Web Token. Raises AuthenticationError."""
        header = _read_header(token)
        if header is None:
            return None
        algorithm, key_id = header.get("alg"), header.get("kid")
        if algorithm not in ALGORITHMS:
            raise _refusal(f"the token is not signed with one of {', '.join(ALGORITHMS)}")
        if str(header.get("typ", "JWT")).lower() not in _TYPES:
            raise _refusal("the token is of another type than an access token")
        if not isinstance(key_id, str) or len(key_id) > _MAX_KEY_ID_LENGTH:
            raise _refusal("the token does not name its key (kid)")
        try:
            key = await self._keys.find(key_id, algorithm)
        except ProviderUnavailableError as error:
            raise _refusal(f"the token cannot be checked: {error}", "unavailable") from None
        if key is None:
            raise _refusal("the token is signed with a key that the identity provider does not have")
        proven = self._prove(token, key, algorithm)
        if self._clock() >= proven.expires + MAX_SKEW_S:
            raise _refusal("the token has expired", "expired")
        return proven.principal

    def _prove(self, token: str, key: jwt.PyJWK, algorithm: str) -> _Proven:
        """Returns what the token proves, checked once for as long as its key is the provider's."""
        digest = hashlib.sha256(token.encode("ascii")).digest()
        proven = self._proven.get(digest)
        if proven is None or proven.key is not key:
            claims = self._read_claims(token, key, algorithm)
            proven = self._proven[digest] = _Proven(key, self._check_times(claims), self._principal(claims))
            if len(self._proven) > _MAX_PROVEN:
                self._proven.popitem(last=False)
        self._proven.move_to_end(digest)
        return proven

    def _read_claims(self, token: str, key: jwt.PyJWK, algorithm: str) -> Mapping[str, Any]:
        try:
            # `_check_times` and `authenticate` check the times, by our own clock.
            claims: dict[str, Any] = jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                issuer=self._issuer,
                audience=self._audience,
                options={
                    "require": ["iss", "aud", "exp", "sub"],
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                },
            )
        except jwt.InvalidIssuerError:
            raise _refusal("the token is of another issuer") from None
        except (jwt.InvalidAudienceError, jwt.MissingRequiredClaimError):
            raise _refusal("the token is not meant for this server, or lacks one of iss, aud, exp, sub") from None
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
            raise _refusal("the token's signature is wrong, or the token is damaged") from None
        return claims

    def _check_times(self, claims: Mapping[str, Any]) -> float:
        """Returns when the token expires. Raises AuthenticationError while it is not valid yet."""
        for name in ("nbf", "iat"):
            if name in claims and self._clock() < _seconds(claims[name]) - MAX_SKEW_S:
                raise _refusal("the token is not valid yet")
        return _seconds(claims["exp"])

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        subject = claims["sub"]
        if not isinstance(subject, str) or not 0 < len(subject) <= _MAX_SUBJECT_LENGTH or not subject.isprintable():
            raise _refusal(f"the token's subject must be 1 to {_MAX_SUBJECT_LENGTH} printable characters")
        tenant = f"{self._issuer}#{subject}"
        return Principal(
            id=f"oidc_{hashlib.sha256(tenant.encode()).hexdigest()[:16]}",
            name=subject,
            tenant=tenant,
            scopes=self._scopes(claims),
            salt=b"" if self._shared_cache else tenant_salt(tenant),
            unguessable=True,
        )

    def _scopes(self, claims: Mapping[str, Any]) -> frozenset[Scope]:
        """What the mapping makes of the claim's words; a word that is not mapped grants nothing."""
        words = scope_words(claims, self._scope_claim)
        return frozenset(self._scope_map[word] for word in words if word in self._scope_map)


def scope_words(claims: Mapping[str, Any], path: str) -> Iterator[str]:
    """Yields the words of a claim: a string's, separated by spaces, or a list's strings.

    path: the claim's name, dots and all (`https://example.org/roles`), or where it is, by dots
    (`realm_access.roles`).
    """
    value: Any = claims
    if path in claims:
        value = claims[path]
    else:
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(value, str):
        yield from value.split(" ")
    elif isinstance(value, list):
        yield from (word for word in value if isinstance(word, str))


def _read_header(token: str) -> Mapping[str, Any] | None:
    """Returns the header, which proves nothing yet; None for what is not a signed JSON Web Token at all."""
    if token.count(".") != 2 or len(token) > MAX_TOKEN_LENGTH or not token.isascii():
        return None
    head = token.partition(".")[0]
    try:
        header = msgspec.json.decode(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return header if isinstance(header, dict) and "alg" in header else None


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _MAX_TIME:
        raise _refusal("the token's times must be seconds since 1970")
    return value


def _refusal(message: str, reason: FailureReason = "invalid") -> AuthenticationError:
    return AuthenticationError(message, reason)
