"""BackendManager: model id to Backend. Finds them for requests, loads, replaces, unloads and closes them.

A change has two halves: `stage` loads what is new beside what serves, and once that is `loaded`, `settle` switches to
it at once and lets what is no longer wanted drain. Which models are wanted is the caller's to know. Knows no HTTP and
no tokens. Lives on one event loop.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from inferflux.engine.text import load_text
from inferflux.errors import ModelLoadError, did_you_mean
from inferflux.server.backends.backend import Backend, BackendState, LoadText, MakeClient
from inferflux.server.backends.totals import EngineTotals
from inferflux.server.errors import NotReadyError, NotReadyReason, SupersededError, UnknownModelError
from inferflux.server.model_source import ModelSource

logger = logging.getLogger(__name__)

MAX_ID_SHOWN = 200
# Models come and go at run time, perhaps under ever new ids: the counts of so many that are gone are kept.
MAX_PAST = 1000
CHECK_INTERVAL_S = 1.0

OnEvent = Callable[[Backend, str], None]


class BackendManager:
    """All served models, in the configuration's order. default_id: the model of requests that name none.

    `on_event(backend, event)` hears of `loaded`, `failed`, `switched`, `draining`, `unloaded`, `idle_unloaded`,
    `withdrawn` (before it served) and `default`.
    """

    def __init__(
        self,
        sources: Sequence[ModelSource],
        make_client: MakeClient,
        *,
        load_text: LoadText = load_text,
        on_event: OnEvent,
    ) -> None:
        self._make_client = make_client
        self._load_text = load_text
        self._on_event = on_event
        self._backends = {source.model.id: self._make(source) for source in sources}
        self._incoming: dict[str, _Load] = {}
        self._leaving: dict[Backend, asyncio.Task[None]] = {}
        self._past: dict[str, EngineTotals] = {}
        self._is_closing = False
        self._wanted_default = next((source.model.id for source in sources if source.model.default), None)
        self.default_id = self._wanted_default or next(iter(self._backends), None)

    @property
    def backends(self) -> Sequence[Backend]:
        """One per id: those that serve, then those that are loaded for the first time, then those that leave."""
        shown: dict[str, Backend] = {}
        for backend in self.engines:
            shown.setdefault(backend.id, backend)
        return tuple(shown.values())

    @property
    def engines(self) -> Sequence[Backend]:
        """Every one there is: of a model that is being replaced there are two."""
        return (*self._backends.values(), *(load.backend for load in self._incoming.values()), *self._leaving)

    @property
    def default(self) -> Backend | None:
        return self._backends.get(self.default_id) if self.default_id is not None else None

    def find(self, model_id: str | None) -> Backend:
        """Returns the model of this id, ready or not; None asks for the default.

        Raises UnknownModelError, and NotReadyError for the default when there is none and when the server ends.
        """
        self._require_open()
        if model_id is None:
            if self.default is None:
                raise NotReadyError("no model is served", "no_model")
            return self.default
        found = self._backends.get(model_id) or next((one for one in self.backends if one.id == model_id), None)
        if found is None:
            shown = model_id[:MAX_ID_SHOWN]
            base = next((one.id for one in self._backends.values() if model_id in one.adapters), None)
            if base is not None:
                raise UnknownModelError(f'"{shown}" is not a model but an adapter of "{base}"')
            known = (*self._backends, *(one for backend in self._backends.values() for one in backend.adapters))
            raise UnknownModelError(f'the model "{shown}" does not exist{did_you_mean(shown, known)}')
        return found

    def find_any(self, name: str | None) -> tuple[Backend, str | None]:
        """Returns the model that answers to this name, ready or not, and the adapter of that name; None: it is the
        model's own name, or there is none, which asks for the default.

        Raises as `find` does.
        """
        self._require_open()
        if name not in self._backends:
            for backend in self.backends:
                if name in backend.adapters:
                    return backend, name
        return self.find(name), None

    def serving(self, model_id: str) -> Backend | None:
        """Returns what requests to this id get, ready or not; None while it is loaded for the first time or leaves."""
        return self._backends.get(model_id)

    def not_ready_reason(self) -> NotReadyReason | None:
        """Returns why the default model does not serve; None when it does."""
        if self.default is None:
            return "no_model"
        if self.default.serves:
            return None
        refusal = self.default.refusal()
        return refusal.reason if isinstance(refusal, NotReadyError) else "no_model"

    @property
    def counted(self) -> Sequence[str]:
        """Every model that has an engine or had one, whether or not it is served; of those that are gone, the last
        MAX_PAST."""
        return tuple({**self._past, **{backend.id: None for backend in self.engines}})

    def counts(self, model_id: str) -> EngineTotals:
        """Returns what all engines of this model have counted, those that are gone included."""
        totals = EngineTotals()
        if model_id in self._past:
            totals.add(self._past[model_id].counts())
        for backend in self.engines:
            if backend.id == model_id:
                totals.add(backend.counts())
        return totals

    async def load_all(self) -> None:
        """Loads every model; returns when each is ready or has failed."""
        async with asyncio.TaskGroup() as group:
            for backend in self._backends.values():
                group.create_task(self._load(backend))

    def stage(self, sources: Iterable[ModelSource]) -> Sequence[Backend]:
        """Begins to load the sources beside what serves, each in an engine of its own; nothing is switched.

        Takes the place of other changes under way to the same models. A model whose last change still drains is loaded
        when that is over, so that no more than two of it are held.
        """
        staged = []
        for source in sources:
            self.withdraw(source.model.id)
            backend = self._make(source)
            self._incoming[backend.id] = _Load(backend, asyncio.create_task(self._load_incoming(backend)))
            staged.append(backend)
        return staged

    async def loaded(self, staged: Sequence[Backend]) -> None:
        """Returns when what was staged has been loaded. Raises ModelLoadError for the first that failed,
        SupersededError when another change took the place of this one."""
        self.require_staged(staged)
        pending = {self._incoming[backend.id].task for backend in staged}
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            self.require_staged(staged)
            for task in done:
                task.result()

    def require_staged(self, staged: Sequence[Backend]) -> None:
        """Raises SupersededError when another change took the place of this one, NotReadyError when the server ends."""
        self._require_open()
        if not all(map(self._is_incoming, staged)):
            raise SupersededError("another change to the same model replaced this one")

    async def discard(self, staged: Sequence[Backend]) -> None:
        """Ends what was staged and is not to serve after all; what has been withdrawn is on its way already."""
        for backend in staged:
            if self._is_incoming(backend):
                self.withdraw(backend.id)
        await _ended(task for backend, task in self._leaving.items() if backend in staged)

    def withdraw(self, model_id: str) -> None:
        """Ends what a change under way loads for this id, if one does; that change fails with SupersededError."""
        load = self._incoming.pop(model_id, None)
        if load is not None:
            load.task.cancel()
            load.backend.leave()
            self._leaving[load.backend] = asyncio.create_task(self._drain(load.backend, load.task))

    async def gone(self, model_id: str) -> None:
        """Returns when nothing of this model drains any more."""
        await _ended(task for backend, task in self._leaving.items() if backend.id == model_id)

    def settle(self, staged: Sequence[Backend], wanted: Sequence[str], default: str | None) -> None:
        """Switches to what was staged, lets what is not `wanted` drain, and sets the default, all at once.

        wanted: every id that is to serve, in order. Raises SupersededError, and nothing has changed, when another
        change has withdrawn one of the staged.
        """
        self.require_staged(staged)
        for backend in staged:
            del self._incoming[backend.id]
            self._replace(backend)
        for model_id in [one for one in self._backends if one not in wanted]:
            self._let_go(self._backends.pop(model_id))
        self._backends = {one: self._backends[one] for one in wanted if one in self._backends}
        self._wanted_default = default
        self._choose_default()

    async def run_maintenance(self) -> None:
        """Unloads models that nobody has asked for in their `idle_unload_s`, and tries again to load those that could
        not be loaded, for as long as it runs."""
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            for backend in tuple(self._backends.values()):
                try:
                    if _is_idle(backend, time.monotonic()) and await backend.sleep():
                        self._on_event(backend, "idle_unloaded")
                except Exception:  # one engine that fails to end must not stop the maintenance of the others
                    logger.exception("unloading model %s failed", backend.id)
                backend.retry()

    async def close(self) -> None:
        """Ends every engine; what still runs there fails with EngineDeadError, and changes under way with
        NotReadyError."""
        self._is_closing = True
        for model_id in tuple(self._incoming):
            self.withdraw(model_id)
        for task in self._leaving.values():
            task.cancel()
        engines = self.engines
        await _ended(self._leaving.values())
        endings = await asyncio.gather(*(backend.close() for backend in engines), return_exceptions=True)
        for backend, error in zip(engines, endings, strict=True):
            if error is not None:
                logger.error("ending model %s failed", backend.id, exc_info=error)

    def _require_open(self) -> None:
        """Raises NotReadyError once engines are being ended: to a request so late, none is restarting."""
        if self._is_closing:
            raise NotReadyError("the server is shutting down", "draining")

    def _make(self, source: ModelSource) -> Backend:
        return Backend(source, self._make_client, self._load_text, self._note_load)

    async def _load(self, backend: Backend) -> None:
        if backend.source.fallback is not None:
            logger.warning("model %s: %s; serving the demo model instead", backend.id, backend.source.fallback)
        await backend.load()

    async def _load_incoming(self, backend: Backend) -> None:
        """Raises what it failed with."""
        await self.gone(backend.id)
        await self._load(backend)
        if backend.error is not None:
            named = backend.error if backend.id in backend.error else f"{backend.id}: {backend.error}"
            raise ModelLoadError(named) from backend.failure

    def _is_incoming(self, backend: Backend) -> bool:
        load = self._incoming.get(backend.id)
        return load is not None and load.backend is backend

    def _replace(self, backend: Backend) -> None:
        before = self._backends.get(backend.id)
        self._backends[backend.id] = backend
        if before is not None:
            self._on_event(backend, "switched")
            self._let_go(before)

    def _choose_default(self) -> None:
        """A default that does not serve (yet) takes the place only of one that does not either."""
        wanted = self._backends.get(self._wanted_default or "")
        if self.default is None or (wanted is not None and (wanted.serves or not self.default.serves)):
            chosen = wanted or next(iter(self._backends.values()), None)
            changed, self.default_id = chosen is not self.default, chosen.id if chosen is not None else None
            if changed and chosen is not None:
                self._on_event(chosen, "default")

    def _let_go(self, backend: Backend) -> None:
        backend.leave()
        self._on_event(backend, "draining")
        self._leaving[backend] = asyncio.create_task(self._drain(backend))

    async def _drain(self, backend: Backend, load: asyncio.Task[None] | None = None) -> None:
        """load: what still loads it, and has been told to stop."""
        if load is not None:
            await asyncio.gather(load, return_exceptions=True)
        try:
            await backend.drain()
        except Exception:  # one whose engine does not end well must not stay on the books for ever
            logger.exception("ending model %s failed", backend.id)
        del self._leaving[backend]
        self._remember(backend)
        if load is None:
            self._on_event(backend, "unloaded")
        elif backend.failure is None:
            self._on_event(backend, "withdrawn")

    def _remember(self, backend: Backend) -> None:
        """Adds what an engine has counted to what its model has; the models that ended longest ago are forgotten."""
        past = self._past.pop(backend.id, None) or EngineTotals()
        past.add(backend.counts())
        self._past[backend.id] = past
        if len(self._past) > MAX_PAST:
            del self._past[next(iter(self._past))]

    def _note_load(self, backend: Backend) -> None:
        if backend.state is BackendState.DRAINING:
            return  # it was replaced or removed while it loaded, and how that ended is nobody's concern
        self._on_event(backend, "loaded" if backend.error is None else "failed")
        self._choose_default()


class _Load(NamedTuple):
    """What a change under way loads, and the task that does."""

    backend: Backend
    task: asyncio.Task[None]


async def _ended(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Waits for the end of tasks without a share in how they end: a waiter that is cancelled leaves them alone."""
    waited = tuple(tasks)
    if waited:
        await asyncio.wait(waited)


def _is_idle(backend: Backend, now: float) -> bool:
    limit = backend.source.model.idle_unload_s
    return limit is not None and not backend.num_holders and now - backend.last_used >= limit
