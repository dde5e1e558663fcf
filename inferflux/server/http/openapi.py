"""GET /openapi.json: the API's schema, made of the same structs that read the bodies and write the answers.

Adds to `routes` what a caller wants to know of each route: what it is for, what it takes and what it gives.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache as cached
from types import MappingProxyType
from typing import Any, Final

import msgspec
from aiohttp import web

from inferflux import __version__
from inferflux.server.http.context import OPENAPI
from inferflux.server.http.middleware import PUBLIC
from inferflux.server.http.schemas import (
    admin,
    admin_models,
    cache,
    chat,
    completions,
    embeddings,
    health,
    models,
    pools,
    tokens,
)
from inferflux.server.http.schemas.errors import ErrorBody
from inferflux.server.policy.document import Fairness, Guardrails, RateLimit

JSON: Final = "application/json"
PATH: Final = "/openapi.json"

Struct = type[msgspec.Struct]


@dataclass(frozen=True, slots=True)
class Operation:
    """What a route is for. body, answer: the structs of its request and its answer; None: no body, or an answer of
    `content_type` that is not JSON. chunk: what the events of a streamed answer hold."""

    summary: str
    answer: Struct | None = None
    body: Struct | None = None
    chunk: Struct | None = None
    content_type: str = JSON


OPERATIONS: Final[Mapping[tuple[str, str], Operation]] = MappingProxyType(
    {
        ("POST", "/v1/chat/completions"): Operation(
            "Answer a list of messages", chat.ChatCompletion, chat.ChatRequest, chat.ChunkChoice
        ),
        ("POST", "/v1/completions"): Operation(
            "Continue prompts", completions.Completion, completions.CompletionRequest, completions.Completion
        ),
        ("POST", "/v1/embeddings"): Operation(
            "Texts to vectors", embeddings.EmbeddingList, embeddings.EmbeddingRequest
        ),
        ("GET", "/v1/models"): Operation("List the models", models.ModelList),
        ("GET", "/v1/models/{id}"): Operation("Show one model", models.ModelCard),
        ("POST", "/tokenize"): Operation(
            "Text or messages to token ids", tokens.TokenizeResponse, tokens.TokenizeRequest
        ),
        ("POST", "/detokenize"): Operation("Token ids to text", tokens.DetokenizeResponse, tokens.DetokenizeRequest),
        ("GET", "/v1/admin/api_keys"): Operation("List the API keys, without the keys themselves", admin.KeyList),
        ("POST", "/v1/admin/api_keys"): Operation(
            "Make an API key, shown this once", admin.KeyCard, admin.NewKeyRequest
        ),
        ("DELETE", "/v1/admin/api_keys"): Operation("Revoke an API key", admin.Revoked, admin.KeyId),
        ("GET", "/v1/admin/cache"): Operation("Show the cached pages of every tier", cache.CacheList),
        ("DELETE", "/v1/admin/cache"): Operation("Drop every cached page", cache.Dropped, cache.DropRequest),
        ("POST", "/v1/admin/cache/warm"): Operation("Compute a prompt ahead", cache.Warmed, cache.WarmRequest),
        ("GET", "/v1/admin/fairness"): Operation("Show how requests are ordered", Fairness),
        ("PUT", "/v1/admin/fairness"): Operation("Change how requests are ordered", Fairness, admin.FairnessRequest),
        ("GET", "/v1/admin/guardrails"): Operation("Show what may not be said", Guardrails),
        ("PUT", "/v1/admin/guardrails"): Operation("Change what may not be said", Guardrails, admin.GuardrailsRequest),
        ("GET", "/v1/admin/models"): Operation(
            "Show the models, their engines and the registry", admin_models.AdminModelList
        ),
        ("POST", "/v1/admin/models"): Operation(
            "Serve a model, in place of the one of its id", admin_models.AdminModelCard, admin_models.LoadRequest
        ),
        ("DELETE", "/v1/admin/models"): Operation(
            "Stop serving a model", admin_models.Unloaded, admin_models.UnloadRequest
        ),
        ("PUT", "/v1/admin/models/default"): Operation(
            "Choose the model of requests that name none", admin_models.Default, admin_models.DefaultRequest
        ),
        ("GET", "/v1/admin/policy"): Operation("Show how the policy store is kept", admin.PolicyCard),
        ("GET", "/v1/admin/pools"): Operation("Show readiness, queues, batches and KV pages", pools.Pools),
        ("GET", "/v1/admin/rate_limit"): Operation("Show the limit of requests a minute", RateLimit),
        ("PUT", "/v1/admin/rate_limit"): Operation(
            "Change the limit of requests a minute", RateLimit, admin.RateLimitRequest
        ),
        ("GET", "/livez"): Operation("Whether the server is alive", health.Probe),
        ("GET", "/health"): Operation("The same as /livez", health.Probe),
        ("GET", "/readyz"): Operation("Whether the default model serves", health.Probe),
        ("GET", "/healthz"): Operation("Models, queue, uptime and version", health.Health),
        ("GET", "/metrics"): Operation("Prometheus metrics", content_type="text/plain"),
        ("GET", PATH): Operation("This document"),
        ("GET", "/ui"): Operation("The operator's page", content_type="text/html"),
        ("GET", "/ui/{file}"): Operation("A file of the operator's page", content_type="text/javascript"),
    }
)

_DESCRIPTION: Final = (
    "OpenAI's API, and InferFlux's own routes beside it. Every route but those for health, metrics and pages needs a "
    "key with the scope named in `x-scope`."
)
_PLACEHOLDER: Final = re.compile(r"\{(\w+)(?::[^}]*)?\}")


async def openapi(request: web.Request) -> web.Response:
    return web.Response(body=request.app[OPENAPI], content_type=JSON)


def document(routes: Iterable[Any]) -> bytes:
    """Returns the document for these `routes.Route`s."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = _PLACEHOLDER.sub(r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route.method, path, route.scope)
    security = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    components = {"schemas": _schemas()[1], "securitySchemes": security}
    info = {"title": "InferFlux", "version": __version__, "description": _DESCRIPTION}
    return msgspec.json.encode({"openapi": "3.1.0", "info": info, "paths": paths, "components": components})


