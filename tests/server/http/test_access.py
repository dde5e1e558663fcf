"""Who gets in: credentials of every shape, scopes of every route, and nothing that was not declared."""

import hashlib
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from multidict import CIMultiDict

from inferflux.server.http.context import CONTEXT
from inferflux.server.http.middleware import PUBLIC, authenticate, observe, shape_errors
from inferflux.server.http.routes import ROUTES, add_routes
from tests.support.http_server import KEY, KEYED, MODEL, OPEN, Site, running_server

READER, HASHED = "sk-reader-0123456789", "sk-hashed-0123456789"
CONFIG: dict[str, Any] = {
    **KEYED,
    "auth": {
        "api_keys": [
            {"key": KEY, "name": "all", "tenant": "acme", "scopes": ["generate", "read"], "max_priority": 5},
            {"key": READER, "scopes": ["read"]},
            {"key_sha256": hashlib.sha256(HASHED.encode()).hexdigest(), "scopes": ["admin"]},
        ]
    },
}
PROMPT = {"model": MODEL, "prompt": "Hi"}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


PUBLIC_PATHS = ("/livez", "/health", "/readyz", "/healthz", "/metrics", "/openapi.json", "/ui", "/ui/{file}")


@pytest.fixture
async def site():
    async with running_server(CONFIG) as site:
        yield site


