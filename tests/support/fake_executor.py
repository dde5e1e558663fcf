"""FakeExecutor: an Engine's door to a FakeRunner, so that the whole engine runs without a model.

A step is computed when it is launched and its results are kept until they are asked for, as on a device.
"""

from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import msgspec

from inferflux.engine.interface import ModelInfo
from inferflux.engine.step import StepOutput, StepPlan
from inferflux.sampling_params import Grammar
from tests.support.fake_runner import VOCAB_SIZE, FakeRunner
from tests.support.fake_tiers import FakeTiers

EOS = 7
WINDOW = 64


@dataclass(frozen=True)
class _Launched:
    output: StepOutput

    def result(self) -> StepOutput:
        return self.output


class FakeExecutor:
    """Stands in for Executor, in its place in `inferflux.engine.engine`.

    prepared: the grammars asked for, by request id; whoever runs the test resolves them. kept: requests of which
    something is kept.
    """

    def __init__(self, num_pages: int, page_tokens: int, tiers: FakeTiers | None, num_adapters: int) -> None:
        self.runner = FakeRunner(num_pages, page_tokens, tiers)
        self.info = ModelInfo(
            architecture="fake",
            num_parameters=1,
            vocab_size=VOCAB_SIZE,
            max_model_len=WINDOW,
            dtype="float32",
            device="cpu",
            page_tokens=page_tokens,
            device_pages=num_pages,
            eos_token_ids=[EOS],
        )
        self.fingerprint = b"model"
        self.adapter_names = [b"adapter %d" % number for number in range(num_adapters)]
        self.is_asynchronous = False
        self.prepared: dict[int, Future[Any]] = {}
        self.kept: set[int] = set()

    def with_drafts(self, plan: StepPlan) -> StepPlan:
        return plan

    def launch(self, plan: StepPlan) -> _Launched:
        self.kept |= {start.request_id for start in plan.starts}
        # What goes to other ranks must survive the way.
        plan = msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan)
        return _Launched(self.runner.execute(plan))

    def execute(self, plan: StepPlan) -> StepOutput:
        return self.launch(plan).result()

    def prepare(self, request_id: int, grammar: Grammar) -> Future[Any]:
        self.kept.add(request_id)
        self.prepared[request_id] = Future()
        return self.prepared[request_id]

    def forget(self, request_ids: Collection[int]) -> None:
        self.kept -= set(request_ids)

    def expert_tokens(self) -> list[int]:
        return []

    def on_progress(self, tell: Callable[[], object]) -> None:
        """No step takes long."""

    def heartbeat(self) -> None:
        """There is no other rank."""

    def close(self) -> None:
        """Nothing is open."""
