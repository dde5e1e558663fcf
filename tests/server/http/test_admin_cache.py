"""The cache's admin routes: what they show, for whom a prompt is computed ahead, and what is dropped."""

import msgspec

from inferflux.engine.stats import EngineStats, TierStats
from inferflux.server.access.principal import cache_salt, tenant_salt
from tests.support.http_server import KEY, MODEL, Site, running_server
from tests.support.templates import bundle

CONFIG = {
    "models": [{"id": MODEL, "path": "stub"}],
    "auth": {"api_keys": [{"key": KEY, "tenant": "acme", "scopes": ["admin", "read"]}]},
}
HEADERS = {"Authorization": f"Bearer {KEY}"}


def sample(site: Site, name: str, **labels: str) -> float | None:
    return site.metrics.registry.get_sample_value(name, {"model": MODEL, **labels})


async def test_pages_and_hits_per_tier_are_shown_and_counted():
    async with running_server(CONFIG) as site:
        transfers = [0] * 13
        transfers[2] = 4
        cpu = TierStats(pages_total=9, pages_in_use=5, hit_tokens=32, evictions=3, transfers=transfers, transfer_s=0.5)
        nvme = TierStats(pages_total=100, pages_in_use=7, state="off", damaged_pages=2, loads=1, transfer_bytes=640)
        site.engine.stats = EngineStats(
            device_pages_total=64,
            device_pages_in_use=2,
            device_pages_cached=1,
            prefix_hit_tokens=48,
            prefix_query_tokens=90,
            tiers={"cpu": cpu, "nvme": nvme},
        )
        status, body = await site.get("/v1/admin/cache", headers=HEADERS)
        assert status == 200
        (model,) = body["data"]
        assert (model["model"], model["query_tokens"], model["damaged_pages"]) == (MODEL, 90, 2)
        assert model["tiers"]["device"] == {
            "pages_total": 64, "pages_in_use": 2, "pages_cached": 1, "state": "on", "hit_tokens": 16, "evictions": 0,
        }  # fmt: skip
        assert model["tiers"]["cpu"]["hit_tokens"] == 32
        assert model["tiers"]["nvme"]["state"] == "off"
        assert sample(site, "inferflux_kv_pages_in_use", tier="cpu") == 5
        assert sample(site, "inferflux_kv_pages_total", tier="nvme") == 100
        assert sample(site, "inferflux_prefix_cache_hit_tokens_total", tier="device") == 16
        assert sample(site, "inferflux_kv_bad_pages_total", reason="damaged") == 2
        assert sample(site, "inferflux_kv_tier_state", tier="nvme", status="off") == 1
        assert sample(site, "inferflux_kv_load_decisions_total", tier="nvme", reason="load") == 1
        assert sample(site, "inferflux_kv_transfer_seconds_bucket", tier="cpu", le="0.0005") == 4
        assert sample(site, "inferflux_kv_transfer_bytes_total", tier="nvme") == 640
        site.engine.num_engines += 1
        site.engine.stats = EngineStats(tiers={"cpu": TierStats(evictions=1)})
        assert sample(site, "inferflux_kv_evictions_total", tier="cpu") == 4, "counters go on over a restart"


async def test_warming_runs_the_prompt_under_the_salt_of_who_will_ask():
    async with running_server(CONFIG) as site:
        status, body = await site.post("/v1/admin/cache/warm", {"model": MODEL, "prompt": "Hello"}, headers=HEADERS)
        num_tokens = len(site.engine.submitted[0].prompt_token_ids)
        assert (status, body) == (200, {"model": MODEL, "num_tokens": num_tokens, "num_cached_tokens": 3})
        body = {"prompt": [1, 2, 3], "tenant": "other", "cache_salt": "x"}
        assert (await site.post("/v1/admin/cache/warm", body, headers=HEADERS))[0] == 200
        own, other = site.engine.submitted
        assert (own.tenant, own.salt, own.sampling.max_tokens) == ("acme", tenant_salt("acme"), 0)
        assert (other.prompt_token_ids, other.salt) == ([1, 2, 3], cache_salt(tenant_salt("other"), "x"))


async def test_what_a_chat_with_tools_begins_with_can_be_warmed():
    """Templates show tools before the messages: a prompt without them would warm nothing for such chats."""
    tools = [{"type": "function", "function": {"name": "now"}}]
    chat = {"messages": [{"role": "user", "content": "Hi"}], "tools": tools}
    async with running_server(CONFIG, text=bundle()) as site:
        assert (await site.post("/v1/admin/cache/warm", chat, headers=HEADERS))[0] == 200
        _, counted = await site.post("/tokenize", chat, headers=HEADERS)
        assert site.engine.submitted[0].prompt_token_ids == counted["tokens"]


async def test_bad_bodies_are_400_and_name_the_field():
    async with running_server(CONFIG) as site:
        for body, param in (
            ({}, "prompt"),
            ({"prompt": "a", "messages": []}, "prompt"),
            ({"prompt": []}, "prompt"),
            ({"prompt": [10**9]}, "prompt"),
            ({"prompt": "a", "tenant": ""}, "tenant"),
        ):
            status, answer = await site.post("/v1/admin/cache/warm", body, headers=HEADERS)
            assert (status, answer["error"]["param"]) == (400, param), body


async def test_dropping_asks_every_engine_or_one():
    async with running_server(CONFIG) as site:
        for body in (None, {}, {"model": MODEL}):
            data = b"" if body is None else msgspec.json.encode(body)
            async with site.session.delete(site.url + "/v1/admin/cache", data=data, headers=HEADERS) as response:
                assert (response.status, await response.json()) == (200, {"models": [MODEL]})
        assert site.engine.num_drops == 3
        body = msgspec.json.encode({"model": "nope"})
        async with site.session.delete(site.url + "/v1/admin/cache", data=body, headers=HEADERS) as response:
            assert response.status == 404
        assert (await site.get("/v1/admin/cache"))[0] == 401
