"""Executor: loads a model and carries out plans.

The engine's interface to everything that computes, on one rank or several: rank 0 sends every plan to the others before
it computes its own share. Importing this file does not import torch; making an Executor does, and measures how long.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec

from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.config.tree import AdapterConfig, DistributedConfig
from inferflux.dist.heartbeat import heartbeat_interval_s
from inferflux.engine.interface import ModelInfo
from inferflux.engine.step import FileChange, MoveResult, StepOutput, StepPlan
from inferflux.sampling_params import Grammar, SamplingParams

# Other ranks need only the slot and adapter of a row's start: rank 0 samples.
_NO_SAMPLING: Final = SamplingParams()


class Launched(Protocol):
    """A launched step."""

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
    """A step whose output also reports page moves that have ended. poll: returns these, and changes of the file
    tier."""

    rows: Launched
    poll: Callable[[], tuple[list[MoveResult], list[FileChange]]]

    def result(self) -> StepOutput:
        output = self.rows.result()
        moves, file_changes = self.poll()
        return msgspec.structs.replace(output, moves=moves, file_changes=file_changes)


class Executor:
    """Loads `model` and its `adapters` as `runtime` says, together with the other ranks. phases: the load's parts with
    their seconds.

    fingerprint: 32 bytes that name the model and its pages' layout; pages of another fingerprint must not be used.
    adapter_names: the same of each adapter's weights, in the order of their numbers.
    Raises ModelLoadError when the model cannot be served here, ConfigError when a setting does not fit it,
    EngineDeadError when another rank is lost.
    """

    def __init__(
        self,
        model: ModelConfig,
        runtime: RuntimeConfig,
        distributed: DistributedConfig | None = None,
        adapters: Sequence[AdapterConfig] = (),
    ) -> None:
        distributed = distributed or DistributedConfig()
        self.info: ModelInfo
        self.fingerprint: bytes
        self.adapter_names: Sequence[bytes]
        self.phases: list[tuple[str, float]] = []
        with self._phase("import"):
            # Here, so that its time is one of the phases, and processes without an engine do not import torch.
            from inferflux.dist.channel import Channel
            from inferflux.dist.launch import launch, leave
            from inferflux.engine.runner.build import build_runner, choose_device
        self._leave = leave
        with self._phase("ranks"):
            self._context = launch(distributed, choose_device(model, distributed))
        self._channel = Channel(self._context)
        self._heartbeat_interval_s = heartbeat_interval_s(distributed.timeout_s)
        built = build_runner(model, adapters, runtime, self._channel, self._phase)
        self._runner, self.info, self.fingerprint, self._grammars, self._moves, self._draft, self.adapter_names = built
        self._expert_load = getattr(self._runner.decoder, "expert_load", None)
        if self._expert_load is not None:
            self._expert_load.zero_()  # leave out the warm-up

    @property
    def decoder(self) -> Any:
        """The model itself (`models.decoder.Decoder`), for experiments."""
        return self._runner.decoder

    def expert_tokens(self) -> list[int]:
        """Returns how many tokens each expert got so far, all layers together; waits for the device."""
        return [] if self._expert_load is None else self._expert_load.tolist()

    def on_progress(self, tell: Callable[[], object]) -> None:
        """See `Engine.on_progress`. Decoders' steps take seconds at most."""
        if not self.info.generates:
            self.decoder.on_layer = tell

    @property
    def is_asynchronous(self) -> bool:
        """Whether the device computes in parallel with this process."""
        return self.info.device != "cpu"

    def with_drafts(self, plan: StepPlan) -> StepPlan:
        """Returns the plan with the draft model's tokens in its draft rows, if there is a draft model; waits for it to
        compute. Every plan passes through here once, before it is launched."""
        return plan if self._draft is None else self._draft.fill(plan)

    def launch(self, plan: StepPlan) -> Launched:
        """Starts one step; earlier ones need not have ended. After an exception, here or from the result, the engine
        has failed and must not be used."""
        if self._context.control is not None:
            self._channel.send(encode_plan(plan))
        if self._moves is None:
            return self._runner.launch(plan)
        self._moves.start(plan)
        rows = self._runner.launch(plan) if plan.rows else _NoRows(plan.step_id)
        return _WithMoves(rows, self._moves.report_after(plan))

    def execute(self, plan: StepPlan) -> StepOutput:
        """Computes one step, as `launch` and its result."""
        return self.launch(plan).result()

    def prepare(self, request_id: int, grammar: Grammar) -> Future[Any]:
        """Compiles a request's grammar in a thread. The request may be in a plan once the future is done; the future
        raises RequestError if the grammar cannot be used. Kept until `forget`."""
        return self._grammars.prepare(request_id, grammar)

    def forget(self, request_ids: Collection[int]) -> None:
        """Drops what is kept for requests that have ended and are in no later plan."""
        self._runner.forget(request_ids)
        self._grammars.release(request_ids)

    def heartbeat(self) -> None:
        """Sends the other ranks a heartbeat, which they answer, unless something was sent lately.

        Raises EngineDeadError when one is lost.
        """
        self._channel.heartbeat(self._heartbeat_interval_s)

    def follow(self) -> Iterator[None]:
        """Computes this rank's share of rank 0's plans until rank 0 closes the channel; yields between them.

        Raises EngineDeadError when a rank is lost.
        """
        decoder = msgspec.msgpack.Decoder(StepPlan)
        while (message := self._channel.receive()) is not None:
            if message:
                self._follow(decoder.decode(message))
            yield

    def _follow(self, plan: StepPlan) -> None:
        if self._moves is not None:
            self._moves.start(plan)
        if plan.rows:
            self._runner.follow(plan)
        if self._moves is not None:
            self._moves.report_after(plan)

    def close(self) -> None:
        """Closes everything, releases the other ranks and leaves their group; no step may follow."""
        self.close_file()
        if self._context.rank == 0:
            self._channel.close()
        self._runner.close()
        if self._draft is not None:
            self._draft.close()
        self._leave(self._context)

    def close_file(self) -> None:
        """Closes the page file, which another engine may be waiting for; involves no other rank."""
        if self._moves is not None:
            self._moves.close()

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.phases.append((name, time.perf_counter() - started))


def encode_plan(plan: StepPlan) -> bytes:
    """Returns the plan for the other ranks, without sampling parameters and histories: rank 0 samples."""
    starts = [
        msgspec.structs.replace(start, sampling=_NO_SAMPLING, history=[], eos_token_ids=[]) for start in plan.starts
    ]
    return msgspec.msgpack.encode(msgspec.structs.replace(plan, starts=starts))
