"""GET /openapi.json: valid by the specification's own validator, complete, and true to what the server answers."""

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
        (CHAT, {"messages": [], "logprobs": True}, ("max_completion_tokens", "top_logprobs")),
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
