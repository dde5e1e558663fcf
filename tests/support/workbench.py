"""Workbench: a scheduler, its KV books and a FakeRunner together, checked at every step."""

from collections import deque
from typing import Any

from inferflux.config import FairnessConfig, SchedulerConfig
from inferflux.engine.interface import Output
from inferflux.engine.kv.lower_tiers import TierSettings
from inferflux.engine.kv.manager import KVManager
from inferflux.engine.request import Request, RequestState
from inferflux.engine.scheduler.scheduler import Scheduler
from inferflux.engine.scheduler.speculator import Speculator
from inferflux.engine.step import StepOutput, StepPlan
from inferflux.sampling_params import SamplingParams
from tests.support.fake_runner import VOCAB_SIZE, FakeRunner, expected_tokens, next_token, seed_of
from tests.support.fake_tiers import FakeTiers

EOS = 7


class Workbench:
    """Submits requests, steps, and compares everything that comes out with the oracle.

    `clock` counts steps. `plans` and `outputs` keep everything. ahead: a step is planned and run before the results of
    the one before are handed over. `flights`: the steps whose results are still to be handed over.
    drafts: of a request in one step, some of them wrong.
    """

    def __init__(
        self,
        num_pages: int = 64,
        page_tokens: int = 4,
        prefix_cache: bool = True,
        fairness: FairnessConfig | None = None,
        ahead: bool = False,
        drafts: int = 0,
        tiers: TierSettings | None = None,
        fake_tiers: FakeTiers | None = None,
        **config: Any,
    ) -> None:
        self.config = SchedulerConfig(**{"max_batch_size": 8, "max_batch_tokens": 64, **config})
        self.clock = 0.0
        # Moves take some of the clock's ticks, which are too few to give up on them.
        self.kv = KVManager(
            num_pages, page_tokens, b"model", prefix_cache, tiers or TierSettings(0), lambda: self.clock / 100
        )
        speculator = Speculator(self.kv, self.config, drafts, propose) if drafts else None
        self.scheduler = Scheduler(self.config, fairness or FairnessConfig(), self.kv, lambda: self.clock, speculator)
        self.runner = FakeRunner(num_pages, page_tokens, fake_tiers)
        self.requests: dict[int, Request] = {}
        self.plans: list[StepPlan] = []
        self.flights: deque[tuple[StepPlan, StepOutput]] = deque()
        self.max_flights = 2 if ahead else 1
        self.outputs: dict[int, list[Output]] = {}

    def submit(
        self,
        prompt: list[int],
        max_tokens: int = 8,
        *,
        salt: bytes = b"",
        priority: int = 0,
        tenant: str = "",
        adapter: int = 0,
        **sampling: Any,
    ) -> Request:
        request_id = len(self.requests) + 1
        request = Request(
            id=request_id,
            prompt_token_ids=list(prompt),
            sampling=SamplingParams(max_tokens=max_tokens, **sampling),
            seed=len(salt),
            max_total_tokens=len(prompt) + max_tokens,
            eos_token_ids=frozenset([EOS]),
            arrival_time=self.clock,
            priority=priority,
            tenant=tenant,
            salt=salt,
            adapter=adapter,
            adapter_name=b"adapter" * adapter,
        )
        self.scheduler.add(request)
        self.runner.salts[request_id] = salt
        self.requests[request_id] = request
        self.outputs[request_id] = []
        return request

    def schedule(self) -> StepPlan | None:
        plan = self.scheduler.schedule()
        self.clock += 1
        if plan is not None:
            self.plans.append(plan)
            self._check_plan(plan)
        return plan

    def launch(self) -> bool:
        """Plans and runs a step, keeping its results back. False when there was nothing to plan."""
        plan = self.schedule()
        if plan is not None:
            self.flights.append((plan, self.runner.execute(plan)))
        return plan is not None

    def land(self) -> list[Output]:
        """Hands over the results of the oldest step."""
        return self._take_in(*self.flights.popleft())

    def update(self, plan: StepPlan) -> list[Output]:
        """Runs a plan and hands over its results."""
        return self._take_in(plan, self.runner.execute(plan))

    def _take_in(self, plan: StepPlan, output: StepOutput) -> list[Output]:
        outputs = self.scheduler.update(plan, output)
        for output in outputs:
            self.outputs[output.request_id].append(output)
            if output.finish_reason in ("stop", "length"):
                self.check_output(self.requests[output.request_id])
        self.scheduler.check_integrity()
        return outputs

    def step(self) -> list[Output]:
        """One step, as the engine does it; there must be something to do."""
        launched = self.launch()
        assert self.flights, "nothing to run"
        return [] if launched and len(self.flights) < self.max_flights else self.land()

    def run(self, max_steps: int = 2000) -> None:
        """Steps until nothing is left, then checks that every page came back."""
        while len(self.flights) >= self.max_flights:
            self.land()
        for _ in range(max_steps):
            if not (self.scheduler.has_work or self.flights or self.kv.num_moves_in_progress):
                break
            self.step()
        assert not self.scheduler.has_work, "no end in sight"
        assert self.kv.pool.num_used == 0
        self.scheduler.check_integrity()

    def tokens_of(self, request: Request) -> list[int]:
        return [token for output in self.outputs[request.id] for token in output.token_ids]

    def check_output(self, request: Request) -> None:
        """Asserts that a finished request said what it would have said alone on an endless machine."""
        tokens, reason = expected_tokens(request, self.kv.capacity_tokens)
        assert self.tokens_of(request) == tokens
        assert request.finish_reason == reason == self.outputs[request.id][-1].finish_reason

    def _check_plan(self, plan: StepPlan) -> None:
        running = {r.slot: r for r in self.requests.values() if r.state is RequestState.RUNNING}
        assert plan.num_tokens <= self.config.max_batch_tokens
        rows = [row for row in plan.rows if not row.is_draft]
        assert len({row.slot for row in rows}) == len(rows)
        assert len(plan.rows) <= self.config.max_batch_size
        size = self.kv.page_tokens
        for row in plan.rows:
            end = row.start + len(row.token_ids)
            for page in running[row.slot].pages[row.start // size : (end - 1) // size + 1]:
                assert self.kv.pool.references(page) == 1, "a row writes into a shared page"
                assert self.kv.index.name_of(page) is None, "a row writes into a page that others can find"


def propose(request: Request, count: int) -> list[int]:
    """What the request will say, but for a third of the tokens."""
    context = list(request.tokens)
    for _ in range(count):
        token = next_token(context, seed_of(request.seed, request.adapter))
        context.append((token + 1) % VOCAB_SIZE if len(context) % 3 == 0 else token)
    return context[len(request.tokens) :]