def _operation(method: str, path: str, scope: str) -> dict[str, Any]:
    known = OPERATIONS[method, path]
    described: dict[str, Any] = {"summary": known.summary, "responses": _responses(known, scope)}
    names = _PLACEHOLDER.findall(path)
    if names:
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if known.body is not None:
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": _reference(known.body)}}}
    if scope != PUBLIC:
        described |= {"security": [{"bearer": []}, {"key": []}], "x-scope": scope}
    return described


def _responses(known: Operation, scope: str) -> dict[str, Any]:
    schema = (
        _reference(known.answer) if known.answer else {"type": "object" if known.content_type == JSON else "string"}
    )
    content = {known.content_type: {"schema": schema}}
    if known.chunk is not None:
        content["text/event-stream"] = {"schema": {"type": "string"}, "x-event-choice": _reference(known.chunk)}
    responses = {"200": {"description": "The answer", "content": content}}
    if scope != PUBLIC:
        error = {JSON: {"schema": _reference(ErrorBody)}}
        responses["default"] = {"description": "What went wrong; `x-request-id` names the request", "content": error}
    return responses


def _reference(kind: Struct) -> Mapping[str, Any]:
    return _schemas()[0][kind]


@cached
def _schemas() -> tuple[Mapping[Struct, Mapping[str, Any]], Mapping[str, Any]]:
    """Returns each struct's reference, and the component schemas they refer to."""
    structs: set[Struct] = {ErrorBody}
    for known in OPERATIONS.values():
        structs |= {kind for kind in (known.answer, known.body, known.chunk) if kind is not None}
    ordered = sorted(structs, key=lambda kind: kind.__name__)
    references, components = msgspec.json.schema_components(ordered, ref_template="#/components/schemas/{name}")
    return dict(zip(ordered, references, strict=True)), components
