"""What a Runner is made from, and what building one gives. Reads nothing."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.config.tree import AdapterConfig
from inferflux.engine.interface import ModelInfo
from inferflux.engine.kv.store.shared_moves import SharedMoves
from inferflux.engine.runner.draft_model import DraftModel
from inferflux.engine.runner.encoder_runner import EncoderRunner
from inferflux.engine.runner.runner import Runner
from inferflux.engine.structured.grammars import Grammars

# `with phase(name)`: the body is the part of a start that has this name.
Phase = Callable[[str], AbstractContextManager[None]]


class BuildSettings(NamedTuple):
    """path: the model's folder, the demo model's where that is asked for. adapters: the model's."""

    path: Path
    model: ModelConfig
    runtime: RuntimeConfig
    adapters: Sequence[AdapterConfig] = ()

    @property
    def dtype(self) -> str:
        """The type to compute in, by its name or `auto`: the model's own setting goes before the runtime's."""
        return self.runtime.dtype if self.model.dtype == "auto" else self.model.dtype


class Built(NamedTuple):
    """A runner ready for its first plan. fingerprint: 32 bytes, naming what its pages' bytes depend on. grammars: where
    the runner will look for a request's grammar. moves: None without lower tiers. draft: None unless a model drafts.
    adapter_names: 32 bytes for each adapter, naming its weights."""

    runner: Runner | EncoderRunner
    info: ModelInfo
    fingerprint: bytes
    grammars: Grammars
    moves: SharedMoves | None
    draft: DraftModel | None = None
    adapter_names: Sequence[bytes] = ()
