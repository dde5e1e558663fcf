"""Grammars over HTTP: what compiles them lives as long as the model they are for."""

import gc
import weakref

from inferflux.server.grammar_check import GrammarCheck
from tests.support.http_server import KEY, MODEL, running_server
from tests.support.waiting import until

ADMIN = {"x-api-key": KEY}
CONFIG = {
    "models": [{"id": MODEL, "path": "stub"}],
    "auth": {"api_keys": [{"key": KEY, "scopes": ["admin", "generate", "read"]}]},
}


def checks() -> set[weakref.ref[GrammarCheck]]:
    gc.collect()
    return {weakref.ref(one) for one in gc.get_objects() if isinstance(one, GrammarCheck)}


async def test_a_model_that_is_gone_leaves_no_vocabulary_behind() -> None:
    """A vocabulary is megabytes, and models come and go for as long as the server runs."""
    others = checks()
    async with running_server(CONFIG) as site:
        body = {"prompt": "Hi", "max_tokens": 4, "response_format": {"type": "json_object"}}
        status, _ = await site.post("/v1/completions", body, headers=ADMIN)
        assert status == 200
        kept = checks() - others
        assert kept
        async with site.session.delete(f"{site.url}/v1/admin/models", json={"id": MODEL}, headers=ADMIN) as response:
            assert response.status == 200
        await until(lambda: not kept & checks())
