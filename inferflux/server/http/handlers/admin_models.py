"""GET, POST, DELETE /v1/admin/models and PUT /v1/admin/models/default: which models are served.

An answer comes when the change is done, or as 202 when that takes longer than a request may; a change that has begun
goes on even if its caller leaves.
"""

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from typing import Any

from aiohttp import web

from inferflux.engine.process_memory import resident_bytes
from inferflux.errors import ConfigError, ModelLoadError, RequestError
from inferflux.server.backends import Backend
from inferflux.server.http.admin import change_policy, finish
from inferflux.server.http.context import CONTEXT
from inferflux.server.http.requests import read_body
from inferflux.server.http.responses import json_response
from inferflux.server.http.schemas.admin_models import (
    DEFAULT,
    LOAD,
    UNLOAD,
    AdminModelCard,
    AdminModelList,
    Default,
    EngineCard,
    Forgotten,
    LoadRequest,
    Unloaded,
)
from inferflux.server.models.control import Keep
from inferflux.server.models.models import Models
from inferflux.server.policy.document import PolicyDocument
from inferflux.server.policy.store import Change


async def list_models(request: web.Request) -> web.Response:
    models = request.app[CONTEXT].models
    answer = AdminModelList(
        data=[_card(models, backend) for backend in models.backends.backends],
        default=models.backends.default_id,
        unloaded=tuple(models.control.withheld),
        registry=models.registry.status if models.registry is not None else None,
        events=models.events.latest,
    )
    return json_response(answer)


async def load_model(request: web.Request) -> web.Response:
    body = await read_body(request, LOAD)
    models = request.app[CONTEXT].models
    done = await finish(request, _load(request, body))
    backend = models.backends.find(body.id)
    return json_response(_card(models, backend), status=200 if done else 202)


async def unload_model(request: web.Request) -> web.Response:
    body = await read_body(request, UNLOAD)
    model_id, models = body.id, request.app[CONTEXT].models
    if body.forget:
        return await _forget(request, models, model_id)
    keep = _keeper(request, {"action": "model_unloaded", "id": model_id})
    await asyncio.shield(asyncio.create_task(models.control.unload(model_id, keep)))
    if await finish(request, models.backends.gone(model_id)):
        return json_response(Unloaded(model_id, "unloaded"))
    return json_response(Unloaded(model_id, "draining"), status=202)


async def put_default(request: web.Request) -> web.Response:
    model_id = (await read_body(request, DEFAULT)).id
    control = request.app[CONTEXT].models.control
    keep = _keeper(request, {"action": "default_model_changed", "id": model_id})
    await asyncio.shield(asyncio.create_task(control.set_default(model_id, keep)))
    return json_response(Default(control.manager.default_id))


async def _forget(request: web.Request, models: Models, model_id: str) -> web.Response:
    keep = _keeper(request, {"action": "model_forgotten", "id": model_id})
    with _load_failures("id"):
        done = await finish(request, models.control.forget(model_id, keep))
    left = next((one for one in models.backends.backends if one.id == model_id), None)
    state = left.state.value if left is not None else "unloaded"
    return json_response(Forgotten(model_id, state, models.control.origin(model_id)), status=200 if done else 202)


async def _load(request: web.Request, body: LoadRequest) -> None:
    """Raises RequestError with the reason when the model cannot be loaded."""
    model = body.model()
    what = {"action": "model_loaded", "id": model.id, "path": model.path, "default": body.default}
    with _load_failures("path"):
        control = request.app[CONTEXT].models.control
        await control.load(model, default=body.default, keep=_keeper(request, what))


@contextlib.contextmanager
def _load_failures(param: str) -> Iterator[None]:
    """Raises a model that cannot be loaded as RequestError."""
    try:
        yield
    except (ConfigError, ModelLoadError) as error:
        raise RequestError(str(error), param=param, code="model_load_failed") from error


def _keeper(request: web.Request, what: dict[str, Any]) -> Keep:
    def keep(change: Change) -> Coroutine[Any, Any, PolicyDocument]:
        return change_policy(request, what, change)

    return keep


def _card(models: Models, backend: Backend) -> AdminModelCard:
    info, model = backend.info, backend.source.model
    engines = [one for one in models.backends.engines if one.id == backend.id]
    return AdminModelCard(
        id=backend.id,
        state=backend.state.value,
        default=backend.id == models.backends.default_id,
        origin=models.control.origin(backend.id),
        path=model.path or "",
        backend=info.device.partition(":")[0] if info is not None else model.backend,
        stub=backend.source.stub,
        max_model_len=info.max_model_len if info is not None else None,
        idle_unload_s=model.idle_unload_s,
        requests=sum(one.num_holders for one in engines),
        load_s=round(backend.load_s, 3) if backend.load_s is not None else None,
        error=backend.error,
        adapters=backend.adapters,
        engines=[_engine_card(one) for one in engines],
    )


def _engine_card(backend: Backend) -> EngineCard:
    pid = backend.client.pid
    return EngineCard(
        state=backend.state.value,
        path=backend.source.model.path or "",
        pid=pid,
        requests=backend.num_holders,
        resident_bytes=resident_bytes(pid) if pid is not None else None,
    )
