"""Tokens of a real OpenID Connect provider (npm's oidc-provider in a process of its own), good and forged."""

import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from inferflux.server.access import jwks
from tests.support.http_server import KEY, KEYED, MODEL, Site, running_server
from tests.support.real_oidc import (
    AUDIENCE,
    ES256_RESOURCE,
    OTHER_AUDIENCE,
    Provider,
    UnavailableError,
    install,
    start_provider,
)
from tests.support.waiting import PATIENCE_S


@pytest.fixture(scope="module")
def node() -> str:
    try:
        return install()
    except UnavailableError as reason:
        pytest.skip(str(reason))


@pytest.fixture
async def provider(node: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Provider]:
    monkeypatch.setattr("inferflux.server.http.outbound.FETCH_TIMEOUT_S", PATIENCE_S)
    async with start_provider(node) as running:
        yield running


@pytest.fixture
async def site(provider: Provider) -> AsyncIterator[Site]:
    auth = {
        "api_keys": [{"key": KEY}],
        "oidc_issuer": provider.issuer,
        "oidc_audience": AUDIENCE,
        "oidc_scope_map": {"user": "generate", "operator": "admin"},
    }
    async with running_server({**KEYED, "auth": auth}) as site:
        yield site


async def ask(site: Site, token: str) -> int:
    """Returns the status of a request that needs the scope generate."""
    headers = {"Authorization": f"Bearer {token}"}
    return (await site.post("/v1/completions", {"model": MODEL, "prompt": "Hi"}, headers=headers))[0]


async def message(site: Site, token: str) -> str:
    """Returns why the token is refused, for lack of a valid one."""
    status, body = await site.get("/v1/models", headers={"Authorization": f"Bearer {token}"})
    assert status == 401, body
    words: str = body["error"]["message"]
    return words


async def test_what_the_provider_issues_is_taken_for_what_it_says(provider: Provider, site: Site) -> None:
    assert await ask(site, await provider.token()) == 200
    assert await ask(site, await provider.token(ES256_RESOURCE)) == 200
    assert await ask(site, await provider.token(scope="operator")) == 403, "admin is no leave to generate"
    headers = {"Authorization": f"Bearer {await provider.token(scope='operator')}"}
    assert (await site.get("/v1/admin/api_keys", headers=headers))[0] == 200
    assert {one.tenant for one in site.engine.submitted} == {f"{provider.issuer}#robot"}
    assert await provider.num_fetches() == 1


async def test_a_token_for_others_or_out_of_its_time_is_refused(provider: Provider, site: Site) -> None:
    assert "not meant for this server" in await message(site, await provider.token(OTHER_AUDIENCE))
    await provider.set_clock(-3600)
    assert "expired" in await message(site, await provider.token())
    await provider.set_clock(3600)
    assert "not valid yet" in await message(site, await provider.token())


async def test_rotation(provider: Provider, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    old = await provider.token()
    assert await ask(site, old) == 200
    await provider.rotate()
    new = await provider.token()
    assert "does not have" in await message(site, new), "within the cooldown nobody asks again"
    monkeypatch.setattr(jwks, "COOLDOWN_S", 0.0)
    assert await ask(site, new) == 200
    monkeypatch.undo()
    assert "does not have" in await message(site, old), "its key is gone"
    assert await provider.num_fetches() == 2


async def test_foreign_keys_are_asked_for_once_and_keep_nobody_out(provider: Provider, site: Site) -> None:
    good = await provider.token()
    claims = jwt.decode(good, options={"verify_signature": False})
    foreign = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    flood = [jwt.encode(claims, foreign, "RS256", headers={"kid": f"foreign-{index}"}) for index in range(60)]
    statuses = [await ask(site, token) for token in flood]
    assert statuses[:20] == [401] * 20
    assert statuses.count(429) > 20, "this address is slowed down"
    assert await provider.num_fetches() == 1
    assert await ask(site, good) == 200, "a signature is no guess, however many guessed from this address"
    same_kid = jwt.encode(claims, foreign, "RS256", headers={"kid": jwt.get_unverified_header(good)["kid"]})
    assert await ask(site, same_kid) in (401, 429)


def segment(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


async def test_forged_tokens(provider: Provider, site: Site) -> None:
    good = await provider.token()
    assert await ask(site, good) == 200
    header, claims = jwt.get_unverified_header(good), jwt.decode(good, options={"verify_signature": False})
    async with site.session.get(provider.issuer + "/jwks") as response:
        keys = {key["kid"]: jwt.PyJWK(key) for key in (await response.json())["keys"]}
    public = keys[header["kid"]].key
    for algorithm in ("none", "None", "nOnE", ""):
        for signature in ("", good.rpartition(".")[2]):
            forged = f"{segment({**header, 'alg': algorithm})}.{segment(claims)}"
            assert "signed" in await message(site, f"{forged}.{signature}")
    for form in ((Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)):
        secret = public.public_bytes(*form)
        forged = f"{segment({**header, 'alg': 'HS256'})}.{segment(claims)}"
        signature = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).sign(forged.encode(), secret)
        assert "signed" in await message(site, f"{forged}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}")
    lifted = f"{header_of(good)}.{segment({**claims, 'scope': 'operator'})}.{good.rpartition('.')[2]}"
    assert "signature" in await message(site, lifted)


def header_of(token: str) -> str:
    return token.partition(".")[0]
