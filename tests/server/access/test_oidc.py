"""Tokens of an identity provider: what is accepted, what is refused and why, what happens while it is down."""

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import Callable, Mapping
from typing import Any

import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from inferflux.config.tree import AuthConfig
from inferflux.server.access import oidc
from inferflux.server.access.jwks import (
    COOLDOWN_S,
    MAX_AGE_S,
    MAX_JWKS_BYTES,
    REFRESH_S,
    FetchError,
    ProviderKeys,
    read_keys,
)
from inferflux.server.access.oidc import MAX_SKEW_S, OidcTokens, scope_words
from inferflux.server.access.principal import AuthenticationError
from tests.support.waiting import PATIENCE_S, patience

ISSUER = "https://id.example.org/realm"
AUDIENCE = "inferflux"
NOW = 1_800_000_000.0
RSA_KEY = rsa.generate_private_key(65537, 2048)
OTHER_RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
AUTH = AuthConfig(
    oidc_issuer=ISSUER, oidc_audience=AUDIENCE, oidc_scope_map={"llm:use": "generate", "llm:admin": "admin"}
)

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


def algorithm_of(key: PrivateKey) -> str:
    return "RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256"


def jwk(key: PrivateKey, key_id: str, **more: object) -> dict[str, Any]:
    handler = jwt.get_algorithm_by_name(algorithm_of(key))
    return {**handler.to_jwk(key.public_key(), as_dict=True), "kid": key_id, "use": "sig", **more}


def claims(**changes: Any) -> dict[str, Any]:
    base = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": NOW + 300, "iat": NOW, "scope": "llm:use other"}
    return {name: value for name, value in {**base, **changes}.items() if value is not None}


def sign(payload: Mapping[str, Any], key: PrivateKey = RSA_KEY, key_id: str = "k1", **header: Any) -> str:
    return jwt.encode(dict(payload), key, algorithm_of(key), {"kid": key_id, **header})


