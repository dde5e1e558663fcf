"""Grammars over HTTP: what compiles them lives as long as the model they are for."""

import gc
import weakref
from typing import Any

import pytest

from inferflux.errors import RequestError
from inferflux.sampling_params import MAX_GRAMMAR_CHARS
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
    # `isinstance` would ask others' dead proxies for their class, which raises.
    return {weakref.ref(one) for one in gc.get_objects() if type(one) is GrammarCheck}


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


LONG = "a" * MAX_GRAMMAR_CHARS
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"description": LONG}}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": SCHEMA}, "response_format.json_schema.schema"),
        ({"structured_outputs": {"regex": LONG + "a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": [LONG]}}, "structured_outputs.choice"),
    ],
    ids=["schema", "regex", "choice"],
)
async def test_a_grammar_that_is_too_long_names_the_field_it_came_in(fields: dict[str, Any], param: str) -> None:
    async with running_server() as site:
        status, answer = await site.post("/v1/completions", {"prompt": "Hi", **fields})
        assert (status, answer["error"]["param"]) == (400, param)
        assert str(MAX_GRAMMAR_CHARS) in answer["error"]["message"]


async def test_a_grammar_that_fails_midway_is_the_callers_and_named_as_the_caller_knows_it() -> None:
    """Its limits are the engine's, and a 500 would have clients try again what fails again."""
    async with running_server() as site:
        site.engine.error = RequestError("the grammar failed: too many states", param="grammar")
        body = {"prompt": "Hi", "max_tokens": 9, "structured_outputs": {"regex": "[a-z]+"}}
        expected = "structured_outputs.regex: the grammar failed: too many states"
        site.engine.fail_at = 0
        status, answer = await site.post("/v1/completions", body)
        assert (status, answer["error"]["param"]) == (400, "structured_outputs.regex")
        assert answer["error"]["message"] == expected
        site.engine.fail_at = 2
        events = await site.events("/v1/completions", body)
        assert events[-1]["error"]["message"] == expected
