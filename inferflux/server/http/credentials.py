"""Who sends a request: reads the credential, asks the authentication chain, and slows down those who guess."""

from typing import Final

from aiohttp import hdrs, web
from multidict import CIMultiDictProxy

from inferflux.server.access.attempts import FailedAttempts, TooManyAttemptsError
from inferflux.server.access.principal import AuthenticationError, Principal
from inferflux.server.http.context import CONTEXT

API_KEY_HEADER: Final = "x-api-key"
# As much as fits into one header line; access tokens of identity providers get long.
MAX_TOKEN_LENGTH: Final = 8190

# Characters that nobody finds by trying: 128 bits in hexadecimal.
UNGUESSABLE_LENGTH: Final = 32

# Failures that say nothing against the credential.
_NO_GUESS: Final = frozenset(("missing", "unavailable"))


async def identify(request: web.Request) -> Principal:
    """Returns who is asking. Raises AuthenticationError, TooManyAttemptsError."""
    context, address = request.app[CONTEXT], request.remote or ""
    token = refusal = None
    try:
        token = read_credential(request.headers)
        if token is not None:
            refusal = _refusal(context.attempts, address, token)
        principal = await context.access.authenticate(token)
    except AuthenticationError as error:
        context.metrics.auth_failures.labels(error.reason).inc()
        if token is not None and error.reason not in _NO_GUESS:
            context.attempts.failed(address, token)
        raise refusal or error from None
    if refusal is not None and not (principal.unguessable or len(token or "") >= UNGUESSABLE_LENGTH):
        raise refusal
    if token is not None:
        context.attempts.succeeded(address, token)
    return principal


def _refusal(attempts: FailedAttempts, address: str, token: str) -> TooManyAttemptsError | None:
    """Returns the refusal of an address with too many failed attempts, which holds unless the credential cannot be
    guessed; None: none."""
    try:
        attempts.check(address, token)
    except TooManyAttemptsError as error:
        return error
    return None


def read_credential(headers: CIMultiDictProxy[str]) -> str | None:
    """Returns the key the caller sent, in either of the two headers; None when there is none.

    Raises AuthenticationError when there is more than one, or when it cannot be read: guessing which of two keys is
    meant would let a proxy and this server disagree on who is asking.
    """
    authorizations = headers.getall(hdrs.AUTHORIZATION, [])
    keys = headers.getall(API_KEY_HEADER, [])
    if not authorizations and not keys:
        return None
    if len(authorizations) + len(keys) > 1:
        raise AuthenticationError("more than one API key was sent", "malformed")
    if authorizations:
        scheme, _, token = authorizations[0].strip().partition(" ")
        if scheme.lower() != "bearer":
            raise AuthenticationError("the Authorization header must read: Bearer KEY", "malformed")
    else:
        token = keys[0]
    token = token.strip()
    if not token or " " in token or len(token) > MAX_TOKEN_LENGTH:
        raise AuthenticationError("the API key is empty or not a single word", "malformed")
    return token