def encode(part: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


class Provider:
    """An identity provider as a fetcher: counts fetches, rotates keys, goes down."""

    def __init__(self) -> None:
        self.keys: list[dict[str, Any]] = [jwk(RSA_KEY, "k1"), jwk(EC_KEY, "k2")]
        self.discovery: dict[str, Any] = {"issuer": ISSUER, "jwks_uri": "https://keys.example.org/jwks"}
        self.error: Exception | None = None
        self.fetched: list[str] = []
        self.hold: asyncio.Event | None = None

    async def fetch(self, url: str, max_bytes: int) -> bytes:
        self.fetched.append(url)
        if self.hold is not None:
            await self.hold.wait()
        if self.error is not None:
            raise self.error
        if url == ISSUER + "/.well-known/openid-configuration":
            return msgspec.json.encode(self.discovery)
        assert (url, max_bytes) == ("https://keys.example.org/jwks", MAX_JWKS_BYTES)
        return msgspec.json.encode({"keys": self.keys})

    @property
    def refreshes(self) -> int:
        return sum(url.endswith("openid-configuration") for url in self.fetched)


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def provider() -> Provider:
    return Provider()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tokens(provider: Provider, clock: Clock) -> OidcTokens:
    return OidcTokens(AUTH, ProviderKeys(ISSUER, provider.fetch, clock), clock=clock)


async def reason(tokens: OidcTokens, token: str) -> str:
    with pytest.raises(AuthenticationError) as caught:
        await tokens.authenticate(token)
    return caught.value.reason


async def reason_soon(tokens: OidcTokens, token: str) -> str:
    """For a token that is good until the keys have been fetched behind its back."""
    async with patience():
        while True:
            try:
                await tokens.authenticate(token)
            except AuthenticationError as error:
                return error.reason
            await asyncio.sleep(0)


@pytest.mark.parametrize(("key", "key_id"), [(RSA_KEY, "k1"), (EC_KEY, "k2")], ids=["RS256", "ES256"])
async def test_good_token(tokens: OidcTokens, key: PrivateKey, key_id: str) -> None:
    principal = await tokens.authenticate(sign(claims(), key, key_id))
    assert principal is not None
    assert (principal.name, principal.tenant, principal.scopes) == ("alice", f"{ISSUER}#alice", {"generate"})
    assert principal.id.startswith("oidc_")
    assert len(principal.salt) == 32


async def test_subjects_are_strangers_to_each_other(tokens: OidcTokens) -> None:
    alice = await tokens.authenticate(sign(claims()))
    bob = await tokens.authenticate(sign(claims(sub="bob")))
    assert alice is not None
    assert bob is not None
    assert alice.id != bob.id
    assert alice.salt != bob.salt


@pytest.mark.parametrize(
    "token",
    ["sk-0123456789", "a.b.c", "iflx_0_0", "..", "é.é.é", encode({"typ": "JWT"}) + ".e30.", "x" * 20_000 + ".."],
)
async def test_what_is_no_token_is_left_to_others(tokens: OidcTokens, provider: Provider, token: str) -> None:
    assert await tokens.authenticate(token) is None
    assert provider.fetched == []


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": ISSUER + "/"},
        {"iss": "https://evil.example.org"},
        {"iss": [ISSUER]},
        {"iss": None},
        {"aud": "another"},
        {"aud": ["another", "third"]},
        {"aud": None},
        {"aud": []},
        {"aud": AUDIENCE.upper()},
        {"exp": None},
        {"exp": "tomorrow"},
        {"exp": True},
        {"exp": float("inf")},
        {"exp": float("nan")},
        {"exp": 10**400},
        {"exp": -1},
        {"sub": None},
        {"sub": ""},
        {"sub": 7},
        {"sub": "x" * 256},
        {"sub": "line\nbreak"},
        {"sub": "\x1b[31m"},
        {"nbf": NOW + MAX_SKEW_S + 1},
        {"iat": NOW + MAX_SKEW_S + 1},
        {"nbf": "soon"},
    ],
    ids=str,
)
async def test_bad_claims(tokens: OidcTokens, changes: dict[str, Any]) -> None:
    # Not PyJWT's encode, which refuses some of these itself.
    message = f"{encode({'alg': 'RS256', 'kid': 'k1'})}.{encode(claims(**changes))}"
    signature = jwt.get_algorithm_by_name("RS256").sign(message.encode(), RSA_KEY)
    token = f"{message}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"
    assert await reason(tokens, token) == "invalid"


async def test_audience_may_be_one_of_a_list(tokens: OidcTokens) -> None:
    assert await tokens.authenticate(sign(claims(aud=["other", AUDIENCE])))


async def test_expiry_and_skew(tokens: OidcTokens, clock: Clock) -> None:
    token = sign(claims())
    clock.now = NOW + 300 + MAX_SKEW_S - 1
    assert await tokens.authenticate(token)
    clock.now = NOW + 300 + MAX_SKEW_S
    assert await reason(tokens, token) == "expired"
    clock.now = NOW - MAX_SKEW_S
    assert await tokens.authenticate(token)


async def test_a_known_token_is_not_believed_beyond_its_key_and_time(
    tokens: OidcTokens, provider: Provider, clock: Clock
) -> None:
    """Checked tokens are remembered; a key that changes under the same name, and time, end that."""
    long_lived, short_lived = sign(claims(exp=NOW + 9000)), sign(claims(exp=NOW + REFRESH_S))
    assert await tokens.authenticate(long_lived) is await tokens.authenticate(long_lived)
    assert await tokens.authenticate(short_lived)
    clock.now += REFRESH_S + MAX_SKEW_S
    assert await reason(tokens, short_lived) == "expired"
    provider.keys = [jwk(OTHER_RSA_KEY, "k1")]
    clock.now += REFRESH_S + 1
    assert await tokens.authenticate(long_lived)
    assert await reason_soon(tokens, long_lived) == "invalid"


