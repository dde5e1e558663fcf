"""The admin routes for keys and limits: what they answer, keep, refuse, and never show."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from inferflux.server.policy import store_file
from tests.support.http_server import KEY, MODEL, Site, running_server

KEYS, LIMIT = "/v1/admin/api_keys", "/v1/admin/rate_limit"
ADMIN = {"Authorization": f"Bearer {KEY}"}
BODY = {"name": "chat-app", "scopes": ["read", "generate"]}


def config(**others: Any) -> dict[str, Any]:
    auth = {"api_keys": [{"key": KEY, "name": "root", "scopes": ["admin"]}]}
    return {"models": [{"id": MODEL, "path": "stub"}], "auth": auth, **others}


@pytest.fixture
async def site():
    async with running_server(config()) as site:
        yield site


async def put(site: Site, path: str, body: Any) -> tuple[int, Any]:
    async with site.session.put(site.url + path, json=body, headers=ADMIN) as response:
        return response.status, await response.json()


async def delete(site: Site, key_id: Any, headers: dict[str, str] = ADMIN) -> tuple[int, Any]:
    async with site.session.delete(site.url + KEYS, json={"id": key_id}, headers=headers) as response:
        return response.status, await response.json()


async def models_status(site: Site, key: str) -> int:
    return (await site.get("/v1/models", headers={"x-api-key": key}))[0]


async def test_a_key_works_until_it_is_revoked_and_is_shown_once(site: Site):
    limits = {"tenant": "acme", "rate_limit_per_minute": 5, "tokens_per_minute": 7, "max_priority": 3}
    status, made = await site.post(KEYS, {**BODY, **limits}, headers=ADMIN)
    assert status == 200
    assert made["key"].startswith("iflx_")
    assert (made["name"], made["scopes"]) == ("chat-app", ["generate", "read"])
    assert made.items() >= limits.items()
    assert await models_status(site, made["key"]) == 200
    assert (await site.get(KEYS, headers={"x-api-key": made["key"]}))[0] == 403
    _, listed = await site.get(KEYS, headers=ADMIN)
    assert [one["name"] for one in listed["data"]] == ["root", "chat-app"]
    for secret in (made["key"], hashlib.sha256(made["key"].encode()).hexdigest(), KEY):
        assert secret not in str(listed)
    assert await delete(site, made["id"]) == (200, {"id": made["id"], "deleted": True})
    assert await models_status(site, made["key"]) == 401
    status, body = await delete(site, made["id"])
    assert (status, body["error"]["code"]) == (404, "key_not_found")


async def test_the_last_admin_key_stays(site: Site):
    _, listed = await site.get(KEYS, headers=ADMIN)
    root = listed["data"][0]["id"]
    await site.post(KEYS, BODY, headers=ADMIN)
    status, body = await delete(site, root)
    assert (status, body["error"]["code"]) == (409, "last_admin_key")
    _, other = await site.post(KEYS, {"name": "other root", "scopes": ["admin"]}, headers=ADMIN)
    assert (await delete(site, root))[0] == 200
    assert (await site.get(KEYS, headers=ADMIN))[0] == 401
    assert (await site.get(KEYS, headers={"x-api-key": other["key"]}))[0] == 200


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "x" * 201}, "name"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["root"]}, "scopes[0]"),
        ({"scopes": None}, "scopes"),
        ({"rate_limit_per_minute": 0}, "rate_limit_per_minute"),
        ({"tokens_per_minute": True}, "tokens_per_minute"),
        ({"key": "of-my-choice"}, "key"),
        ({"max_priority": 2**31}, "max_priority"),
    ],
)
async def test_bad_keys_are_refused_by_field(site: Site, change: dict[str, Any], param: str):
    status, body = await site.post(KEYS, BODY | change, headers=ADMIN)
    assert (status, body["error"]["param"]) == (400, param)
    assert len(site.policy.document.api_keys) == 1


async def test_rate_limit_holds_from_the_next_request(site: Site):
    assert await site.get(LIMIT, headers=ADMIN) == (200, {"requests_per_minute": 0})
    assert await put(site, LIMIT, {"requests_per_minute": 2}) == (200, {"requests_per_minute": 2})
    statuses = [(await site.get(LIMIT, headers=ADMIN))[0] for _ in range(3)]
    assert statuses == [200, 200, 429]


@pytest.mark.parametrize(
    "body",
    [{}, {"requests_per_minute": -1}, {"requests_per_minute": 1.5}, {"requests_per_minute": 10**400}, {"limit": 1}, []],
)
async def test_bad_rate_limits_are_refused(site: Site, body: Any):
    assert (await put(site, LIMIT, body))[0] == 400


async def test_changes_survive_a_restart_and_stand_above_the_configuration(tmp_path: Path):
    tree = config(policy={"store": str(tmp_path / "policy.enc")})
    async with running_server(tree) as site:
        _, made = await site.post(KEYS, {"name": "root two", "scopes": ["admin", "read"]}, headers=ADMIN)
        root = site.policy.document.api_keys[0].id
        assert (await put(site, LIMIT, {"requests_per_minute": 50}))[0] == 200
        assert (await delete(site, root, {"x-api-key": made["key"]}))[0] == 200
    async with running_server(tree) as site:
        assert await models_status(site, made["key"]) == 200
        _, kept = await site.get("/v1/admin/policy", headers={"x-api-key": made["key"]})
        assert (kept["generation"], kept["persistent"], kept["encrypted"], kept["api_keys"]) == (4, True, False, 1)
        assert (await site.get(KEYS, headers=ADMIN))[0] == 401, "the file names it, the store revoked it"
        assert site.policy.document.rate_limit.requests_per_minute == 50


async def test_what_cannot_be_kept_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    async with running_server(config(policy={"store": str(tmp_path / "policy.enc")})) as site:
        monkeypatch.setattr(store_file, "write_file", full)
        status, body = await site.post(KEYS, BODY, headers=ADMIN)
        assert (status, body["error"]["code"]) == (500, "policy_persist_failed")
        assert "iflx_" not in str(body)
        assert len(site.policy.document.api_keys) == 1
