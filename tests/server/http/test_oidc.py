"""Tokens of an identity provider over HTTP: discovery and keys fetched from a real port, scopes as mapped."""

import time
from collections.abc import AsyncIterator
from typing import Any

import jwt
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from inferflux.server.access.jwks import FetchError
from inferflux.server.http.outbound import OutboundClient
from tests.support.http_server import KEY, KEYED, Site, running_server
from tests.support.waiting import PATIENCE_S

AUDIENCE = "inferflux"
SIGNING_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture
async def provider(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TestServer]:
    monkeypatch.setattr("inferflux.server.http.outbound.FETCH_TIMEOUT_S", PATIENCE_S)
    app = web.Application()
    server = TestServer(app)

    async def discovery(_request: web.Request) -> web.Response:
        url = issuer(server)
        return web.json_response({"issuer": url, "jwks_uri": url + "/keys"})

    async def keys(_request: web.Request) -> web.Response:
        key = RSAAlgorithm.to_jwk(SIGNING_KEY.public_key(), as_dict=True)
        return web.json_response({"keys": [{**key, "kid": "one", "use": "sig"}]})

    async def away(_request: web.Request) -> web.Response:
        raise web.HTTPFound("/keys")

    app.router.add_get("/.well-known/openid-configuration", discovery)
    app.router.add_get("/keys", keys)
    app.router.add_get("/away", away)
    async with server:
        yield server


def issuer(provider: TestServer) -> str:
    return str(provider.make_url("")).rstrip("/")


def token(provider: TestServer, **claims: Any) -> dict[str, str]:
    now = int(time.time())
    body = {"iss": issuer(provider), "aud": AUDIENCE, "sub": "alice", "iat": now, "exp": now + 600, "scope": "user"}
    signed = jwt.encode(body | claims, SIGNING_KEY, "RS256", headers={"kid": "one"})
    return {"Authorization": f"Bearer {signed}"}


def config(provider: TestServer, **auth: Any) -> dict[str, Any]:
    settings = {"oidc_issuer": issuer(provider), "oidc_audience": AUDIENCE, "oidc_scope_map": {"user": "read"}}
    return {**KEYED, "auth": settings | auth}


@pytest.fixture
async def site(provider: TestServer) -> AsyncIterator[Site]:
    async with running_server(config(provider, api_keys=[{"key": KEY}])) as site:
        yield site


async def status(site: Site, headers: dict[str, str]) -> int:
    return (await site.get("/v1/models", headers=headers))[0]


async def test_tokens_and_keys_both_work(site: Site, provider: TestServer) -> None:
    assert await status(site, token(provider)) == 200
    assert await status(site, {"x-api-key": KEY}) == 200
    assert await status(site, token(provider, scope="other words")) == 403
    assert await status(site, token(provider, aud="another")) == 401
    assert await status(site, token(provider, exp=int(time.time()) - 120)) == 401


async def test_long_tokens_fit(site: Site, provider: TestServer) -> None:
    assert await status(site, token(provider, groups="g" * 5000)) == 200


async def test_a_provider_that_is_down_is_401_and_no_guess(site: Site, provider: TestServer) -> None:
    credential = token(provider)
    await provider.close()
    assert [await status(site, credential) for _ in range(25)] == [401] * 25
    assert await status(site, {"x-api-key": KEY}) == 200


async def test_a_provider_is_caller_enough(provider: TestServer) -> None:
    async with running_server(config(provider)) as site:
        assert await status(site, token(provider)) == 200
        assert await status(site, {}) == 401


async def test_fetching_follows_no_redirect_and_bounds_the_answer(provider: TestServer) -> None:
    async with OutboundClient() as outbound:
        assert b'"kid"' in await outbound.fetch(issuer(provider) + "/keys", 65536)
        with pytest.raises(FetchError, match="status 302"):
            await outbound.fetch(issuer(provider) + "/away", 65536)
        with pytest.raises(FetchError, match="more than 16 bytes"):
            await outbound.fetch(issuer(provider) + "/keys", 16)
        with pytest.raises(FetchError, match="status 404"):
            await outbound.fetch(issuer(provider) + "/none", 16)
