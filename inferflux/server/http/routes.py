"""Every URL of the server: method, path, who may call it, what answers.

A route without a scope cannot be written here, and one added behind this page's back is refused at the start.
"""

from dataclasses import dataclass
from typing import Literal

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.typedefs import Handler

from inferflux.config.tree import Scope
from inferflux.server.http import openapi
from inferflux.server.http.context import OPENAPI
from inferflux.server.http.handlers import (
    admin_api_keys,
    admin_cache,
    admin_fairness,
    admin_guardrails,
    admin_models,
    admin_policy,
    admin_pools,
    admin_rate_limit,
    chat,
    completions,
    embeddings,
    health,
    models,
    tokens,
    ui,
)
from inferflux.server.http.middleware import PUBLIC, SCOPES
from inferflux.server.http.problems import Problem

METRICS_PATH = "/metrics"


@dataclass(frozen=True, slots=True)
class Route:
    method: Literal["GET", "POST", "PUT", "DELETE"]
    path: str
    scope: Scope | Literal["public"]
    handler: Handler


ROUTES = (
    Route("POST", "/v1/chat/completions", "generate", chat.chat_completions),
    Route("POST", "/v1/completions", "generate", completions.completions),
    Route("POST", "/v1/embeddings", "generate", embeddings.embeddings),
    Route("GET", "/v1/models", "read", models.list_models),
    Route("GET", "/v1/models/{id:.+}", "read", models.get_model),
    Route("POST", "/tokenize", "read", tokens.tokenize),
    Route("POST", "/detokenize", "read", tokens.detokenize),
    Route("GET", "/v1/admin/api_keys", "admin", admin_api_keys.list_keys),
    Route("POST", "/v1/admin/api_keys", "admin", admin_api_keys.make_key),
    Route("DELETE", "/v1/admin/api_keys", "admin", admin_api_keys.delete_key),
    Route("GET", "/v1/admin/cache", "admin", admin_cache.get_cache),
    Route("DELETE", "/v1/admin/cache", "admin", admin_cache.drop_cache),
    Route("POST", "/v1/admin/cache/warm", "admin", admin_cache.warm_cache),
    Route("GET", "/v1/admin/fairness", "admin", admin_fairness.get_fairness),
    Route("PUT", "/v1/admin/fairness", "admin", admin_fairness.put_fairness),
    Route("GET", "/v1/admin/guardrails", "admin", admin_guardrails.get_guardrails),
    Route("PUT", "/v1/admin/guardrails", "admin", admin_guardrails.put_guardrails),
    Route("GET", "/v1/admin/pools", "admin", admin_pools.get_pools),
    Route("GET", "/v1/admin/policy", "admin", admin_policy.get_policy),
    Route("GET", "/v1/admin/models", "admin", admin_models.list_models),
    Route("POST", "/v1/admin/models", "admin", admin_models.load_model),
    Route("DELETE", "/v1/admin/models", "admin", admin_models.unload_model),
    Route("PUT", "/v1/admin/models/default", "admin", admin_models.put_default),
    Route("GET", "/v1/admin/rate_limit", "admin", admin_rate_limit.get_rate_limit),
    Route("PUT", "/v1/admin/rate_limit", "admin", admin_rate_limit.put_rate_limit),
    Route("GET", "/livez", PUBLIC, health.livez),
    Route("GET", "/health", PUBLIC, health.livez),
    Route("GET", "/readyz", PUBLIC, health.readyz),
    Route("GET", "/healthz", PUBLIC, health.healthz),
    Route("GET", METRICS_PATH, PUBLIC, health.metrics),
    Route("GET", openapi.PATH, PUBLIC, openapi.openapi),
    Route("GET", "/ui", PUBLIC, ui.page),
    Route("GET", "/ui/{file}", PUBLIC, ui.file),
)


def add_routes(app: web.Application, routes: tuple[Route, ...]) -> None:
    """Registers the routes with their scopes. A GET route answers HEAD too."""
    scopes: dict[tuple[str, str], Scope | str] = {}
    for route in routes:
        methods = (hdrs.METH_GET, hdrs.METH_HEAD) if route.method == hdrs.METH_GET else (route.method,)
        for method in methods:
            added = app.router.add_route(method, route.path, route.handler, expect_handler=_expect)
            assert added.resource is not None
            scopes[method, added.resource.canonical] = route.scope
    app[SCOPES] = scopes
    app[OPENAPI] = openapi.document(routes)
    app.on_startup.append(_refuse_undeclared)


async def _refuse_undeclared(app: web.Application) -> None:
    """Raises RuntimeError when a route has no scope: someone added it elsewhere."""
    for route in app.router.routes():
        path = route.resource.canonical if route.resource is not None else ""
        if (route.method, path) not in app[SCOPES]:
            raise RuntimeError(f"{route.method} {path} declares no scope: routes belong into routes.ROUTES")


async def _expect(request: web.Request) -> web.StreamResponse | None:
    """Tells a client that asks first to go on, unless its body is too large, as the answer will say, or its HTTP is too
    old to know that word."""
    if request.headers.get(hdrs.EXPECT, "").lower() != "100-continue":
        return Problem(417, "Expect: only 100-continue is understood").response()
    fits = request.content_length is None or request.content_length <= request.client_max_size
    if fits and request.version >= HttpVersion11:
        assert request.transport is not None
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    return None
