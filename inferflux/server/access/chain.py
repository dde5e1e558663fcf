"""The authentication chain: each way of proving who one is gets its turn.

A way answers None for a credential that is not its own, and raises AuthenticationError for one that is its own and
bad; so API keys and tokens of an identity provider compose without knowing each other. Knows no HTTP.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from inferflux.config import Config
from inferflux.server.access.jwks import Fetch, ProviderKeys
from inferflux.server.access.key_record import KeyRecord
from inferflux.server.access.key_ring import KeyRing
from inferflux.server.access.oidc import OidcTokens
from inferflux.server.access.principal import ANONYMOUS, AuthenticationError, Principal, tenant_salt

ANONYMOUS_TENANT = "anonymous"


class Authenticator(Protocol):
    async def authenticate(self, token: str) -> Principal | None:
        """Returns who the token belongs to, None when it is not this way's. Raises AuthenticationError."""
        ...


class AuthenticationChain:
    """ways: tried in order. anonymous: the principal of callers without a credential; None: they are refused.

    Without any way (no key configured) a credential proves nothing, and its bearer is as anonymous as one without:
    clients that insist on sending some key work against a server that asks for none.
    """

    def __init__(self, ways: Sequence[Authenticator], anonymous: Principal | None) -> None:
        self._ways = tuple(ways)
        self._anonymous = anonymous

    async def authenticate(self, token: str | None) -> Principal:
        """Returns the caller. Raises AuthenticationError when the credential is missing, unknown or bad."""
        if token is None or not self._ways:
            if self._anonymous is None:
                raise AuthenticationError("an API key is required: send it as Authorization: Bearer KEY", "missing")
            return self._anonymous
        for way in self._ways:
            principal = await way.authenticate(token)
            if principal is not None:
                return principal
        raise AuthenticationError("the API key is not known", "unknown")


def build_chain(config: Config, records: Callable[[], tuple[KeyRecord, ...]], fetch: Fetch) -> AuthenticationChain:
    """Returns the chain the configuration asks for: API keys, then tokens of the identity provider.

    records: returns the API keys in force (see KeyRing). Only a server that is open to anybody and has neither a key
    nor a provider at its start does without ways: there any credential is as good as none, and nobody could make a key.
    """
    auth = config.auth
    shared_cache = config.runtime.prefix_cache.isolation == "shared"
    keys = KeyRing(records, shared_cache=shared_cache)
    ways: list[Authenticator] = []
    if keys or auth.oidc_issuer is not None or not auth.allow_anonymous:
        ways.append(keys)
    if auth.oidc_issuer is not None:
        ways.append(OidcTokens(auth, ProviderKeys(auth.oidc_issuer, fetch), shared_cache=shared_cache))
    return AuthenticationChain(ways, anonymous(shared_cache) if auth.allow_anonymous else None)


def anonymous(shared_cache: bool = False) -> Principal:
    """Returns the principal of an unknown caller: may read and generate, never administer."""
    return Principal(
        id=ANONYMOUS,
        name="anonymous",
        tenant=ANONYMOUS_TENANT,
        scopes=frozenset(("generate", "read")),
        salt=b"" if shared_cache else tenant_salt(ANONYMOUS_TENANT),
    )
