"""Random lives of the scheduler with lower tiers that are slow, out of order, damaged, off and on again.

The rules are those of `test_scheduler_properties`: books balance after every step, and whoever finishes has said what
the oracle says, whatever became of its pages.
"""

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from inferflux.engine.kv.lower_tiers import TierSettings
from inferflux.engine.request import RequestState
from tests.support.fake_tiers import FakeTiers
from tests.support.scheduler_machine import STREAMS, SchedulerMachine
from tests.support.workbench import Workbench


class TieredLife(SchedulerMachine):
    @initialize(
        num_pages=st.integers(3, 14),
        page_tokens=st.integers(1, 4),
        host_pages=st.integers(1, 20),
        file_slots=st.integers(0, 30),
        queue_depth=st.integers(1, 8),
        eviction=st.sampled_from(["lru", "clock"]),
        pace=st.sampled_from([0.1, 0.5, 1.0]),
        damage=st.sampled_from([0.0, 0.0, 0.3]),
        chunk=st.integers(1, 9),
        batch_size=st.integers(1, 5),
        ahead=st.booleans(),
        drafts=st.sampled_from([0, 0, 3]),
        seed=st.integers(0, 2**16),
    )
    def start(
        self,
        num_pages: int,
        page_tokens: int,
        host_pages: int,
        file_slots: int,
        queue_depth: int,
        eviction: str,
        pace: float,
        damage: float,
        chunk: int,
        batch_size: int,
        ahead: bool,
        drafts: int,
        seed: int,
    ) -> None:
        self.tiers = FakeTiers(random.Random(seed), pace, damage, file_slots)
        self.bench = Workbench(
            num_pages,
            page_tokens,
            tiers=TierSettings(host_pages, eviction, file_slots > 0, queue_depth),
            fake_tiers=self.tiers,
            ahead=ahead,
            drafts=drafts,
            chunked_prefill_tokens=chunk,
            max_batch_tokens=chunk + batch_size,
            max_batch_size=batch_size,
        )

    @rule(
        stream=st.sampled_from(STREAMS),
        length=st.integers(1, 30),
        tail=st.lists(st.integers(0, 3), max_size=2),
        max_tokens=st.integers(1, 20),
        salt=st.sampled_from([b"", b"tenant"]),
        adapter=st.sampled_from([0, 0, 1]),
    )
    def submit(
        self, stream: list[int], length: int, tail: list[int], max_tokens: int, salt: bytes, adapter: int
    ) -> None:
        prompt = (stream[:length] + tail)[: self.bench.kv.capacity_tokens - 1]
        self.bench.submit(prompt, max_tokens, salt=salt, adapter=adapter)

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            while len(self.bench.flights) >= self.bench.max_flights:
                self.bench.land()
            if self.bench.scheduler.has_work or self.bench.flights or self.bench.kv.has_background_work:
                self.bench.step()

    @rule()
    def launch(self) -> None:
        """Leaves a step open, so that what comes next happens between schedule and update."""
        if len(self.bench.flights) < self.bench.max_flights:
            self.bench.launch()

    @rule(event=st.sampled_from(["turn_on", "turn_on", "turn_off", "fill_up"]), num_slots=st.integers(0, 5))
    def file_changes(self, event: str, num_slots: int) -> None:
        if not self.tiers.file_slots:
            return
        if event == "fill_up":
            self.tiers.fill_up(num_slots)
        else:
            getattr(self.tiers, event)()

    @rule(count=st.integers(1, 5))
    def flush(self, count: int) -> None:
        self.bench.kv.flush(count)

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            self.tiers.pace = 1.0
            self.end(max_steps=2000)


def test_a_file_that_hangs_holds_up_no_request_for_good() -> None:
    """Whoever waits for its pages, or for another's, computes them when they are overdue; they may come even later."""
    tiers = FakeTiers(random.Random(0), pace=1.0, file_slots=64)
    bench = Workbench(24, 4, tiers=TierSettings(8, "lru", has_file=True), fake_tiers=tiers)
    tiers.turn_on()
    prompt = [number % 11 for number in range(24)]
    for number in range(9):
        bench.submit(prompt if number == 0 else [(number * place) % 50 for place in range(30)], 4)
        bench.run()
    while bench.kv.has_background_work:
        bench.step()
    tiers.pace = 0.0
    waiting = [bench.submit([*prompt, number], 4) for number in range(2)]
    bench.step()
    assert bench.scheduler.stats().loading == 1
    for _ in range(300):
        if bench.scheduler.has_work:
            bench.step()
    assert all(request.state is RequestState.FINISHED for request in waiting)
    assert bench.kv.num_moves_in_progress > 0
    tiers.pace = 1.0
    while bench.kv.has_background_work:
        bench.step()
    bench.run()


TestTieredLife = TieredLife.TestCase
TestTieredLife.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
