"""Rate limits and failed attempts over HTTP: statuses, headers, counters, and what is given back."""

from collections.abc import Mapping
from typing import Any

from tests.support.http_server import KEY, KEYED, MODEL, Site, running_server

OTHER = "sk-other-0123456789abcdef"
PROMPT = {"model": MODEL, "prompt": "Hi", "max_tokens": 10}


def limited(**auth: Any) -> dict[str, Any]:
    return {**KEYED, "auth": {**KEYED["auth"], **auth}}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def ask(site: Site, body: Mapping[str, Any] = PROMPT, key: str = KEY) -> tuple[int, Mapping[str, str], Any]:
    async with site.session.post(site.url + "/v1/completions", json=body, headers=bearer(key)) as response:
        await response.read()
        return response.status, response.headers, await response.json() if not body.get("stream") else None


async def counted(site: Site, reason: str) -> float | None:
    return site.metrics.registry.get_sample_value("inferflux_rate_limited_total", {"reason": reason})


async def test_requests_beyond_the_limit_are_429_and_say_when_to_come_back():
    async with running_server(limited(rate_limit_per_minute=2)) as site:
        assert [(await ask(site))[1]["x-ratelimit-remaining-requests"] for _ in range(2)] == ["1", "0"]
        status, headers, body = await ask(site)
        assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(headers["Retry-After"]) <= 30
        assert headers["x-ratelimit-limit-requests"] == "2"
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert headers["x-ratelimit-reset-requests"] == "60s"
        assert await counted(site, "requests") == 1
        assert (await site.get("/livez"))[0] == 200


async def test_no_limit_says_nothing():
    async with running_server(KEYED) as site:
        assert not [name for name in (await ask(site))[1] if name.lower().startswith("x-ratelimit")]


async def test_a_key_has_its_own_limit_and_its_own_bucket():
    keys = [{"key": KEY}, {"key": OTHER, "rate_limit_per_minute": 1}]
    async with running_server({**KEYED, "auth": {"api_keys": keys, "rate_limit_per_minute": 3}}) as site:
        assert [(await ask(site, key=OTHER))[0] for _ in range(2)] == [200, 429]
        assert [(await ask(site))[0] for _ in range(4)] == [200, 200, 200, 429]


async def test_refused_scopes_count_as_requests():
    keys = [{"key": KEY, "scopes": ["read"], "rate_limit_per_minute": 2}]
    async with running_server({**KEYED, "auth": {"api_keys": keys}}) as site:
        assert [(await ask(site))[0] for _ in range(3)] == [403, 403, 429]


async def test_tokens_are_reserved_and_the_rest_is_given_back():
    async with running_server(limited(tokens_per_minute=200)) as site:
        prompt = 0
        for stream in (False, True):
            status, headers, body = await ask(site, {**PROMPT, "max_tokens": 150, "stream": stream})
            assert (status, headers["x-ratelimit-limit-tokens"]) == (200, "200")
            assert int(headers["x-ratelimit-remaining-tokens"]) < 50, "as long as it runs, all it may use is set aside"
            if body is not None:
                prompt = body["usage"]["total_tokens"]
                assert prompt < 100, "the reply is short"
        left = 200 - 2 * prompt
        status, headers, body = await ask(site, {**PROMPT, "max_tokens": left + 40})
        assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
        assert "tokens a minute" in body["error"]["message"]
        assert int(headers["Retry-After"]) >= 1
        assert await counted(site, "tokens") == 1
        assert (await ask(site, {**PROMPT, "max_tokens": left - 20}))[0] == 200


async def test_a_prompt_with_several_choices_counts_once():
    async with running_server(limited(tokens_per_minute=60)) as site:
        long = {**PROMPT, "prompt": list(range(3, 43)), "n": 2, "max_tokens": 5}
        assert (await ask(site, long))[0] == 200


async def test_scoring_a_prompt_takes_its_tokens_and_no_more():
    async with running_server(limited(tokens_per_minute=60)) as site:
        body = {"model": MODEL, "prompt": list(range(3, 63)), "echo": True, "logprobs": 1, "max_tokens": 0}
        status, headers, answer = await ask(site, body)
        assert (status, headers["x-ratelimit-remaining-tokens"]) == (200, "0")
        assert answer["usage"] == {**answer["usage"], "prompt_tokens": 60, "completion_tokens": 0, "total_tokens": 60}


async def test_who_keeps_guessing_is_slowed_down_and_others_are_not():
    async with running_server(KEYED) as site:
        assert (await ask(site))[0] == 200, "this key has proved itself from here"
        statuses = [(await ask(site, key=f"guess-{number}"))[0] for number in range(22)]
        assert statuses == [401] * 20 + [429] * 2
        status, headers, body = await ask(site, key="guess")
        assert (status, body["error"]["code"]) == (429, "too_many_attempts")
        assert 1 <= int(headers["Retry-After"]) <= 120
        assert (await ask(site))[0] == 200
        assert (await site.get("/v1/models"))[0] == 401, "no credential is no guess"
        assert await counted(site, "attempts") == 3


async def test_a_made_key_works_whoever_guesses_from_the_same_address():
    """Behind a proxy all callers have one address: a key that cannot be guessed must not be locked out by others."""
    unused, long = "sk-never-used-before", "sk-9f86d081884c7d659a2feaa0c55ad0"
    keys = [{"key": KEY, "scopes": ["admin"]}, *({"key": key, "scopes": ["generate"]} for key in (unused, long))]
    async with running_server({**KEYED, "auth": {"api_keys": keys}}) as site:
        body = {"name": "new", "scopes": ["generate"]}
        _, made = await site.post("/v1/admin/api_keys", body, headers={"x-api-key": KEY})
        while (await ask(site, key="guess"))[0] != 429:
            pass
        assert (await ask(site, key=unused))[0] == 429, "this one may have been guessed"
        assert (await ask(site, key=long))[0] == 200
        assert (await ask(site, key=made["key"]))[0] == 200
        assert (await ask(site, key=made["key"][:-1]))[0] in (401, 429)