async def test_remembered_tokens_are_bounded(tokens: OidcTokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oidc, "_MAX_PROVEN", 10)
    for index in range(30):
        assert await tokens.authenticate(sign(claims(sub=f"user {index}")))
    assert len(tokens._proven) == 10


async def test_alg_none(tokens: OidcTokens, provider: Provider) -> None:
    for name in ("none", "None", "NONE", ""):
        token = f"{encode({'alg': name, 'typ': 'JWT', 'kid': 'k1'})}.{encode(claims())}."
        assert await reason(tokens, token) == "invalid"
    assert provider.fetched == [], "refused before anything is fetched"


@pytest.mark.parametrize(
    "form", [(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), (Encoding.PEM, PublicFormat.PKCS1)]
)
async def test_hs256_with_the_public_key_as_secret(tokens: OidcTokens, form: tuple[Encoding, PublicFormat]) -> None:
    secret = RSA_KEY.public_key().public_bytes(*form)
    for algorithm in ("HS256", "RS256"):
        message = f"{encode({'alg': algorithm, 'kid': 'k1'})}.{encode(claims())}"
        mac = hmac.digest(secret, message.encode(), hashlib.sha256)
        token = f"{message}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"
        assert await reason(tokens, token) == "invalid"


async def test_foreign_signature(tokens: OidcTokens) -> None:
    assert await reason(tokens, sign(claims(), OTHER_RSA_KEY)) == "invalid"


async def test_key_of_another_type_than_the_algorithm(tokens: OidcTokens) -> None:
    assert await reason(tokens, sign(claims(), EC_KEY, "k1")) == "invalid"
    assert await reason(tokens, sign(claims(), RSA_KEY, "k2")) == "invalid"


async def test_changed_claims(tokens: OidcTokens) -> None:
    header, _, signature = sign(claims()).split(".")
    assert await reason(tokens, f"{header}.{encode(claims(sub='root'))}.{signature}") == "invalid"


@pytest.mark.parametrize("header", [{"typ": "logout+jwt"}, {"typ": "dpop+jwt"}, {"crit": ["exp"]}, {"kid": "k" * 257}])
async def test_bad_headers(tokens: OidcTokens, header: dict[str, Any]) -> None:
    assert await reason(tokens, sign(claims(), **header)) == "invalid"


async def test_keys_in_the_token_are_ignored(tokens: OidcTokens, provider: Provider) -> None:
    own = {"jwk": jwk(OTHER_RSA_KEY, "k1"), "jku": "https://evil.example.org/jwks", "x5u": "https://evil.example.org"}
    assert await reason(tokens, sign(claims(), OTHER_RSA_KEY, **own)) == "invalid"
    assert not [url for url in provider.fetched if "evil" in url]


async def test_token_without_key_id(tokens: OidcTokens) -> None:
    assert await reason(tokens, jwt.encode(claims(), RSA_KEY, "RS256")) == "invalid"


@pytest.mark.parametrize(
    ("path", "claim", "words"),
    [
        ("scope", {"scope": "a b  c"}, ["a", "b", "", "c"]),
        ("roles", {"roles": ["a", 1, None, "b c"]}, ["a", "b c"]),
        ("realm_access.roles", {"realm_access": {"roles": ["a"]}}, ["a"]),
        ("https://example.org/roles", {"https://example.org/roles": ["a"]}, ["a"]),
        ("a.b", {"a": "text"}, []),
        ("a.b", {"a": ["b"]}, []),
        ("missing", {}, []),
        ("scope", {"scope": {"admin": True}}, []),
    ],
)
def test_scope_words(path: str, claim: dict[str, Any], words: list[str]) -> None:
    assert list(scope_words(claim, path)) == words


