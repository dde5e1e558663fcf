"""GET /v1/models and /v1/models/{id}."""

from aiohttp import web
from msgspec import UNSET

from inferflux.server.backends import Backend
from inferflux.server.http.context import CONTEXT, INFO
from inferflux.server.http.requests import find_backend
from inferflux.server.http.responses import json_response
from inferflux.server.http.schemas.models import ModelCard, ModelList


async def list_models(request: web.Request) -> web.Response:
    manager = request.app[CONTEXT].backends
    return json_response(
        ModelList(
            [
                _card(backend, adapter, manager.default_id)
                for backend in manager.backends
                for adapter in (None, *backend.adapters)
            ]
        )
    )


async def get_model(request: web.Request) -> web.Response:
    backend = find_backend(request, request.match_info["id"])
    return json_response(_card(backend, request[INFO].adapter, request.app[CONTEXT].backends.default_id))


def _card(backend: Backend, adapter: str | None, default_id: str | None) -> ModelCard:
    info, source = backend.info, backend.source
    return ModelCard(
        id=adapter or backend.id,
        created=backend.created,
        backend=info.device.partition(":")[0] if info is not None else source.model.backend,
        state=backend.state.value,
        default=adapter is None and backend.id == default_id,
        stub=source.stub,
        max_model_len=info.max_model_len if info is not None else None,
        parent=backend.id if adapter is not None else UNSET,
    )
