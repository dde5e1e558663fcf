"""A whole server on a free port, with engines that need no model: `running_server` for tests of the HTTP room."""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import aiohttp
import msgspec
from aiohttp import web

from inferflux.config import Config
from inferflux.engine.service.client import EngineClient
from inferflux.engine.text import TextBundle, load_text
from inferflux.server.admission import Admission, open_admission
from inferflux.server.audit import AuditLog
from inferflux.server.audit.opening import open_audit
from inferflux.server.backends import BackendManager
from inferflux.server.backends.manager import OnEvent
from inferflux.server.http.app import build_app
from inferflux.server.http.context import CONTEXT
from inferflux.server.http.runner import Runner
from inferflux.server.metrics import Metrics
from inferflux.server.model_source import ModelSource
from inferflux.server.models.events import ModelEvents
from inferflux.server.models.models import Models, open_models
from inferflux.server.policy.opening import open_policy
from inferflux.server.policy.store import PolicyStore
from inferflux.server.tls import server_context
from tests.support.fake_engine import WINDOW, FakeEngine
from tests.support.tokenizers import write_byte_level

KEY = "sk-test-0123456789abcdef"
MODEL = "fake"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
OPEN: dict[str, Any] = {"models": [{"id": MODEL, "path": "stub"}], "auth": {"allow_anonymous": True}}
KEYED: dict[str, Any] = {"models": [{"id": MODEL, "path": "stub"}], "auth": {"api_keys": [{"key": KEY}]}}


@dataclass
class Site:
    """A running server and a client for it. engine: the first model's."""

    url: str
    app: web.Application
    session: aiohttp.ClientSession
    engines: dict[str, FakeEngine]
    models: Models
    admission: Admission
    metrics: Metrics
    policy: PolicyStore
    audit: AuditLog | None

    @property
    def backends(self) -> BackendManager:
        return self.models.backends

    @property
    def engine(self) -> FakeEngine:
        return next(iter(self.engines.values()))

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any]:
        """Returns the status and the decoded body."""
        async with self.session.post(self.url + path, json=body, **options) as response:
            return response.status, await response.json()

    async def get(self, path: str, **options: Any) -> tuple[int, Any]:
        async with self.session.get(self.url + path, **options) as response:
            return response.status, await response.json()

    async def events(self, path: str, body: Any, **options: Any) -> list[Any]:
        """Returns a stream's events; the end mark as the string it is."""
        async with self.session.post(self.url + path, json={**body, "stream": True}, **options) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            return list(read_events(await response.text()))


@contextmanager
def endless_loads(site: Site, *model_ids: str) -> Iterator[None]:
    """While the body runs, models that are asked for (these, or all) begin to load and never end."""
    make = site.backends._make_client

    def make_endless(source: ModelSource) -> Any:
        engine: Any = make(source)
        if not model_ids or source.model.id in model_ids:
            engine.may_load.clear()
        return engine

    with patch.object(site.backends, "_make_client", make_endless):
        yield


def read_events(text: str) -> Iterator[Any]:
    for block in text.split("\n\n")[:-1]:
        assert block.startswith("data: "), block
        data = block.removeprefix("data: ")
        yield data if data == "[DONE]" else msgspec.json.decode(data)


@cache
def text_bundle() -> TextBundle:
    with TemporaryDirectory() as folder:
        return load_text(write_byte_level(Path(folder), chat_template=CHAT_TEMPLATE))


@asynccontextmanager
async def running_server(
    config: dict[str, Any] | None = None, *, load: bool = True, text: TextBundle | None = None, real: bool = False
) -> AsyncIterator[Site]:
    """text: the models' tokenizer and template, which may need a larger window. load: models are loaded before the body
    runs; else the body does it with `site.backends.load_all()`. real: the models of the configuration run, each in a
    thread.

    A `policy.store` in the configuration is opened without a passphrase."""
    tree = msgspec.convert(OPEN if config is None else config, Config)
    engines: dict[str, FakeEngine] = {}
    bundle = text or text_bundle()

    def make(source: ModelSource) -> FakeEngine:
        engines[source.model.id] = FakeEngine(bundle, window=WINDOW if text is None else 8 * WINDOW)
        return engines[source.model.id]

    def make_manager(sources: Sequence[ModelSource], on_event: OnEvent) -> BackendManager:
        if real:
            runtime = msgspec.structs.replace(tree.runtime, isolation="inline")
            return BackendManager(
                sources,
                lambda source: EngineClient(source.model, runtime, adapters=source.adapters),
                on_event=on_event,
            )
        return BackendManager(sources, make, load_text=lambda _path, _template: bundle, on_event=on_event)

    metrics = Metrics()
    policy = open_policy(tree, passphrase=None)
    admission = open_admission(tree.server, policy.document.fairness.policy)
    audit = open_audit(tree, None, with_text=False, on_result=metrics.count_audit)
    models = open_models(tree, policy, ModelEvents(metrics.model_event), make_manager)
    backends = models.backends
    app = build_app(tree, models, metrics, admission, policy, audit)
    # Else what is left of a limit would depend on how long this machine takes from one request to the next.
    app[CONTEXT].limiter._clock = app[CONTEXT].attempts._clock = lambda: 0.0
    runner = Runner(app)
    await runner.setup()
    try:
        tls = server_context(tree.server.tls)
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        if load:
            await backends.load_all()
        url = f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
        async with aiohttp.ClientSession() as session:
            yield Site(url, app, session, engines, models, admission, metrics, policy, audit)
    finally:
        await backends.close()
        await runner.cleanup()
        await policy.close()
        if audit is not None:
            audit.close()
