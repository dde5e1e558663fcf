"""POST /v1/embeddings: OpenAI's shapes in and out, and what it refuses."""

import base64
import math
import struct
from typing import Any

import pytest

from tests.support.fake_engine import EMBEDDING_SIZE, WINDOW, vector_of
from tests.support.http_server import MODEL, OPEN, Site, running_server, text_bundle

EMBEDDINGS = "/v1/embeddings"


@pytest.fixture
async def site():
    async with running_server() as site:
        yield site


def numbers(data: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(data) // 4}f", data))


@pytest.mark.parametrize("value", ["Hi", ["Hi", "there"], [5, 6, 7], [[5, 6], [7]]])
async def test_every_kind_of_input(site: Site, value: Any):
    status, body = await site.post(EMBEDDINGS, {"model": MODEL, "input": value})
    assert status == 200, body
    prompts = [submitted.prompt_token_ids for submitted in site.engine.submitted]
    if isinstance(value, str) or isinstance(value[0], str):
        texts = [value] if isinstance(value, str) else value
        assert prompts == text_bundle().tokenizer.encode_batch(texts, add_special_tokens=True)
    else:
        assert prompts == (value if isinstance(value[0], list) else [value])
    assert (body["object"], body["model"]) == ("list", MODEL)
    assert [(item["object"], item["index"]) for item in body["data"]] == [("embedding", i) for i in range(len(prompts))]
    assert [item["embedding"] for item in body["data"]] == [numbers(vector_of(prompt)) for prompt in prompts]
    num_tokens = sum(map(len, prompts))
    assert body["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    assert {submitted.sampling.pooling for submitted in site.engine.submitted} == {"last"}


async def test_base64_and_dimensions(site: Site):
    _, plain = await site.post(EMBEDDINGS, {"input": [5, 6, 7]})
    _, coded = await site.post(EMBEDDINGS, {"input": [5, 6, 7], "encoding_format": "base64"})
    expected = plain["data"][0]["embedding"]
    assert numbers(base64.b64decode(coded["data"][0]["embedding"])) == expected
    _, short = await site.post(EMBEDDINGS, {"input": [5, 6, 7], "dimensions": 3})
    first = expected[:3]
    assert short["data"][0]["embedding"] == pytest.approx([number / math.hypot(*first) for number in first])


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": ""}, None, None),
        ({"input": []}, "input", None),
        ({"input": [[]]}, "input", None),
        ({"input": ["a", 1]}, "input", None),
        ({"input": [True]}, "input[0]", "invalid_type"),
        ({"input": None}, "input", "invalid_type"),
        ({"input": [10**6]}, "input", None),
        ({"input": [-1]}, "input", None),
        ({"input": [5] * (WINDOW + 1)}, "input", "context_length_exceeded"),
        ({"input": ["a"] * 2049}, "input", None),
        ({"dimensions": 0}, "dimensions", None),
        ({"dimensions": EMBEDDING_SIZE + 1}, "dimensions", None),
        ({"dimensions": True}, "dimensions", "invalid_type"),
        ({"encoding_format": "int8"}, "encoding_format", "invalid_type"),
        ({"pooling": "max"}, "pooling", "invalid_type"),
        ({"pooling": "cls"}, "pooling", None),
        ({"priority": True}, "priority", "invalid_type"),
        ({"cache_salt": ""}, "cache_salt", None),
        ({"dimension": 3}, "dimension", "unknown_parameter"),
    ],
)
async def test_nonsense_is_refused_by_name(site: Site, fields: dict[str, Any], param: str | None, code: str | None):
    status, body = await site.post(EMBEDDINGS, {"input": "Hi", **fields})
    if param is None:  # an empty text still has the token that every text begins with
        assert status == 200
        return
    assert (status, body["error"]["param"], body["error"]["code"]) == (400, param, code), body
    assert site.engine.submitted == []


async def test_a_prompt_may_fill_the_window(site: Site):
    status, _ = await site.post(EMBEDDINGS, {"input": [5] * WINDOW})
    assert status == 200


async def test_a_model_that_only_embeds_generates_nothing(site: Site):
    site.engine.generates = False
    await site.engine.start()  # says what it can do anew
    chat = [{"role": "user", "content": "Hi"}]
    for path, fields in (("/v1/completions", {"prompt": "Hi"}), ("/v1/chat/completions", {"messages": chat})):
        status, body = await site.post(path, fields)
        assert (status, body["error"]["param"]) == (400, "model")
        assert "only computes embeddings" in body["error"]["message"]
    status, _ = await site.post(EMBEDDINGS, {"input": "Hi", "pooling": "cls"})
    assert status == 200


async def test_guards_see_the_input():
    config = {**OPEN, "guardrails": {"blocklist": ["forbidden"]}}
    async with running_server(config) as site:
        token_ids = text_bundle().tokenizer.encode("a forbidden word", add_special_tokens=False)
        for value in ("forbidden", ["fine", "forbidden"], token_ids, [token_ids]):
            status, body = await site.post(EMBEDDINGS, {"input": value})
            assert (status, body["error"]["code"]) == (403, "guardrail_blocked")
        assert site.engine.submitted == []
