"""The policy that the admin guide shows, evaluated by a real Rego interpreter behind OPA's REST shape."""

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestServer

from tests.support.http_server import Site, running_server
from tests.support.rego_service import rego_service

GUIDE = Path(__file__).parent.parent.parent.parent / "docs" / "AdminGuide.md"
KEY_A, KEY_B = "sk-team-a-0123456789", "sk-team-b-0123456789"


@pytest.fixture
async def service() -> AsyncIterator[TestServer]:
    found = re.search(r"```rego\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert found is not None
    async with rego_service(found[1]) as running:
        yield running


def config(service: TestServer, path: str, **guardrails: Any) -> dict[str, Any]:
    keys = [{"key": KEY_A, "tenant": "team-a"}, {"key": KEY_B, "tenant": "team-b"}]
    return {
        "models": [{"id": "large", "path": "stub"}, {"id": "small", "path": "stub"}],
        "auth": {"api_keys": keys},
        "guardrails": {"opa_endpoint": str(service.make_url(path)), "opa_timeout_ms": 10_000, **guardrails},
    }


async def ask(site: Site, key: str, model: str, prompt: str = "Hi", **fields: Any) -> int:
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], **fields}
    return (await site.post("/v1/chat/completions", body, headers={"x-api-key": key}))[0]


@pytest.mark.parametrize("path", ["/v1/data/inferflux/allow", "/v1/data/inferflux"])
async def test_the_guides_policy_decides(service: TestServer, path: str) -> None:
    async with running_server(config(service, path)) as site:
        assert await ask(site, KEY_A, "large") == 200
        assert await ask(site, KEY_A, "large", max_tokens=201) == 200
        assert await ask(site, KEY_B, "small", max_tokens=200) == 200
        assert await ask(site, KEY_B, "small", max_tokens=201) == 403
        assert await ask(site, KEY_B, "large") == 403
        assert await ask(site, KEY_A, "small", "What is Project AURORA?") == 403
        refused = {"reason": "opa"}
        assert site.metrics.registry.get_sample_value("inferflux_guardrail_blocks_total", refused) == 3


@pytest.mark.parametrize(("on_error", "status"), [("deny", 403), ("allow", 200)])
async def test_an_undefined_decision_is_none(service: TestServer, on_error: str, status: int) -> None:
    """`{}` is what OPA answers for a path that no policy defines; a rule that is not boolean is no better."""
    for path in ("/v1/data/inferflux/misspelt", "/v1/data/inferflux/long_answers"):
        async with running_server(config(service, path, on_error=on_error)) as site:
            assert await ask(site, KEY_A, "large") == status
