"""Backend: one model with its engine, from loading to the end, through idleness and back.

Knows one engine and who uses it; which models there are is the manager's affair. Lives on one event loop; knows no
HTTP and no tokens.
"""

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from inferflux.engine.interface import ModelInfo
from inferflux.engine.service.client import ClientState, EngineClient
from inferflux.engine.text import TextBundle
from inferflux.errors import InferFluxError, ModelLoadError
from inferflux.server.backends.totals import EngineTotals
from inferflux.server.errors import NotReadyError, NotReadyReason, UnknownModelError
from inferflux.server.grammar_check import GrammarCheck
from inferflux.server.model_source import ModelSource

logger = logging.getLogger(__name__)

# A model that could not be loaded is tried again after a pause that doubles each time.
FIRST_RETRY_PAUSE_S = 10.0
LONGEST_RETRY_PAUSE_S = 300.0

MakeClient = Callable[[ModelSource], EngineClient]
LoadText = Callable[[Path, str | None], TextBundle]
OnLoad = Callable[["Backend"], None]


class BackendState(enum.Enum):
    """unloaded: idle and without an engine; the first request loads it. draining: leaving, once it is not in use."""

    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    FAILED = "failed"
    UNLOADED = "unloaded"


class Backend:
    """One model: its engine, its text side and its state. `on_load(backend)` is called at the end of each load.

    load_s: seconds the last load took. error, failure: why it failed, in words and as it was raised. `info` and `text`
    are there once it has been ready, and stay while its engine restarts or is unloaded. num_holders: requests that use
    it now. last_used: `time.monotonic()` of the end of the last one. totals: what its engines counted.
    """

    def __init__(self, source: ModelSource, make_client: MakeClient, load_text: LoadText, on_load: OnLoad) -> None:
        self.source = source
        self.client = make_client(source)
        self.created = int(time.time())
        self.load_s: float | None = None
        self.error: str | None = None
        self.failure: Exception | None = None
        self.num_holders = 0
        self.last_used = time.monotonic()
        self.totals = EngineTotals()
        self._make_client = make_client
        self._load_text = load_text
        self._on_load = on_load
        self._num_clients = 1
        self._restarts_before = 0
        self._retries_before = 0
        self._info: ModelInfo | None = None
        self._text: TextBundle | None = None
        self._grammar_check: GrammarCheck | None = None
        self._state: BackendState | None = BackendState.LOADING
        self._turn = asyncio.Lock()
        self._waking: asyncio.Task[None] | None = None
        self._retry_pause_s = FIRST_RETRY_PAUSE_S
        self._next_try = 0.0
        self._released = asyncio.Event()

    @property
    def id(self) -> str:
        return self.source.model.id

    @property
    def adapters(self) -> tuple[str, ...]:
        """The ids of the adapters that are served with it."""
        return tuple(adapter.id for adapter in self.source.adapters)

    @property
    def state(self) -> BackendState:
        """Its own, or while an engine serves, the engine's."""
        if self._state is not None:
            return self._state
        return BackendState.READY if self.client.state is ClientState.READY else BackendState.RESTARTING

    @property
    def serves(self) -> bool:
        """Whether a request is answered, if only after a load: what was unloaded when idle, or wakes, serves."""
        wakes = self._state is BackendState.LOADING and self._text is not None and self.error is None
        return wakes or self.state in (BackendState.READY, BackendState.UNLOADED)

    @property
    def info(self) -> ModelInfo | None:
        """What the engine said of the model; None before it is loaded."""
        return self.client.info or self._info

    @property
    def text(self) -> TextBundle:
        """Its tokenizer and chat template. Raises NotReadyError before it is loaded."""
        if self._text is None:
            raise self.refusal()
        return self._text

    @property
    def grammar_check(self) -> GrammarCheck:
        """Compiles callers' grammars; its vocabulary is large, and goes with the model. Raises NotReadyError before the
        model is loaded."""
        if self._grammar_check is None:
            tokenizer = self.text.tokenizer
            assert self.info is not None, "a backend with a text side has been described"
            self._grammar_check = GrammarCheck(tokenizer, self.info)
        return self._grammar_check

    @property
    def num_restarts(self) -> int:
        """Times a dead engine of this model was replaced."""
        return self._restarts_before + self.client.num_restarts

    @property
    def num_retries(self) -> int:
        """Requests that lost their engine before it had answered and were given to the next one."""
        return self._retries_before + self.client.num_retries

    def counts(self) -> Mapping[str, float]:
        """Returns what its engines counted, with the present one's last word, and how often one was lost."""
        self.totals.update(self.client.stats, (self._num_clients, self.client.num_engines))
        return {**self.totals.counts(), "restarts": self.num_restarts, "retries": self.num_retries}

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Keeps the engine there while the body runs, even when the model is removed, replaced or idle meanwhile."""
        self.num_holders += 1
        try:
            yield
        finally:
            self.num_holders -= 1
            self.last_used = time.monotonic()
            if not self.num_holders:
                self._released.set()

    async def load(self) -> None:
        """Starts the engine and reads the text side at the same time; whatever goes wrong ends up in `error`."""
        start = time.monotonic()
        try:
            async with asyncio.TaskGroup() as group:
                text = group.create_task(self._read_text())
                group.create_task(self.client.start())
        except ExceptionGroup as errors:
            await self._note_failure(errors.exceptions[0])
        else:
            self._text = text.result()
            self._note_ready()
        self.load_s = time.monotonic() - start
        self._on_load(self)

    async def wake(self) -> None:
        """Loads the model again if it was unloaded for idleness, once for all waiting callers, which may be cancelled.

        The outcome is in `state`.
        """
        if self._state is BackendState.UNLOADED:
            self._wake_soon()
        if (waking := self._waking) is not None:
            await asyncio.wait((waking,))
            if not waking.cancelled():  # by `close`, which is no reason to leave a caller without an answer
                waking.result()

    def retry(self) -> None:
        """Tries again to load a model that failed, when it is time."""
        if self._state is BackendState.FAILED and time.monotonic() >= self._next_try:
            self._wake_soon()

    async def sleep(self) -> bool:
        """Ends the engine unless it is in use; returns whether it did. The text side stays."""
        if self.num_holders or self.state is not BackendState.READY:
            return False
        self._state = BackendState.UNLOADED
        async with self._turn:
            await self._end_client()
        return True

    def leave(self) -> None:
        """Takes no new requests from now on."""
        self._state = BackendState.DRAINING

    async def drain(self) -> None:
        """Waits until no request uses it, then ends the engine."""
        self.leave()
        while self.num_holders:
            self._released.clear()
            await self._released.wait()
        await self.close()

    async def close(self) -> None:
        """Ends the engine now; what still runs there fails with EngineDeadError."""
        if self._waking is not None:
            self._waking.cancel()
            await asyncio.gather(self._waking, return_exceptions=True)
        async with self._turn:
            await self._end_client()

    def require_ready(self) -> None:
        """Raises UnknownModelError when it is leaving, NotReadyError when it takes no requests for another reason."""
        if self.state is not BackendState.READY:
            raise self.refusal()

    def refusal(self) -> InferFluxError:
        """Returns why it takes no requests, in words for a client: the details are in the log."""
        if self.state is BackendState.DRAINING:
            return UnknownModelError(f'the model "{self.id}" is being unloaded')
        words, reason = _WORDS.get(self.state, ("is restarting", "engine_restarting"))
        return NotReadyError(f'the model "{self.id}" {words}', reason)

    def _wake_soon(self) -> None:
        if self._waking is None:
            self._waking = asyncio.create_task(self._load_again())

    async def _load_again(self) -> None:
        try:
            async with self._turn:
                if self._state in (BackendState.UNLOADED, BackendState.FAILED):
                    self._state = BackendState.LOADING
                    self._restarts_before += self.client.num_restarts
                    self._retries_before += self.client.num_retries
                    self._num_clients += 1
                    self.client = self._make_client(self.source)
                    await self.load()
        finally:
            self._waking = None

    async def _read_text(self) -> TextBundle:
        if self._text is not None:
            return self._text
        model = self.source.model
        assert model.path is not None, "a source names a folder"
        folder = Path(model.path)
        if not await asyncio.to_thread(folder.is_dir):
            raise ModelLoadError(f"{folder} is not a folder")
        return await asyncio.to_thread(self._load_text, folder, model.chat_template)

    async def _end_client(self) -> None:
        await self.client.close()
        self.counts()

    def _note_ready(self) -> None:
        self._info = self.client.info
        self.last_used = time.monotonic()
        self.error = self.failure = None
        self._retry_pause_s = FIRST_RETRY_PAUSE_S
        if self._state is BackendState.LOADING:
            self._state = None

    async def _note_failure(self, error: Exception) -> None:
        self.failure = error
        self.error = _reason(error, self.id)
        if self._state is BackendState.LOADING:
            self._state = BackendState.FAILED
        self._next_try = time.monotonic() + self._retry_pause_s
        self._retry_pause_s = min(2 * self._retry_pause_s, LONGEST_RETRY_PAUSE_S)
        await self._end_client()


_WORDS: Final[Mapping[BackendState, tuple[str, NotReadyReason]]] = MappingProxyType(
    {
        BackendState.LOADING: ("is loading", "starting"),
        BackendState.FAILED: ("failed to load", "no_model"),
        BackendState.UNLOADED: ("is not loaded", "starting"),
    }
)


def _reason(error: Exception, model_id: str) -> str:
    if isinstance(error, InferFluxError):
        return str(error)
    logger.error("loading model %s failed", model_id, exc_info=error)
    return f"loading failed: {error or type(error).__name__}"
