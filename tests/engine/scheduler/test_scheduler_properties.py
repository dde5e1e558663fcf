"""Random lives of the scheduler: submit, abort, finish, preempt, share and forget, in any order, in a tiny pool.

After every step the books must balance, and whoever finishes must have said what the oracle says.
"""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from inferflux.config import FairnessConfig
from inferflux.engine.request import RequestState
from inferflux.engine.scheduler.policies import PATIENCE_S, POLICIES
from inferflux.errors import RequestError
from tests.support.scheduler_machine import STREAMS, SchedulerMachine
from tests.support.workbench import Workbench

FAIRNESS = st.builds(
    FairnessConfig,
    enable_preemption=st.booleans(),
    high_priority_threshold=st.integers(1, 3),
    max_timeslice_tokens=st.sampled_from([0, 0, 1, 3]),
)
SALTS = (b"", b"tenant a", b"tenant b")


class SchedulerLife(SchedulerMachine):
    @initialize(
        num_pages=st.integers(2, 14),
        page_tokens=st.integers(1, 4),
        chunk=st.integers(1, 9),
        budget=st.integers(1, 20),
        batch_size=st.integers(1, 5),
        prefix_cache=st.sampled_from([True, True, True, False]),
        policy=st.sampled_from(list(POLICIES)),
        fairness=FAIRNESS,
        ahead=st.booleans(),
        drafts=st.sampled_from([0, 0, 1, 4]),
    )
    def start(
        self,
        num_pages: int,
        page_tokens: int,
        chunk: int,
        budget: int,
        batch_size: int,
        prefix_cache: bool,
        policy: str,
        fairness: FairnessConfig,
        ahead: bool,
        drafts: int,
    ) -> None:
        self.bench = Workbench(
            num_pages,
            page_tokens,
            prefix_cache,
            ahead=ahead,
            drafts=drafts,
            chunked_prefill_tokens=chunk,
            max_batch_tokens=budget,
            max_batch_size=batch_size,
            policy=policy,
            fairness=fairness,
        )

    @rule(
        stream=st.sampled_from(STREAMS),
        length=st.integers(1, 30),
        tail=st.lists(st.integers(0, 3), max_size=2),
        max_tokens=st.integers(1, 20),
        salt=st.sampled_from(SALTS),
        priority=st.integers(0, 2),
        tenant=st.sampled_from(["a", "b", "c"]),
        adapter=st.sampled_from([0, 0, 1, 2]),
        scored=st.sampled_from([False, False, False, True]),
        penalty=st.sampled_from([0.0, 0.0, 0.0, 0.5]),
    )
    def submit(
        self,
        stream: list[int],
        length: int,
        tail: list[int],
        max_tokens: int,
        salt: bytes,
        priority: int,
        tenant: str,
        adapter: int,
        scored: bool,
        penalty: float,
    ) -> None:
        """A penalty is nothing to the runner here, but keeps the scheduler from planning ahead of its rows."""
        prompt = stream[:length] + tail
        submit = self.bench.submit
        if len(prompt) + 1 > self.bench.kv.capacity_tokens:
            with pytest.raises(RequestError):
                submit(prompt, max_tokens, salt=salt)
        else:
            scores = 0 if scored else None
            sampling = {"prompt_logprobs": scores, "presence_penalty": penalty}
            submit(prompt, max_tokens, salt=salt, priority=priority, tenant=tenant, adapter=adapter, **sampling)

    @precondition(lambda self: len(self.bench.flights) < self.bench.max_flights)
    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            if self.bench.scheduler.has_work or self.bench.flights:
                self.bench.step()

    @precondition(lambda self: len(self.bench.flights) < self.bench.max_flights)
    @rule()
    def launch(self) -> None:
        """Leaves a step open, so that what comes next happens between schedule and update."""
        is_first = not self.bench.flights
        launched = self.bench.launch()
        assert launched == self.bench.scheduler.has_work or not is_first

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        running = [r.id for r in self.bench.requests.values() if r.state is RequestState.RUNNING]
        if running:
            self.bench.runner.failing.add(data.draw(st.sampled_from(running)))

    @rule(policy=st.sampled_from(list(POLICIES)), fairness=FAIRNESS)
    def change_policy(self, policy: str, fairness: FairnessConfig) -> None:
        self.bench.scheduler.configure(policy, fairness)

    @rule(seconds=st.sampled_from([0.5, PATIENCE_S]))
    def wait(self, seconds: float) -> None:
        self.bench.clock += seconds

    @invariant()
    def every_cached_page_can_be_reached(self) -> None:
        """A page's predecessor is in the index too, and is not evicted before it."""
        pool, index = self.bench.kv.pool, self.bench.kv.index
        parents = {
            child: parent
            for request in self.bench.requests.values()
            for parent, child in zip(request.page_names, request.page_names[1:], strict=False)
        }
        later: set[int] = set()
        for page in reversed(pool.cached_pages()):
            name = index.name_of(page)
            assert name is not None
            if name in parents:
                parent = index.page_of(parents[name])
                assert parent is not None
                assert parent in later or pool.references(parent) > 0
            later.add(page)

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            # A timeslice of one token, prefilled anew in chunks of one token each time, takes its thousands of steps.
            self.end(max_steps=50_000)


TestSchedulerLife = SchedulerLife.TestCase
TestSchedulerLife.settings = settings(
    max_examples=80, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
