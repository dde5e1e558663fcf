"""Executor: a model made ready to run, and the plans it carries out.

The engine's door to everything that computes. Importing this file does not import torch; making an Executor does, and
says how long it took.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import msgspec

from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.engine.service.protocol import ModelInfo
from inferflux.engine.step import FileNews, MoveResult, StepOutput, StepPlan
from inferflux.sampling_params import Grammar


class Launched(Protocol):
    """A step on its way."""

    def result(self) -> StepOutput:
        """Waits for the step to end; called once, and for the oldest step first."""
        ...


@dataclass(frozen=True, slots=True)
class _NoRows:
    """A step that only moves pages."""

    step_id: int

    def result(self) -> StepOutput:
        return StepOutput(self.step_id, [])


@dataclass(frozen=True, slots=True)
class _WithMoves:
    """A step whose results are told together with the page moves that have ended. poll: returns those, and what the
    file says of itself."""

    rows: Launched
    poll: Callable[[], tuple[list[MoveResult], list[FileNews]]]

    def result(self) -> StepOutput:
        output = self.rows.result()
        moves, file_news = self.poll()
        return msgspec.structs.replace(output, moves=moves, file_news=file_news)


class Executor:
    """Loads `model` as `runtime` says. phases: the load's parts with their seconds, in order.

    fingerprint: 32 bytes that name the model and its pages' layout; pages of another fingerprint must not be used.
    Raises ModelLoadError when the model cannot be served here, ConfigError when a setting does not fit it.
    """

    def __init__(self, model: ModelConfig, runtime: RuntimeConfig) -> None:
        self.info: ModelInfo
        self.fingerprint: bytes
        self.phases: list[tuple[str, float]] = []
        with self._phase("import"):
            # Here, so that its seconds show up among the phases, and processes without an engine stay free of torch.
            from inferflux.engine.runner.build import build_runner
        built = build_runner(model, runtime, self._phase)
        self._runner, self.info, self.fingerprint, self._grammars, self._mover = built

    @property
    def runs_beside(self) -> bool:
        """Whether the device computes while this process goes on."""
        return self.info.device != "cpu"

    def launch(self, plan: StepPlan) -> Launched:
        """Starts one step; those before it need not have ended. An exception, here or from the result, means that the
        engine has failed and must not be used again."""
        if self._mover is None:
            return self._runner.launch(plan)
        if plan.wipe:
            self._mover.wipe()
        self._mover.start(plan.moves)
        rows = self._runner.launch(plan) if plan.rows else _NoRows(plan.step_id)
        return _WithMoves(rows, partial(self._mover.poll, wait=plan.wait))

    def execute(self, plan: StepPlan) -> StepOutput:
        """Computes one step, as `launch` and its result."""
        return self.launch(plan).result()

    def close(self) -> None:
        """Closes what is open; no step may follow."""
        if self._mover is not None:
            self._mover.close()

    def prepare(self, grammar: Grammar) -> Future[Any]:
        """Compiles a grammar in a thread. A request that has it may join a plan when the future is done; the future
        raises RequestError when it never may."""
        return self._grammars.prepare(grammar)

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.phases.append((name, time.perf_counter() - started))