async def test_only_mapped_words_grant(provider: Provider, clock: Clock) -> None:
    for scope_map, granted in (({}, set()), ({"admin": "read"}, {"read"})):
        auth = AuthConfig(oidc_issuer=ISSUER, oidc_audience=AUDIENCE, oidc_scope_map=scope_map)
        tokens = OidcTokens(auth, ProviderKeys(ISSUER, provider.fetch, clock), clock=clock)
        principal = await tokens.authenticate(sign(claims(scope="admin generate read")))
        assert principal is not None
        assert principal.scopes == granted


async def test_rotation(tokens: OidcTokens, provider: Provider, clock: Clock) -> None:
    assert await tokens.authenticate(sign(claims()))
    provider.keys = [jwk(OTHER_RSA_KEY, "k9")]
    clock.now += COOLDOWN_S
    assert await tokens.authenticate(sign(claims(), OTHER_RSA_KEY, "k9"))
    assert provider.refreshes == 2
    assert await reason(tokens, sign(claims())) == "invalid", "the key that was taken away"


async def test_removed_key_is_forgotten_by_the_regular_refresh(
    tokens: OidcTokens, provider: Provider, clock: Clock
) -> None:
    assert await tokens.authenticate(sign(claims()))
    provider.keys = [jwk(EC_KEY, "k2")]
    clock.now += REFRESH_S + 1
    late = claims(exp=clock.now + 300)
    assert await tokens.authenticate(sign(late)), "nobody waits for the regular refresh"
    assert await reason_soon(tokens, sign(late)) == "invalid"


async def test_flood_of_unknown_keys_is_one_fetch(tokens: OidcTokens, provider: Provider, clock: Clock) -> None:
    assert await tokens.authenticate(sign(claims()))
    clock.now += COOLDOWN_S
    flood = [sign(claims(), OTHER_RSA_KEY, f"foreign {index}") for index in range(50)]
    results = await asyncio.gather(*(tokens.authenticate(token) for token in flood), return_exceptions=True)
    assert all(isinstance(result, AuthenticationError) for result in results)
    for token in flood:
        assert await reason(tokens, token) == "invalid"
    assert provider.refreshes == 2
    assert await tokens.authenticate(sign(claims())), "known keys do not suffer"


async def test_known_keys_do_not_wait_for_a_slow_provider(tokens: OidcTokens, provider: Provider, clock: Clock) -> None:
    assert await tokens.authenticate(sign(claims()))
    clock.now += COOLDOWN_S
    provider.hold = asyncio.Event()
    waiting = asyncio.create_task(tokens.authenticate(sign(claims(), OTHER_RSA_KEY, "new")))
    await asyncio.sleep(0)
    assert await asyncio.wait_for(tokens.authenticate(sign(claims())), PATIENCE_S)
    provider.keys.append(jwk(OTHER_RSA_KEY, "new"))
    provider.hold.set()
    assert await waiting


async def test_a_waiter_that_leaves_does_not_stop_the_fetch(tokens: OidcTokens, provider: Provider) -> None:
    provider.hold = asyncio.Event()
    first = asyncio.create_task(tokens.authenticate(sign(claims())))
    second = asyncio.create_task(tokens.authenticate(sign(claims())))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    provider.hold.set()
    assert await second
    assert provider.refreshes == 1


@pytest.mark.parametrize("error", [FetchError("503"), TimeoutError(), ConnectionRefusedError()], ids=repr)
async def test_provider_down(tokens: OidcTokens, provider: Provider, clock: Clock, error: Exception) -> None:
    """Known keys go on until a maximum age; unknown ones are refused; it recovers by itself."""
    assert await tokens.authenticate(sign(claims()))
    provider.error = error
    clock.now += MAX_AGE_S - 1
    late = claims(exp=clock.now + 10_000)
    assert await tokens.authenticate(sign(late))
    assert await reason(tokens, sign(late, OTHER_RSA_KEY, "new")) == "unavailable"
    clock.now += COOLDOWN_S
    assert await reason(tokens, sign(late)) == "unavailable"
    clock.now += COOLDOWN_S
    provider.error = None
    assert await tokens.authenticate(sign(late))


