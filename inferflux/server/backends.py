"""BackendManager: model id to running engine. Loads them at the start, finds them for requests, closes them.

Models load side by side in the background; the port is open long before. Knows no HTTP and no tokens. Lives on one
event loop.
"""

import asyncio
import enum
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from inferflux.engine.service.client import ClientState, EngineClient
from inferflux.engine.service.protocol import ModelInfo
from inferflux.engine.text import TextBundle, load_text
from inferflux.errors import InferFluxError, did_you_mean
from inferflux.server.errors import NotReadyError, NotReadyReason, UnknownModelError
from inferflux.server.model_source import ModelSource

logger = logging.getLogger(__name__)

MAX_ID_SHOWN = 200

MakeClient = Callable[[ModelSource], EngineClient]
LoadText = Callable[[Path, str | None], TextBundle]
OnEvent = Callable[["Backend", str], None]


class BackendState(enum.Enum):
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"


class Backend:
    """One model: its engine, its text side and its state.

    load_s: seconds the load took, once it is over. error: why it failed. `info` and `text` are there once it has been
    ready, and stay when its engine restarts.
    """

    def __init__(self, source: ModelSource, client: EngineClient) -> None:
        self.source = source
        self.client = client
        self.created = int(time.time())
        self.load_s: float | None = None
        self.error: str | None = None
        self._text: TextBundle | None = None

    @property
    def id(self) -> str:
        return self.source.model.id

    @property
    def state(self) -> BackendState:
        if self.error is not None:
            return BackendState.FAILED
        if self._text is None:
            return BackendState.LOADING
        return BackendState.READY if self.client.state is ClientState.READY else BackendState.RESTARTING

    @property
    def info(self) -> ModelInfo | None:
        """What the engine said of the model; None before it is loaded."""
        return self.client.info

    @property
    def text(self) -> TextBundle:
        """Its tokenizer and chat template. Raises NotReadyError before it is loaded."""
        if self._text is None:
            raise self.refusal()
        return self._text

    async def load(self, load_text: LoadText) -> None:
        """Starts the engine and reads the text side at the same time; whatever goes wrong ends up in `error`."""
        start = time.monotonic()
        model = self.source.model
        assert model.path is not None, "find_source gives every model a folder"
        reading = asyncio.to_thread(load_text, Path(model.path), model.chat_template)
        try:
            async with asyncio.TaskGroup() as group:
                text = group.create_task(reading)
                group.create_task(self.client.start())
        except ExceptionGroup as errors:
            self.error = _reason(errors.exceptions[0], self.id)
        else:
            self._text = text.result()
        self.load_s = time.monotonic() - start

    def require_ready(self) -> None:
        """Raises NotReadyError unless it takes requests."""
        if self.state is not BackendState.READY:
            raise self.refusal()

    def refusal(self) -> NotReadyError:
        """Returns why it takes no requests, in words for a client: the details are in the log."""
        reasons: dict[BackendState, tuple[str, NotReadyReason]] = {
            BackendState.LOADING: ("is loading", "starting"),
            BackendState.FAILED: ("failed to load", "no_model"),
        }
        words, reason = reasons.get(self.state, ("is restarting", "engine_restarting"))
        return NotReadyError(f'the model "{self.id}" {words}', reason)


class BackendManager:
    """All served models, in the configuration's order. `on_event(backend, event)` hears of `loaded` and `failed`."""

    def __init__(
        self,
        sources: Sequence[ModelSource],
        make_client: MakeClient,
        *,
        load_text: LoadText = load_text,
        on_event: OnEvent,
    ) -> None:
        self._backends = {source.model.id: Backend(source, make_client(source)) for source in sources}
        named = next((source.model.id for source in sources if source.model.default), None)
        self.default_id = named or next(iter(self._backends), None)
        self._load_text = load_text
        self._on_event = on_event

    @property
    def backends(self) -> Sequence[Backend]:
        return tuple(self._backends.values())

    @property
    def default(self) -> Backend | None:
        return self._backends[self.default_id] if self.default_id is not None else None

    def find(self, model_id: str | None) -> Backend:
        """Returns the model of this id, ready or not; None asks for the default. Raises UnknownModelError."""
        backend = self.default if model_id is None else self._backends.get(model_id)
        if backend is None:
            shown = (model_id or "")[:MAX_ID_SHOWN]
            raise UnknownModelError(f'the model "{shown}" does not exist{did_you_mean(shown, self._backends)}')
        return backend

    def not_ready_reason(self) -> NotReadyReason | None:
        """Returns why the default model does not serve; None when it does."""
        if self.default is None:
            return "no_model"
        return None if self.default.state is BackendState.READY else self.default.refusal().reason

    async def load_all(self) -> None:
        """Loads every model; returns when each is ready or has failed."""
        async with asyncio.TaskGroup() as group:
            for backend in self.backends:
                group.create_task(self._load(backend))

    async def close(self) -> None:
        """Ends every engine; what still runs there fails with EngineDeadError."""
        await asyncio.gather(*(backend.client.close() for backend in self.backends))

    async def _load(self, backend: Backend) -> None:
        if backend.source.fallback is not None:
            logger.warning("model %s: %s; serving the demo model instead", backend.id, backend.source.fallback)
        await backend.load(self._load_text)
        if backend.error is not None:
            logger.error("model %s: %s", backend.id, backend.error)
            await backend.client.close()
            self._on_event(backend, "failed")
        else:
            self._on_event(backend, "loaded")


def _reason(error: Exception, model_id: str) -> str:
    if isinstance(error, InferFluxError):
        return str(error)
    logger.error("loading model %s failed", model_id, exc_info=error)
    return f"loading failed: {error or type(error).__name__}"
