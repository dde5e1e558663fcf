"""GET /openapi.json: valid by the specification's own validator, complete, and true to what the server answers."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import msgspec
import pytest
from openapi_spec_validator import validate

from inferflux.errors import RequestError
from inferflux.server.http.openapi import document
from inferflux.server.http.routes import ROUTES
from inferflux.server.http.schemas.body import BodyReader
from inferflux.server.http.schemas.chat import CHAT
from inferflux.server.http.schemas.completions import COMPLETION
from tests.support.http_server import KEYED, MODEL, OPEN, running_server
from tests.support.templates import bundle

USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def schema() -> Any:
    return msgspec.json.decode(document(ROUTES))


def test_valid_by_the_specification(schema: Any) -> None:
    validate(schema)


def test_every_route_is_there_with_its_scope(schema: Any) -> None:
    listed = {
        (method.upper(), path): operation.get("x-scope", "public")
        for path, operations in schema["paths"].items()
        for method, operation in operations.items()
    }
    assert listed == {(route.method, route.path.replace(":.+}", "}")): route.scope for route in ROUTES}


async def test_anybody_may_read_it() -> None:
    async with running_server(KEYED) as site:
        status, body = await site.get("/openapi.json")
    assert (status, body["openapi"]) == (200, "3.1.0")


def schema_of(schema: Any, method: str, path: str) -> dict[str, Any]:
    content = schema["paths"][path][method]["responses"]["200"]["content"]
    return {**content["application/json"]["schema"], "components": schema["components"]}


async def test_answers_are_what_it_says(schema: Any) -> None:
    async with running_server(OPEN) as site:
        chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "logprobs": True}
        answers = {
            ("post", "/v1/chat/completions"): await site.post("/v1/chat/completions", chat),
            ("post", "/v1/completions"): await site.post("/v1/completions", {"prompt": "Hi", "max_tokens": 5}),
            ("post", "/tokenize"): await site.post("/tokenize", {"prompt": "Hi"}),
            ("get", "/v1/models"): await site.get("/v1/models"),
            ("get", "/v1/models/{id}"): await site.get(f"/v1/models/{MODEL}"),
            ("get", "/healthz"): await site.get("/healthz"),
        }
    for (method, path), (status, body) in answers.items():
        assert status == 200, body
        jsonschema.validate(body, schema_of(schema, method, path), jsonschema.Draft202012Validator)


def test_request_examples_meet_their_schema(schema: Any) -> None:
    reference = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    check = jsonschema.Draft202012Validator({**reference, "components": schema["components"]})
    check.validate({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "temperature": 0.5})
    with pytest.raises(jsonschema.ValidationError):
        check.validate({"messages": "Hi"})


def test_a_body_takes_no_field_that_its_schema_does_not_name(schema: Any) -> None:
    for operations in schema["paths"].values():
        for operation in operations.values():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                name = content["schema"]["$ref"].rpartition("/")[2]
                assert schema["components"]["schemas"][name]["additionalProperties"] is False, name
    check = jsonschema.Draft202012Validator(
        {"$ref": "#/components/schemas/ChatRequest", "components": schema["components"]}
    )
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    check.validate({**body, "user": "alice", "store": False})
    for extra in ({"temprature": 1}, {"store": True}):
        with pytest.raises(jsonschema.ValidationError):
            check.validate({**body, **extra})


NUMBERS = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")
NUMBERS += ("frequency_penalty", "logit_bias", "seed", "stop_token_ids", "min_tokens", "n", "priority")


def bounded(schema: dict[str, Any]) -> Iterator[tuple[Callable[[Any], Any], dict[str, Any]]]:
    """Yields how a number is put into the field, and what is said of it."""
    for kind in schema.get("anyOf", ()):
        if "items" in kind:
            yield (lambda number: [number]), kind["items"]
        elif isinstance(kind.get("additionalProperties"), dict):
            yield (lambda number: {"5": number}), kind["additionalProperties"]
        elif kind["type"] in ("integer", "number"):
            yield (lambda number: number), kind


@pytest.mark.parametrize(
    ("reader", "base", "own"),
    [
        (CHAT, {"messages": [USER], "logprobs": True}, ("max_completion_tokens", "top_logprobs")),
        (COMPLETION, {"prompt": "Hi", "echo": True}, ("logprobs", "best_of")),
    ],
    ids=["chat", "completions"],
)
def test_numbers_are_taken_within_the_ranges_it_says(
    schema: Any, reader: BodyReader[Any], base: dict[str, Any], own: tuple[str, ...]
) -> None:
    title = reader.kind.__name__
    check = jsonschema.Draft202012Validator(
        {"$ref": f"#/components/schemas/{title}", "components": schema["components"]}
    )

    def is_taken(body: dict[str, Any]) -> bool:
        try:
            request = reader.read(msgspec.json.encode(body))
            request.check()
            request.sampling(getattr(request, "token_limit", request.max_tokens), logprobs=request.num_logprobs)
        except RequestError:
            return False
        return True

    for name in (*NUMBERS, *own):
        ((put, bounds),) = bounded(schema["components"]["schemas"][title]["properties"][name])
        low, high = bounds.get("minimum", bounds.get("exclusiveMinimum")), bounds["maximum"]
        step = 1 if bounds["type"] == "integer" else 0.001
        for number in (low - step, low, low + step, high - step, high, high + step):
            body = {**base, name: put(number)}
            is_right = low <= number <= high and number != bounds.get("exclusiveMinimum")
            assert (is_taken(body), check.is_valid(body)) == (is_right, is_right), (name, number)


@pytest.mark.parametrize(
    ("reader", "name", "value", "other"),
    [
        (CHAT, "stream_options", {"include_usage": True}, "stream"),
        (COMPLETION, "stream_options", {}, "stream"),
        (CHAT, "top_logprobs", 2, "logprobs"),
    ],
)
def test_fields_need_each_other_as_it_says(
    schema: Any, reader: BodyReader[Any], name: str, value: Any, other: str
) -> None:
    check = jsonschema.Draft202012Validator(
        {"$ref": f"#/components/schemas/{reader.kind.__name__}", "components": schema["components"]}
    )
    base = {"messages": [USER]} if reader is CHAT else {"prompt": "Hi"}
    for fields, is_right in (
        ({name: value, other: True}, True),
        ({name: None}, True),
        ({name: value}, False),
        ({name: value, other: False}, False),
        ({name: value, other: None}, False),
    ):
        body = {**base, **fields}
        with contextlib.nullcontext() if is_right else pytest.raises(RequestError, match=f"{name}: requires {other}"):
            reader.read(msgspec.json.encode(body)).check()
        assert check.is_valid(body) == is_right, body


def tools(count: int, name: str = "f") -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": f"{name}{index}"}} for index in range(count)]


def shape(name: str) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": {}}}


# Of each field a value that is taken (the largest, where a small model allows it), and values that are not.
SIZES: list[tuple[str, str, Any, list[Any]]] = [
    ("/v1/chat/completions", "messages", [USER], [[], [USER] * 4097]),
    ("/v1/chat/completions", "tools", tools(8), [tools(129), tools(1, "no space "), tools(1, "f" * 64)]),
    ("/v1/chat/completions", "response_format", shape("a-B_9"), [shape(""), shape("é"), shape("a" * 65)]),
    ("/v1/completions", "stop", ["x" * 256] * 16, ["", [""], "x" * 257, ["x" * 257], ["x"] * 17]),
    ("/v1/completions", "stop_token_ids", [5] * 128, [[5] * 129]),
    ("/v1/completions", "logit_bias", {str(number): 1 for number in range(100)}, [{"05": 1}, {"-1": 1}, {"a": 1}]),
    ("/v1/completions", "cache_salt", "x" * 256, ["", "x" * 257]),
    ("/v1/completions", "prompt", ["Hi"], [[], [[]]]),
    ("/v1/completions", "structured_outputs", {"choice": ["x"] * 1024}, [{"choice": []}, {"choice": [""]}]),
    ("/v1/embeddings", "input", ["Hi"], [[], [[]]]),
    ("/v1/embeddings", "dimensions", 1, [0, -1]),
    ("/v1/admin/guardrails", "opa_endpoint", "https://opa.example", ["opa.example", "ftp://opa.example"]),
]
NEEDED = {
    "/v1/chat/completions": {"messages": [USER], "max_tokens": 1},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 1},
    "/v1/embeddings": {"input": "Hi"},
}


@pytest.mark.parametrize(("path", "name", "taken", "refused"), SIZES, ids=[f"{row[0]} {row[1]}" for row in SIZES])
async def test_sizes_and_names_are_taken_as_it_says(
    schema: Any, path: str, name: str, taken: Any, refused: list[Any]
) -> None:
    method = "put" if path.endswith("guardrails") else "post"
    said = schema["paths"][path][method]["requestBody"]["content"]["application/json"]["schema"]
    check = jsonschema.Draft202012Validator({**said, "components": schema["components"]})
    key = {"Authorization": "Bearer sk-admin"}
    config = {**OPEN, "auth": {"api_keys": [{"key": "sk-admin", "name": "a", "scopes": ["generate", "admin"]}]}}
    async with running_server(config, text=bundle()) as site:
        for value, is_right in ((taken, True), *((value, False) for value in refused)):
            body = {**NEEDED.get(path, {}), name: value}
            async with site.session.request(method, site.url + path, json=body, headers=key) as response:
                status, answer = response.status, await response.text()
            assert (status, check.is_valid(body)) == (200 if is_right else 400, is_right), answer


async def test_refusals_of_public_routes_are_what_it_says(schema: Any) -> None:
    async with running_server(OPEN) as site:
        missing = await site.get("/ui/nothing")
        site.admission.close()
        draining = await site.get("/readyz")
    for path, status, (got, body) in (("/ui/{file}", "default", missing), ("/readyz", "503", draining)):
        content = schema["paths"][path]["get"]["responses"][status]["content"]["application/json"]
        assert got in (404, 503)
        whole = {**content["schema"], "components": schema["components"]}
        jsonschema.validate(body, whole, jsonschema.Draft202012Validator)