REFUSED: list[list[tuple[str, str]]] = [
    [],
    [("Authorization", "")],
    [("Authorization", "Bearer")],
    [("Authorization", "Bearer ")],
    [("Authorization", KEY)],
    [("Authorization", f"Basic {KEY}")],
    [("Authorization", f"Bearer {KEY} x")],
    [("Authorization", f"Bearer {KEY},{KEY}")],
    [("Authorization", f"Bearer {KEY.upper()}")],
    [("Authorization", f"Bearer {KEY[:-1]}")],
    [("Authorization", f"Bearer {KEY}x")],
    [("Authorization", f"Bearer {hashlib.sha256(KEY.encode()).hexdigest()}")],
    [("Authorization", "Bearer ключ")],
    [("Authorization", "Bearer " + "x" * 8000)],
    [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {KEY}")],
    [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer other")],
    [("Authorization", f"Bearer {KEY}"), ("x-api-key", KEY)],
    [("x-api-key", "")],
    [("x-api-key", KEY), ("x-api-key", KEY)],
    [("x-api-key", f"Bearer {KEY}")],
    [("Cookie", f"api_key={KEY}")],
]


@pytest.mark.parametrize("headers", REFUSED, ids=lambda headers: str(headers)[:60])
async def test_no_valid_key_is_401_and_says_how_to_send_one(site: Site, headers: list[tuple[str, str]]):
    async with site.session.post(f"{site.url}/v1/completions", json=PROMPT, headers=CIMultiDict(headers)) as response:
        assert response.status == 401
        assert response.headers["WWW-Authenticate"].startswith("Bearer")
        error = (await response.json())["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert KEY not in error["message"]
    assert site.engine.submitted == []


@pytest.mark.parametrize(
    "headers",
    [bearer(KEY), {"authorization": f"bearer  {KEY} "}, {"X-Api-Key": KEY}, bearer(READER), {"x-api-key": READER}],
)
async def test_a_valid_key_may_read(site: Site, headers: dict[str, str]):
    assert (await site.get("/v1/models", headers=headers))[0] == 200


async def test_key_in_the_url_is_not_looked_at(site: Site):
    assert (await site.get(f"/v1/models?api_key={KEY}&key={KEY}"))[0] == 401


async def test_a_missing_scope_is_403(site: Site):
    status, body = await site.post("/v1/completions", PROMPT, headers=bearer(READER))
    assert (status, body["error"]["type"]) == (403, "permission_error")
    status, _ = await site.get("/v1/models", headers=bearer(HASHED))
    assert status == 403, "no scope implies another"


async def test_the_challenge_says_what_is_wrong(site: Site):
    """RFC 6750, section 3.1: clients of an identity provider renew their token when they read invalid_token."""
    expected = {
        None: 'Bearer realm="inferflux"',
        "unknown": 'Bearer realm="inferflux", error="invalid_token"',
        READER: 'Bearer realm="inferflux", error="insufficient_scope"',
    }
    for key, challenge in expected.items():
        headers = {} if key is None else bearer(key)
        async with site.session.post(f"{site.url}/v1/completions", json=PROMPT, headers=headers) as response:
            assert response.headers["WWW-Authenticate"] == challenge


async def test_every_route_asks_for_its_scope(site: Site):
    """By enumeration: each route is either public on purpose, or closed to strangers and to other scopes."""
    by_scope = {"generate": KEY, "read": READER, "admin": HASHED}  # KEY may read too
    for route in ROUTES:
        url = site.url + route.path.replace("{id:.+}", MODEL).replace("{file}", "app.js")
        statuses = {}
        for scope, key in by_scope.items():
            async with site.session.request(route.method, url, headers=bearer(key)) as response:
                statuses[scope] = response.status
        async with site.session.request(route.method, url) as response:
            stranger = response.status
        if route.scope == PUBLIC:
            assert stranger == 200, route.path
            assert route.path in PUBLIC_PATHS
        else:
            assert stranger == 401, route.path
            assert statuses[route.scope] not in (401, 403), route.path
            allowed = {"generate": {"generate"}, "read": {"generate", "read"}, "admin": {"admin"}}[route.scope]
            assert {scope for scope, status in statuses.items() if status != 403} == allowed, route.path


async def undeclared(_request: web.Request) -> web.Response:
    raise AssertionError("an undeclared route was called")


async def test_a_route_without_a_scope_stops_the_start():
    app = web.Application()
    add_routes(app, ROUTES)
    app.router.add_get("/forgotten", undeclared)
    with pytest.raises(RuntimeError, match="/forgotten declares no scope"):
        await web.AppRunner(app).setup()


async def test_a_route_without_a_scope_is_nobodys_even_if_it_got_in(site: Site):
    app = web.Application(middlewares=(observe, shape_errors, authenticate))
    app[CONTEXT] = site.app[CONTEXT]
    add_routes(app, ())
    app.router.add_get("/forgotten", undeclared)
    app.on_startup.clear()
    async with TestServer(app) as server:
        for headers in ({}, bearer(KEY), bearer(HASHED)):
            async with site.session.get(server.make_url("/forgotten"), headers=headers) as response:
                assert response.status == (403 if headers else 401)


async def test_priority_is_capped_and_caches_are_salted_by_tenant(site: Site):
    for body in ({"priority": 9}, {"priority": -3}, {}, {"cache_salt": "a"}, {"cache_salt": "b"}):
        status, answer = await site.post("/v1/completions", {**PROMPT, **body}, headers=bearer(KEY))
        assert status == 200, answer
    submitted = site.engine.submitted
    assert [one.priority for one in submitted[:3]] == [5, -3, 0]
    assert {one.tenant for one in submitted} == {"acme"}
    assert len({one.salt for one in submitted}) == 3, "its own salt, and one per cache_salt"
    assert b"" not in {one.salt for one in submitted}


async def test_failures_are_counted_by_reason(site: Site):
    await site.get("/v1/models")
    await site.get("/v1/models", headers=bearer("wrong"))
    await site.get("/v1/models", headers={"Authorization": "Basic x"})
    async with site.session.get(site.url + "/metrics") as response:
        page = await response.text()
    for reason in ("missing", "unknown", "malformed"):
        assert f'inferflux_auth_failures_total{{reason="{reason}"}} 1.0' in page
    assert KEY not in page
    assert "wrong" not in page


async def test_without_keys_any_credential_is_as_good_as_none():
    """Clients that insist on sending a key work against a server that asks for none; it gives them no more rights."""
    async with running_server() as site:
        for headers in ({}, bearer("anything"), {"x-api-key": "anything"}):
            assert (await site.post("/v1/completions", PROMPT, headers=headers))[0] == 200
            status, refused = await site.get("/v1/admin/models", headers=headers)
            assert (status, "without a key" in refused["error"]["message"]) == (403, True)
        assert {one.tenant for one in site.engine.submitted} == {"anonymous"}


async def test_with_keys_anonymous_callers_send_none():
    config = {**KEYED, "auth": {**KEYED["auth"], "allow_anonymous": True}}
    async with running_server(config) as site:
        assert (await site.get("/v1/models"))[0] == 200
        assert (await site.get("/v1/models", headers=bearer("wrong")))[0] == 401


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1", "file://", "http://[", ""])
async def test_pages_from_elsewhere_are_refused(origin: str):
    async with running_server() as site:
        headers = {"Origin": origin, "Content-Type": "text/plain"}
        async with site.session.post(site.url + "/v1/completions", json=PROMPT, headers=headers) as response:
            assert response.status == 403
            assert "Access-Control-Allow-Origin" not in response.headers
        assert site.engine.submitted == []


@pytest.mark.parametrize("listed", ["https://app.example", "https://App.Example"])
async def test_listed_origins_and_the_servers_own_may_call(listed: str):
    page = "https://app.example"
    async with running_server({**KEYED, "server": {"cors_origins": [listed]}}) as site:
        preflight = {"Origin": page, "Access-Control-Request-Method": "POST"}
        sdk = {"Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}
        for headers, allowed in ((preflight, "Authorization"), ({**preflight, **sdk}, "x-stainless-os")):
            async with site.session.options(site.url + "/v1/completions", headers=headers) as response:
                assert response.status == 204
                assert response.headers["Access-Control-Allow-Origin"] == page
                assert allowed in response.headers["Access-Control-Allow-Headers"]
        for origin in (page, site.url):
            headers = {"Origin": origin, **bearer(KEY)}
            async with site.session.post(
                site.url + "/v1/completions", json={**PROMPT, "stream": True}, headers=headers
            ) as response:
                assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (200, origin)
                assert "Origin" in response.headers.getall("Vary"), "a cache must not give it to another page"


@pytest.mark.parametrize(
    ("config", "host", "status"),
    [
        (OPEN, "rebound.example", 403),
        (OPEN, "rebound.example:8080", 403),
        (OPEN, "127.0.0.1.rebound.example", 403),
        (OPEN, "localhost:8080", 200),
        (OPEN, "127.0.0.1", 200),
        (OPEN, "[::1]:8080", 200),
        (KEYED, "inferflux.example", 200),
    ],
)
async def test_a_name_that_points_here_is_not_trusted_without_keys(config: dict[str, Any], host: str, status: int):
    """DNS rebinding: a site has its own name resolve to this machine, so that its pages pass for the server's own."""
    headers = {"Origin": f"http://{host}", "Host": host, **bearer(KEY)}
    async with (
        running_server(config) as site,
        site.session.post(site.url + "/v1/completions", json=PROMPT, headers=headers) as response,
    ):
        assert response.status == status


async def test_any_origin_may_be_allowed():
    headers = {"Origin": "null"}
    async with (
        running_server({**KEYED, "server": {"cors_origins": ["*"]}}) as site,
        site.session.get(site.url + "/v1/models", headers=headers) as response,
    ):
        assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (401, "*")
