"""ModelControl: changes the served models at run time, for the registry and for the API alike.

Knows which models are wanted: new ones are loaded while the old ones serve, and only when all of them are ready does
the change take effect, at once. Lives on one event loop; knows no HTTP and no file.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from inferflux.config import Config, ModelConfig
from inferflux.errors import ConfigError, RequestError
from inferflux.server.backends import Backend, BackendManager
from inferflux.server.errors import SupersededError
from inferflux.server.model_source import (
    ModelSource,
    configured_models,
    find_source,
    named_source,
    require_adapters,
    require_source,
    with_adapters,
)
from inferflux.server.models.wanted import ModelSet, Origin, WantedModel, merge, with_loaded, with_unloaded, without
from inferflux.server.policy.document import LoadedModel, ModelChanges, PolicyDocument
from inferflux.server.policy.store import Change, PolicyStore

Keep = Callable[[Change], Awaitable[PolicyDocument]]
"""Keeps a change of the policy document; it is in force when this returns."""
MakeManager = Callable[[Sequence[ModelSource]], BackendManager]


class ModelControl:
    """manager: the engines. registered: what the registry asks for, as of the last change that it made (`_asked`: that
    it has begun)."""

    def __init__(
        self, config: Config, policy: PolicyStore, registered: Sequence[ModelConfig], make_manager: MakeManager
    ) -> None:
        """Raises ConfigError for a configured model or adapter that cannot be served."""
        self.registered = self._asked = registered
        self._adapters = config.adapters
        self._configured = configured_models(config)
        self._allow_stub = config.runtime.allow_stub
        self._policy = policy
        self._turn = asyncio.Lock()
        self._num_ranks = config.distributed.world_size
        require_adapters(config)
        wanted = self.wanted
        for index, adapter in enumerate(config.adapters):
            if adapter.id in wanted.models:
                raise ConfigError(f"adapters[{index}].id: must not be a model's (the admin API loaded {adapter.id})")
        if policy.document.models != ModelChanges():
            self._require_alone()
        self._served = dict(wanted.models)
        self.manager = make_manager([self._first_source(one, wanted.default) for one in wanted.models.values()])

    @property
    def wanted(self) -> ModelSet:
        return merge(self._configured, self.registered, self._policy.document.models)

    @property
    def withheld(self) -> Sequence[str]:
        """Ids that the files ask for and the API has unloaded."""
        named = {model.id for model in (*self._configured, *self.registered)}
        return [one for one in self._policy.document.models.unloaded if one in named]

    def origin(self, model_id: str) -> Origin | None:
        """Who asked for a model; None when it is not wanted (any more)."""
        wanted = self.wanted.models.get(model_id)
        return wanted.origin if wanted is not None else None

    async def follow(self, registered: Sequence[ModelConfig]) -> None:
        """Puts the registry's models in force, all of them or, with what went wrong raised, none.

        Raises ConfigError for a folder that is not there, else as BackendManager.loaded.
        """
        self._asked = registered

        def missing() -> list[WantedModel]:
            wanted = merge(self._configured, registered, self._policy.document.models)
            return [one for one in wanted.models.values() if not self._is_there(one)]

        async def note() -> None:
            self.registered = registered

        await self._change(missing, note)

    async def load(self, model: LoadedModel, *, default: bool, keep: Keep) -> None:
        """Serves a model, in place of the one of its id if there is one. One that is served as it is stays.

        Raises ConfigError and ModelLoadError when it cannot be loaded, and what `keep` raises; nothing has changed
        then.
        """
        self._require_alone()
        if any(adapter.id == model.id for adapter in self._adapters):
            raise RequestError(f'id: "{model.id}" is an adapter (adapters[] of the configuration)', param="id")
        changes = with_loaded(ModelChanges(), model, default=default)
        wanted = merge((), (), changes).models[model.id]

        backend = self.manager.serving(model.id)
        stays = backend is not None and backend.serves and self._is_there(wanted)

        async def kept() -> None:
            if stays and self.manager.serving(model.id) is not backend:
                raise SupersededError(f'another change removed "{model.id}" in the meantime')
            await keep(_on_models(lambda present: with_loaded(present, model, default=default)))

        await self._change(lambda: [] if stays else [wanted], kept)

    async def unload(self, model_id: str, keep: Keep) -> None:
        """Takes no new requests for a model and unloads it once it is not in use; a load under way is given up.

        Raises UnknownModelError, RequestError when it must stay, what `keep` raises.
        """
        self._require_alone()
        async with self._turn:
            self.manager.find(model_id)
            base = [model.id for model in (*self._configured, *self.registered, *self._asked)]
            await keep(_on_models(lambda present: with_unloaded(present, model_id, base)))
            self.manager.withdraw(model_id)
            self._settle([])

    async def forget(self, model_id: str, keep: Keep) -> None:
        """Takes back what the API has decided about a model: what the files say of it holds again, be it nothing.

        Raises UnknownModelError, and else as `load`; nothing has changed then.
        """
        self._require_alone()

        def missing() -> list[WantedModel]:
            present = self._policy.document.models
            changes = without(present, model_id)
            wanted = merge(self._configured, self.registered, changes).models.get(model_id)
            if wanted is None and changes == present:
                self.manager.find(model_id)
            return [] if wanted is None or self._is_there(wanted) else [wanted]

        async def kept() -> None:
            await keep(_on_models(lambda present: without(present, model_id)))

        await self._change(missing, kept)

    async def set_default(self, model_id: str | None, keep: Keep) -> None:
        """Makes a model the default from the next request on; None: the one the files say.

        Raises UnknownModelError, NotReadyError when it does not serve, and what `keep` raises.
        """
        async with self._turn:
            if model_id is not None and not (backend := self.manager.find(model_id)).serves:
                raise backend.refusal()
            await keep(_on_models(lambda present: msgspec.structs.replace(present, default=model_id)))
            self._settle([])

    def _require_alone(self) -> None:
        """Raises RequestError when other ranks hold a share of the model: they cannot change with it."""
        if self._num_ranks > 1:
            raise RequestError(f"id: {self._num_ranks} ranks share one model and start and end with it", param="id")

    async def _change(self, missing: Callable[[], Sequence[WantedModel]], keep: Callable[[], Awaitable[None]]) -> None:
        """Loads, keeps, switches; leaves nothing behind when one of them fails or the caller is cancelled.

        missing: what the change wants and requests do not get yet. Raises SupersededError when that is something else
        once it is loaded: another change has come in between.
        """
        async with self._turn:
            wanted = missing()
            sources = [self._source(one) for one in wanted]
            staged = self.manager.stage(sources)
        try:
            await self.manager.loaded(staged)
            async with self._turn:
                self.manager.require_staged(staged)
                if [one.model for one in missing()] != [one.model for one in wanted]:
                    raise SupersededError("another change to the same models was made in the meantime")
                await keep()
                self._settle(staged, wanted)
        except BaseException:
            await asyncio.shield(self.manager.discard(staged))
            raise

    def _settle(self, staged: Sequence[Backend], loaded: Sequence[WantedModel] = ()) -> None:
        """loaded: what was staged."""
        wanted = self.wanted
        self.manager.settle(staged, tuple(wanted.models), wanted.default)
        served = {**self._served, **{one.model.id: one for one in loaded}}
        self._served = {one: served[one] for one in wanted.models if self.manager.serving(one) is not None}

    def _is_there(self, wanted: WantedModel) -> bool:
        """Whether requests get this very model, whoever asked for it."""
        served = self._served.get(wanted.model.id)
        return served is not None and served.model == wanted.model

    def _source(self, wanted: WantedModel) -> ModelSource:
        """Where to load from. Raises ConfigError; the demo model stands in for the configuration's models only."""
        is_own = wanted.origin == "config"
        source = find_source(wanted.model, self._allow_stub) if is_own else require_source(wanted.model)
        return with_adapters(source, self._adapters)

    def _first_source(self, wanted: WantedModel, default: str | None) -> ModelSource:
        """As `_source` for the start, where the registry's and the API's models fail on their own when they load."""
        model = msgspec.structs.replace(wanted.model, default=wanted.model.id == default)
        source = find_source(model, self._allow_stub) if wanted.origin == "config" else named_source(model)
        return with_adapters(source, self._adapters)


def _on_models(change: Callable[[ModelChanges], ModelChanges]) -> Change:
    return lambda document: msgspec.structs.replace(document, models=change(document.models))
