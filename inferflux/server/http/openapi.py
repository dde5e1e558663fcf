"""GET /openapi.json: the API's schema, made of the same structs that read the bodies and write the answers.

Adds to `routes` what a caller wants to know of each route: what it is for, what it takes and what it gives.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache as cached
from types import MappingProxyType
from typing import Any, Final

import msgspec
from aiohttp import web

from inferflux import __version__
from inferflux.sampling_params import Range
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
from inferflux.server.http.schemas.body import BodyReader
from inferflux.server.http.schemas.errors import ErrorBody
from inferflux.server.policy.document import Fairness, Guardrails, RateLimit

JSON: Final = "application/json"
PATH: Final = "/openapi.json"

Struct = type[msgspec.Struct]


@dataclass(frozen=True, slots=True)
class Operation:
    """What a route is for. body: what reads its request; None: it has none. answers: the structs it may answer with;
    none: an answer of `content_type`, or any object. chunk: what the events of a streamed answer hold. further: other
    statuses that come with such an answer, and what they mean. tagged: its answers have an ETag, and its changes may be
    bound to one."""

    summary: str
    answers: tuple[Struct, ...] = ()
    body: BodyReader[Any] | None = None
    chunk: Struct | None = None
    content_type: str = JSON
    further: Mapping[int, str] = field(default_factory=dict)
    tagged: bool = False


OPERATIONS: Final[Mapping[tuple[str, str], Operation]] = MappingProxyType(
    {
        ("POST", "/v1/chat/completions"): Operation(
            "Answer a list of messages", (chat.ChatCompletion,), chat.CHAT, chat.ChunkChoice
        ),
        ("POST", "/v1/completions"): Operation(
            "Continue prompts", (completions.Completion,), completions.COMPLETION, completions.Completion
        ),
        ("POST", "/v1/embeddings"): Operation("Compute embeddings", (embeddings.EmbeddingList,), embeddings.EMBEDDING),
        ("GET", "/v1/models"): Operation("List the models", (models.ModelList,)),
        ("GET", "/v1/models/{id}"): Operation("Show one model", (models.ModelCard,)),
        ("POST", "/tokenize"): Operation("Tokenize text or messages", (tokens.TokenizeResponse,), tokens.TOKENIZE),
        ("POST", "/detokenize"): Operation("Turn token ids into text", (tokens.DetokenizeResponse,), tokens.DETOKENIZE),
        ("GET", "/v1/admin/api_keys"): Operation("List the API keys, without the keys themselves", (admin.KeyList,)),
        ("POST", "/v1/admin/api_keys"): Operation(
            "Create an API key, shown only once", (admin.KeyCard,), admin.NEW_KEY
        ),
        ("DELETE", "/v1/admin/api_keys"): Operation("Revoke an API key", (admin.Revoked,), admin.KEY_ID),
        ("GET", "/v1/admin/cache"): Operation("Show the cached pages of every tier", (cache.CacheList,)),
        ("DELETE", "/v1/admin/cache"): Operation("Drop every cached page", (cache.Dropped,), cache.DROP),
        ("POST", "/v1/admin/cache/warm"): Operation("Compute a prompt ahead of time", (cache.Warmed,), cache.WARM),
        ("GET", "/v1/admin/fairness"): Operation("Show scheduling policy and preemption", (Fairness,), tagged=True),
        ("PUT", "/v1/admin/fairness"): Operation(
            "Change scheduling policy and preemption", (Fairness,), admin.FAIRNESS, tagged=True
        ),
        ("GET", "/v1/admin/guardrails"): Operation("Show the guardrails", (Guardrails,), tagged=True),
        ("PUT", "/v1/admin/guardrails"): Operation(
            "Change the guardrails", (Guardrails,), admin.GUARDRAILS, tagged=True
        ),
        ("GET", "/v1/admin/models"): Operation(
            "Show the models, their engines and the registry", (admin_models.AdminModelList,)
        ),
        ("POST", "/v1/admin/models"): Operation(
            "Load a model; replaces a served one of the same id",
            (admin_models.AdminModelCard,),
            admin_models.LOAD,
            further={202: "Still loading, for longer than the request timeout"},
        ),
        ("DELETE", "/v1/admin/models"): Operation(
            "Stop serving a model",
            (admin_models.Unloaded, admin_models.Forgotten),
            admin_models.UNLOAD,
            further={202: "Will be unloaded when its running requests have finished"},
        ),
        ("PUT", "/v1/admin/models/default"): Operation(
            "Set the default model", (admin_models.Default,), admin_models.DEFAULT
        ),
        ("GET", "/v1/admin/policy"): Operation("Show the state of the policy store", (admin.PolicyCard,)),
        ("GET", "/v1/admin/pools"): Operation("Show readiness, queues, batches and KV pages", (pools.Pools,)),
        ("GET", "/v1/admin/rate_limit"): Operation("Show the request rate limit", (RateLimit,), tagged=True),
        ("PUT", "/v1/admin/rate_limit"): Operation(
            "Change the request rate limit", (RateLimit,), admin.RATE_LIMIT, tagged=True
        ),
        ("GET", "/livez"): Operation(
            "Whether the server is alive", (health.Probe,), further={503: "An engine is stuck"}
        ),
        ("GET", "/health"): Operation("The same as /livez", (health.Probe,), further={503: "An engine is stuck"}),
        ("GET", "/readyz"): Operation(
            "Whether the default model is ready", (health.Probe,), further={503: "Not ready"}
        ),
        ("GET", "/healthz"): Operation("Models, queue, uptime and version", (health.Health,)),
        ("GET", "/metrics"): Operation("Prometheus metrics", content_type="text/plain"),
        ("GET", PATH): Operation("This document"),
        ("GET", "/ui"): Operation("The web page", content_type="text/html"),
        ("GET", "/ui/{file}"): Operation("A file of the web page", content_type="text/javascript"),
    }
)

_DESCRIPTION: Final = (
    "The OpenAI API and InferFlux's own routes. All routes except health checks, metrics and pages require a "
    "key with the scope named in `x-scope`."
)
_IF_MATCH: Final = "An ETag of this resource; if it has changed since, the change is refused with 412"
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
    described: dict[str, Any] = {"summary": known.summary, "responses": _responses(known)}
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _PLACEHOLDER.findall(path)
    ]
    if known.tagged and known.body is not None:
        parameters.append({"name": "If-Match", "in": "header", "description": _IF_MATCH, "schema": {"type": "string"}})
    if parameters:
        described["parameters"] = parameters
    if known.body is not None:
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": _reference(known.body.kind)}}}
    if scope != PUBLIC:
        described |= {"security": [{"bearer": []}, {"key": []}], "x-scope": scope}
    return described


def _responses(known: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {known.content_type: {"schema": _answer(known)}}
    responses = {str(status): {"description": words, "content": content} for status, words in known.further.items()}
    if known.chunk is not None:
        content = {**content, "text/event-stream": {"x-event-choice": _reference(known.chunk)}}
    error = {JSON: {"schema": _reference(ErrorBody)}}
    tag = {"headers": {"ETag": {"schema": {"type": "string"}}}} if known.tagged else {}
    return {
        "200": {"description": "Success", "content": content, **tag},
        **responses,
        "default": {"description": "An error; `x-request-id` identifies the request", "content": error},
    }


def _answer(known: Operation) -> Mapping[str, Any]:
    if not known.answers:
        return {"type": "object" if known.content_type == JSON else "string"}
    first, *others = (_reference(kind) for kind in known.answers)
    return {"anyOf": [first, *others]} if others else first


def _reference(kind: Struct) -> Mapping[str, Any]:
    return _schemas()[0][kind]


@cached
def _schemas() -> tuple[Mapping[Struct, Mapping[str, Any]], Mapping[str, Any]]:
    """Returns each struct's reference, and the component schemas they refer to."""
    readers = [known.body for known in OPERATIONS.values() if known.body is not None]
    structs: set[Struct] = {ErrorBody, *(reader.kind for reader in readers)}
    for known in OPERATIONS.values():
        structs.update(known.answers, () if known.chunk is None else (known.chunk,))
    ordered = sorted(structs, key=lambda kind: kind.__name__)
    references, components = msgspec.json.schema_components(ordered, ref_template="#/components/schemas/{name}")
    for reader in readers:
        _close(components[reader.kind.__name__], reader)
    return dict(zip(ordered, references, strict=True)), components


