"""What all random lives of the scheduler have in common; `start`, a rule of theirs, makes the bench."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from inferflux.engine.request import RequestState
from tests.support.workbench import Workbench

# Prompts are cut from few streams, so that prefixes are shared often and at every length.
STREAMS = tuple([(stream * 5 + i * i) % 11 for i in range(40)] for stream in range(2))


class SchedulerMachine(RuleBasedStateMachine):
    bench: Workbench

    @precondition(lambda self: self.bench.flights)
    @rule()
    def land(self) -> None:
        self.bench.land()

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        alive = [r.id for r in self.bench.requests.values() if r.state is not RequestState.FINISHED]
        if alive:
            self.bench.scheduler.abort(data.draw(st.lists(st.sampled_from(alive), max_size=3)))

    @rule()
    def reset_prefix_cache(self) -> None:
        self.bench.kv.reset_prefix_cache()

    @invariant()
    def books_balance(self) -> None:
        self.bench.scheduler.check_integrity()
        pool = self.bench.kv.pool
        assert pool.num_free + pool.num_used + pool.num_cached == pool.num_pages

    def end(self, max_steps: int) -> None:
        """Runs to the end what is left."""
        self.bench.run(max_steps)
        assert all(request.state is RequestState.FINISHED for request in self.bench.requests.values())
        assert not self.bench.scheduler.has_work
