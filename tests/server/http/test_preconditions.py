"""ETag and If-Match: of two administrators who have read the same, the second does not undo the first."""

import asyncio
from typing import Any

import msgspec
import pytest

from inferflux.server.http.openapi import document
from inferflux.server.http.routes import ROUTES
from tests.support.http_server import KEY, MODEL, Site, running_server

CONFIG: dict[str, Any] = {
    "models": [{"id": MODEL, "path": "stub"}],
    "auth": {"api_keys": [{"key": KEY, "scopes": ["admin"]}]},
}
KEYED = {"Authorization": f"Bearer {KEY}"}
# Of each resource, two changes.
CHANGES = [
    ("guardrails", {"blocklist": ["falcon"]}, {"blocklist": ["eagle"]}),
    ("rate_limit", {"requests_per_minute": 500}, {"requests_per_minute": 600}),
    ("fairness", {"policy": "fair"}, {"policy": "fcfs"}),
]


async def ask(site: Site, name: str, body: Any = None, if_match: str | None = None) -> tuple[int, str | None, Any]:
    """Returns the status, the ETag and the answer."""
    headers = KEYED if if_match is None else {**KEYED, "If-Match": if_match}
    method = "GET" if body is None else "PUT"
    async with site.session.request(method, f"{site.url}/v1/admin/{name}", json=body, headers=headers) as response:
        return response.status, response.headers.get("ETag"), await response.json()


@pytest.mark.parametrize(("name", "first", "second"), CHANGES, ids=[row[0] for row in CHANGES])
async def test_a_change_to_what_was_not_read_is_refused(name: str, first: Any, second: Any):
    async with running_server(CONFIG) as site:
        _, read, _ = await ask(site, name)
        assert read is not None
        status, changed, _ = await ask(site, name, first, read)
        assert (status, changed == read) == (200, False)
        status, _, answer = await ask(site, name, second, read)
        assert (status, answer["error"]["code"]) == (412, "precondition_failed")
        _, now, shown = await ask(site, name)
        assert (now, {**shown, **first}) == (changed, shown), "nothing was changed"
        assert (await ask(site, name, second, f'"of-old", {now}'))[0] == 200
        assert (await ask(site, name, first, "*"))[0] == 200
        assert (await ask(site, name, second))[0] == 200, "who does not ask for it overwrites, as ever"


@pytest.mark.parametrize("tag", ['"nonsense"', "nonsense", "W/{}", '"{'])
async def test_what_is_not_the_tag_does_not_match(tag: str):
    async with running_server(CONFIG) as site:
        _, read, _ = await ask(site, "rate_limit")
        status, _, _ = await ask(site, "rate_limit", {"requests_per_minute": 5}, tag.replace("{}", str(read)))
        assert (status, site.policy.document.rate_limit.requests_per_minute) == (412, 0)


@pytest.mark.parametrize(("name", "first", "second"), CHANGES, ids=[row[0] for row in CHANGES])
async def test_of_changes_at_once_to_the_same_one_is_made(name: str, first: Any, second: Any):
    async with running_server(CONFIG) as site:
        _, read, _ = await ask(site, name)
        answers = await asyncio.gather(*(ask(site, name, body, read) for body in (first, second) * 4))
        assert sorted(status for status, _, _ in answers) == [200] + [412] * 7


def test_the_schema_says_so():
    schema = msgspec.json.decode(document(ROUTES))
    for name, _, _ in CHANGES:
        path = schema["paths"][f"/v1/admin/{name}"]
        assert [one["name"] for one in path["put"]["parameters"]] == ["If-Match"]
        for method in ("get", "put"):
            assert path[method]["responses"]["200"]["headers"].keys() == {"ETag"}