async def test_provider_down_is_not_hammered(tokens: OidcTokens, provider: Provider, clock: Clock) -> None:
    provider.error = FetchError("down")
    for _ in range(20):
        assert await reason(tokens, sign(claims())) == "unavailable"
    assert provider.refreshes == 1
    provider.error = None
    clock.now += COOLDOWN_S
    assert await tokens.authenticate(sign(claims()))


@pytest.mark.parametrize(
    "discovery",
    [
        {"issuer": "https://evil.example.org"},
        {"issuer": ISSUER + "/"},
        {"jwks_uri": "http://keys.example.org/jwks"},
        {"jwks_uri": "http://127.0.0.1/jwks"},
        {"jwks_uri": "file:///etc/passwd"},
        {"jwks_uri": 7},
    ],
)
async def test_bad_discovery(tokens: OidcTokens, provider: Provider, discovery: dict[str, Any]) -> None:
    provider.discovery |= discovery
    assert await reason(tokens, sign(claims())) == "unavailable"
    assert provider.fetched == [ISSUER + "/.well-known/openid-configuration"]


WEAK_KEY = rsa.generate_private_key(65537, 1024)
P384_KEY = ec.generate_private_key(ec.SECP384R1())


@pytest.mark.parametrize(
    "entry",
    [
        {"kty": "oct", "k": "c2VjcmV0", "kid": "k", "alg": "HS256"},
        jwk(RSA_KEY, "k", alg="RS512"),
        jwk(RSA_KEY, "k", alg="HS256"),
        jwk(RSA_KEY, "k", use="enc"),
        jwk(RSA_KEY, "k", key_ops=["encrypt"]),
        jwk(RSA_KEY, "k", d="AQAB"),
        jwk(RSA_KEY, "k", n="!!"),
        jwk(RSA_KEY, "k", n=None),
        jwk(EC_KEY, "k", x="AA"),
        {**jwk(RSA_KEY, "k"), "kid": 7},
        jwk(WEAK_KEY, "k"),
        jwk(P384_KEY, "k"),
        {},
    ],
)
def test_unusable_keys_are_passed_over(entry: dict[str, Any]) -> None:
    assert list(read_keys(msgspec.json.encode({"keys": [entry, jwk(RSA_KEY, "good")]}))) == [("good", "RS256")]


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"keys": 1}', b'{"keys": [1]}', b"\xff", b"[" * 100_000, json.dumps({"keys": [{}] * 129}).encode()],
    ids=["empty", "list", "number", "no objects", "no text", "deep", "too many"],
)
async def test_hostile_key_sets(tokens: OidcTokens, provider: Provider, content: bytes) -> None:
    real = provider.fetch

    async def fetch(url: str, max_bytes: int) -> bytes:
        return content if url.endswith("/jwks") else await real(url, max_bytes)

    tokens = OidcTokens(AUTH, ProviderKeys(ISSUER, fetch), clock=lambda: NOW)
    assert await reason(tokens, sign(claims())) == "unavailable"


def test_two_keys_of_one_name_are_refused() -> None:
    with pytest.raises(FetchError, match="same kid"):
        read_keys(msgspec.json.encode({"keys": [jwk(RSA_KEY, "k"), jwk(OTHER_RSA_KEY, "k")]}))


async def test_refusals_do_not_repeat_the_token(tokens: OidcTokens) -> None:
    token: Callable[..., str] = sign
    for bad in (token(claims(sub="canary\n")), token(claims(aud="canary")), token(claims(iss="canary"))):
        with pytest.raises(AuthenticationError) as caught:
            await tokens.authenticate(bad)
        assert "canary" not in str(caught.value)
