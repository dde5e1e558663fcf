"""Every field out of range, of the wrong type, or nonsense: a 400 in OpenAI's shape that names it, and a server that
goes on."""

import gzip
import json
import time
from typing import Any

import pytest
import pytest_asyncio

from tests.support.fake_engine import WINDOW
from tests.support.http_server import Site, running_server

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
BASE: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
    COMPLETIONS: {"prompt": "Hi"},
}
HUGE = 10**30

# Field: values that are refused, on both routes. A float where an integer belongs, a boolean where a number does.
BOTH: dict[str, list[Any]] = {
    "model": [1, ["m"], {}],
    "max_tokens": [-1, 0, 1.5, "5", True, HUGE, [1]],
    "temperature": [-0.1, 2.1, "1", True, HUGE, [1.0]],
    "top_p": [0, -0.1, 1.1, "1", False],
    "top_k": [-1, 0.5, "1", True, HUGE],
    "min_p": [-0.1, 1.1, "0", True],
    "repetition_penalty": [0, -1, 10.5, "1", True],
    "presence_penalty": [-2.1, 2.1, "1", True],
    "frequency_penalty": [-2.1, 2.1, "1", True],
    "n": [0, -1, 17, 1.5, "1", True, HUGE],
    "seed": [1.5, "1", True, 2**63, -HUGE],
    "stop": ["", [""], [1], 1, {}, ["x"] * 17, "x" * 257],
    "stop_token_ids": [[-1], ["1"], [True], [1.5], [2**31], list(range(129)), 5],
    "min_tokens": [-1, "1", True, 1.5, 10_000],
    "ignore_eos": ["yes", 1, 0],
    "stream": ["true", 1],
    "stream_options": [{"include_usage": True}, 1, [], "x"],
    "logit_bias": [{"x": 1}, {"1": "1"}, {"1": 101}, {"-1": 0}, {"1": True}, [1], {str(HUGE): 1}, {"1": None}],
    "priority": ["high", 1.5, True, 2**31, -HUGE],
    "cache_salt": ["", "x" * 257, 5, []],
    "return_token_ids": ["yes", 1],
    "store": [True],
    "response_format": ["json", {}, {"type": "xml"}, {"type": "json_schema"}, {"type": "text", "schema": {}}],
    "structured_outputs": ["x", {}, {"regex": "a", "choice": ["b"]}, {"rgx": "a"}, {"json_object": False}],
    "temprature": [1],
    "'; DROP TABLE": [None],
}
ROUTED: dict[str, dict[str, list[Any]]] = {
    CHAT: {
        "messages": [None, [], {}, "Hi", [1], [None], [{}], [{"role": "user"}]],
        "max_completion_tokens": [0, -1, "1", True],
        "logprobs": [1, "true"],
        "top_logprobs": [0, 5],
        "tools": [[{"type": "function", "function": {"name": "f"}}], {}, [{"type": "function"}], [{"type": "custom"}]],
        "tool_choice": ["required", "some", {"type": "function"}, {"type": "function", "function": {"name": "f"}}],
        "parallel_tool_calls": ["yes", 1],
        "chat_template_kwargs": ["x", [], 1],
        "functions": [[{"name": "f"}]],
        "modalities": [["audio"]],
        "audio": [{"voice": "x"}],
    },
    COMPLETIONS: {
        "prompt": [None, 1, {}, [], [[]], [1, "a"], ["a", [1]], [True], [1.5], [[1, "x"]], [-1], [HUGE], [10**6]],
        "logprobs": [-1, 21, True, "1", 1.5],
        "echo": ["yes", 1],
        "suffix": ["end"],
        "best_of": [0, -1, 17, 1.5, "2", True],
    },
}
CASES = [
    (path, field, value)
    for path in BASE
    for field, values in {**BOTH, **ROUTED[path]}.items()
    for value in values
    if (path, field, value) != (COMPLETIONS, "max_tokens", 0)
]
# More than one field, and where the blame goes.
COMBINATIONS = [
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    (CHAT, {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
    (CHAT, {"max_tokens": WINDOW}, "max_tokens"),
    *(
        (path, {field: value}, f"{field}.{rest}")
        for path in BASE
        for field, value, rest in [
            ("structured_outputs", {"regex": "("}, "regex"),
            ("structured_outputs", {"grammar": "start: nope"}, "grammar"),
            ("structured_outputs", {"json": {"type": "wrong"}}, "json"),
            ("structured_outputs", {"json": "{"}, "json"),
            ("structured_outputs", {"choice": []}, "choice"),
            ("structured_outputs", {"choice": ["a", ""]}, "choice"),
            (
                "response_format",
                {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
                "json_schema.name",
            ),
            ("response_format", {"type": "json_object", "json_schema": {"name": "a"}}, "json_schema"),
            (
                "response_format",
                {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#/nowhere"}}},
                "json_schema.schema",
            ),
        ]
    ),
    (CHAT, {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    (CHAT, {"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
    (CHAT, {"messages": [{"role": "assistant", "content": [{"type": "refusal"}]}]}, "messages[0].content[0].refusal"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}]},
        "messages[0].content[0]",
    ),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0].function"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "colour": "red"}]}, "messages[0].colour"),
    (CHAT, {"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 5000}]}, "messages"),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
    (COMPLETIONS, {"echo": True, "max_tokens": 0, "min_tokens": 1}, "min_tokens"),
    (COMPLETIONS, {"prompt": [5] * WINDOW}, "prompt"),
    (COMPLETIONS, {"prompt": [5] * 200, "max_tokens": 57}, "max_tokens"),
    (COMPLETIONS, {"prompt": ["x"] * 1025}, "prompt"),
    (COMPLETIONS, {"n": 2, "best_of": 1}, "best_of"),
    (COMPLETIONS, {"best_of": 2, "stream": True}, "best_of"),
    (COMPLETIONS, {"prompt": ["x"] * 100, "best_of": 16}, "n"),
    (COMPLETIONS, {"prompt": ["x"] * 100, "n": 16}, "n"),
    (COMPLETIONS, {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site():
    async with running_server() as site:
        yield site


async def check_refused(site: Site, path: str, body: Any, field: str) -> None:
    start = time.process_time()
    status, answer = await site.post(path, body)
    assert status == 400, answer
    assert time.process_time() - start < 1
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(field), error
    assert field in error["message"], error
    assert (await site.get("/livez"))[0] == 200
    assert site.engine.submitted == [], "a refused request must not reach the engine"


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("path", "field", "value"), CASES, ids=lambda value: str(value)[:24])
async def test_field_is_refused_by_name(site: Site, path: str, field: str, value: Any):
    await check_refused(site, path, {**BASE[path], field: value}, field)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("path", "fields", "blamed"), COMBINATIONS)
async def test_fields_that_do_not_go_together(site: Site, path: str, fields: dict[str, Any], blamed: str):
    await check_refused(site, path, {**BASE[path], **fields}, blamed)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": [{"role": "robot", "content": "x"}]}, "must be one of assistant, developer, system, tool, user"),
        ({"messages": [{"role": "user", "content": "x", "nam": "y"}]}, 'did you mean "name"?'),
        ({"response_format": {"type": "xml"}}, "must be one of json_object, json_schema, text"),
        ({"tool_choice": "always"}, "must be one of auto, none, required"),
        ({"stream": True, "stream_options": {"include_usag": True}}, 'did you mean "include_usage"?'),
    ],
)
async def test_refusal_says_what_is_accepted(site: Site, fields: dict[str, Any], words: str):
    _, answer = await site.post(CHAT, {**BASE[CHAT], **fields})
    assert words in answer["error"]["message"]


@pytest.mark.asyncio(loop_scope="module")
async def test_context_overflow_has_its_code(site: Site):
    for body in ({"prompt": [5] * WINDOW}, {"prompt": [5] * 200, "max_tokens": 57}):
        _, answer = await site.post(COMPLETIONS, body)
        assert answer["error"]["code"] == "context_length_exceeded"


RAW_BODIES = {
    "empty": b"",
    "not json": b"prompt=Hi",
    "cut off": b'{"prompt": "Hi"',
    "list": b"[]",
    "null": b"null",
    "string": b'"prompt"',
    "trailing": b'{"prompt": "Hi"} {}',
    "bad utf-8": b'{"prompt": "\xff"}',
    "utf-16": '{"prompt": "Hi"}'.encode("utf-16"),
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "deep": b'{"prompt": ' + b"[" * 100_000,
    "deep unknown": b'{"prompt": "Hi", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep unsupported": b'{"prompt": "Hi", "suffix": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    "long number": b'{"prompt": "Hi", "seed": ' + b"9" * 100_000 + b"}",
    "many keys": json.dumps({"prompt": "Hi", **{f"k{i}": i for i in range(20_000)}}).encode(),
}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
@pytest.mark.parametrize("name", RAW_BODIES)
async def test_nonsense_bodies(site: Site, name: str, path: str):
    start = time.process_time()
    async with site.session.post(site.url + path, data=RAW_BODIES[name]) as response:
        assert response.status == 400
        assert (await response.json())["error"]["message"]
    assert time.process_time() - start < 1
    assert site.engine.submitted == []


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
async def test_numbers_that_json_does_not_have_name_their_field(site: Site, value: str):
    body = f'{{"prompt": "Hi", "top_p": 0.5, "temperature": {value}}}'
    async with site.session.post(site.url + COMPLETIONS, data=body) as response:
        answer = await response.json()
        assert (response.status, answer["error"]["param"]) == (400, "temperature")


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"n": 1, "prompt": "caf\xe9"}', "prompt"),
        (b'{"prompt": "an \\"e\\" \xe9"}', "prompt"),
        (b'{"prompt": ["\xff"]}', "prompt"),
        (b'{"prompt": "Hi", "user": "\\x"}', "user"),
        (b'{"prompt": "\\ud800"}', "prompt"),
        (b'{"prompt": ["b\\ud800"]}', "prompt"),
        (b'{"prompt": "Hi", "user": "\\udbff"}', "user"),
        (b'{"prompt": "Hi", "n": 1, "\xff": 2}', None),
        (b'{"prompt": "Hi", "\\ud800":2}', None),
    ],
)
async def test_text_that_is_not_unicode_names_its_field(site: Site, body: bytes, param: str | None):
    async with site.session.post(site.url + COMPLETIONS, data=body) as response:
        answer = await response.json()
        assert (response.status, answer["error"]["param"]) == (400, param)


@pytest.mark.asyncio(loop_scope="module")
async def test_unknown_field_gets_a_hint(site: Site):
    _, answer = await site.post(COMPLETIONS, {"prompt": "Hi", "max_token": 5})
    assert 'did you mean "max_tokens"?' in answer["error"]["message"]


@pytest.mark.asyncio(loop_scope="module")
async def test_repeated_fields_count_once(site: Site):
    """As in every JSON library: the last one wins, for the check and for the value alike."""
    body = b'{"prompt": "Hi", "n": 1, "n": 99}'
    async with site.session.post(site.url + COMPLETIONS, data=body) as response:
        assert (await response.json())["error"]["param"] == "n"


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "body",
    [
        {"model": "x" * 10**6, "prompt": "Hi"},
        {"prompt": "Hi", "y" * 10**6: 1},
        {"prompt": "Hi", "stop": "z" * 10**6},
        {"prompt": "Hi", "stream_options": {"q" * 10**6: 1}, "stream": True},
    ],
    ids=["model", "name", "value", "inner name"],
)
async def test_long_nonsense_is_not_sent_back(site: Site, body: dict[str, Any]):
    start = time.process_time()
    status, answer = await site.post(COMPLETIONS, body)
    assert status in (400, 404)
    assert len(str(answer)) < 1000
    assert time.process_time() - start < 1


@pytest.mark.asyncio(loop_scope="module")
async def test_a_long_role_is_not_sent_back(site: Site):
    _, answer = await site.post(CHAT, {"messages": [{"role": "r" * 10**6, "content": ""}]})
    assert answer["error"]["param"] == "messages[0].role"
    assert len(str(answer)) < 1000


TOKEN_CASES: list[tuple[str, dict[str, Any], str]] = [
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
    ("/tokenize", {"prompt": 5}, "prompt"),
    ("/tokenize", {"messages": []}, "messages"),
    ("/tokenize", {"text": "a"}, "text"),
    ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
    ("/tokenize", {"prompt": "a", "add_generation_prompt": False}, "add_generation_prompt"),
    ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
    ("/tokenize", {"prompt": "a", "chat_template_kwargs": {}}, "chat_template_kwargs"),
    ("/tokenize", {"messages": [{"role": "user", "content": ""}], "tool_choice": "required"}, "tool_choice"),
    (
        "/tokenize",
        {"messages": [{"role": "user", "content": ""}], "tools": [{"type": "function", "function": {"name": "f"}}]},
        "tools",
    ),
    ("/detokenize", {}, "tokens"),
    ("/detokenize", {"tokens": "a"}, "tokens"),
    ("/detokenize", {"tokens": [1.5]}, "tokens[0]"),
    ("/detokenize", {"tokens": [True]}, "tokens[0]"),
    ("/detokenize", {"tokens": [-1]}, "tokens"),
    ("/detokenize", {"tokens": [HUGE]}, "tokens"),
]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("path", "body", "field"), TOKEN_CASES)
async def test_token_routes(site: Site, path: str, body: dict[str, Any], field: str):
    await check_refused(site, path, body, field)


async def test_body_over_the_limit_is_413_however_it_comes():
    config = {"server": {"max_body_mb": 0.01}, "auth": {"allow_anonymous": True}}
    large = json.dumps({"prompt": "x" * 20_000}).encode()

    async def in_pieces():
        for start in range(0, len(large), 1000):
            yield large[start : start + 1000]

    async with running_server(config) as site:
        for data in (large, in_pieces()):
            async with site.session.post(site.url + COMPLETIONS, data=data) as response:
                assert response.status == 413
                assert (await response.json())["error"]["code"] == "body_too_large"
        assert (await site.post(COMPLETIONS, {"prompt": "Hi"}))[0] == 200


@pytest.mark.parametrize(
    "data",
    [gzip.compress(b'{"prompt": "Hi"}'), gzip.compress(b" " * 10**8), b"nonsense"],
    ids=["small", "bomb", "nonsense"],
)
async def test_compressed_bodies_are_refused_unopened(data: bytes):
    async with running_server() as site:
        headers = {"Content-Encoding": "gzip"}
        async with site.session.post(site.url + COMPLETIONS, data=data, headers=headers) as response:
            assert response.status == 400
            assert "compressed" in (await response.json())["error"]["message"]
