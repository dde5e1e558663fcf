"""GET /openapi.json: valid by the specification's own validator, complete, and true to what the server answers."""

from typing import Any

import jsonschema
import msgspec
import pytest
from openapi_spec_validator import validate

from inferflux.server.http.openapi import document
from inferflux.server.http.routes import ROUTES
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