def _close(schema: dict[str, Any], reader: BodyReader[Any]) -> None:
    """Says which of OpenAI's fields the body takes besides its own, and no other, its numbers' ranges, and which fields
    need another one."""
    for name, bounds in reader.ranges.items():
        _bound(schema["properties"][name], bounds)
    ignored: dict[str, Any] = {name: {"description": "Accepted, but ignored"} for name in reader.ignored}
    unsupported = {name: {"enum": [None, *values]} for name, values in reader.unsupported.items()}
    schema["properties"] |= dict(sorted((ignored | unsupported).items()))
    schema["additionalProperties"] = False
    if reader.needs:
        schema["allOf"] = [_need(name, other) for name, other in reader.needs.items()]


def _need(name: str, other: str) -> dict[str, Any]:
    """Where the field is given, and not null, the other one is true."""
    given = {"required": [name], "properties": {name: {"not": {"type": "null"}}}}
    return {"if": given, "then": {"required": [other], "properties": {other: {"const": True}}}}


def _bound(schema: dict[str, Any], bounds: Range) -> None:
    """Says it of the field's number, or of each it holds; the field may be null."""
    words = {"exclusiveMinimum" if bounds.above else "minimum": bounds.low, "maximum": bounds.high}
    for kind in schema["anyOf"]:
        number = kind.get("items") or kind.get("additionalProperties") or kind
        if number["type"] != "null":
            number |= words
