"""FairShare: bounds latency under the policy `fair` where every row makes a step longer.

A tenant that asks for less than its share, while another asks for more, is favoured: its requests are in every step,
ahead of the others, and the time that the others may add to these steps is bounded. The bound is a credit in seconds,
like a token bucket: a step with favoured requests earns a fraction of what it would take with these alone, and spends
the time that the others added, by the clock. Without credit the others are left out of the step; with credit they take
turns. Knows requests' sizes and tenants' counters; knows no queue.
"""

from collections.abc import Sequence
from itertools import islice
from math import inf
from typing import Final, NamedTuple

from inferflux.config import SchedulerConfig
from inferflux.engine.request import Request
from inferflux.engine.scheduler.step_time import GAIN, StepSize, StepTimeModel
from inferflux.engine.scheduler.tenants import TenantCounters
from inferflux.engine.smoothing import moving_average, without_outlier

# How long a favoured request may take, as a multiple of what it would take alone. 2 is promised; the difference is for
# the step that is running when a request arrives. Worst of 5 over solo on 2 cores, at batches of 8, 32 and 128:
# 1.5, 2.1 and 2.2 with 1.4; 2.0, 1.8 and 1.7 with 1.25.
LATENCY_FACTOR: Final = 1.25
# Limit of credit and debt, in steps of the favoured alone. It bounds how long the others are left out after a step that
# took long for another reason, and how much they may add at once after a quiet time.
MAX_CREDIT_STEPS: Final = 8.0
# After so many shared steps the favoured get one alone, to measure again how long that takes.
MAX_STEPS_TOGETHER: Final = 32
# A prompt that has a turn gets as many tokens at least: of fewer the planner may compute none (see `StepPlanner`).
LEAST_CHUNK: Final = 3
# Of so many first steps of the favoured alone the shortest counts, since other processes may hold one up. With one
# step, which then took 20 times as long, the others were in every step: of the demo model's requests every fifth took
# 50 times as long as alone (64 tokens in 0.03 s, batches of 8 and 32, two cores of a Zen 5 EPYC).
FIRST_STEPS_ALONE: Final = 3
# After so long with a single tenant no other is expected to arrive, so steps may be long.
ARRIVAL_WINDOW_S: Final = 600.0


class SharedStep(NamedTuple):
    """A step with favoured requests. favoured: what it computes for these. predicted_s: what the others should add."""

    favoured: StepSize
    predicted_s: float


class _Alone(NamedTuple):
    """What steps of some number of favoured rows took without others; num_steps: that were seen."""

    num_steps: int
    seconds: float

    def with_step(self, seconds: float) -> "_Alone":
        if self.num_steps < FIRST_STEPS_ALONE:
            return _Alone(self.num_steps + 1, min(self.seconds, seconds))
        return self._replace(seconds=moving_average(self.seconds, without_outlier(seconds, self.seconds), GAIN))


_NEVER: Final = _Alone(0, inf)


class FairShare:
    """tenants: the favoured ones, as of the last `update`. max_prompt_tokens: limit for a step without favoured
    requests; with several tenants about it is one chunk, since a request that arrives has to wait for the step's
    end."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.tenants: frozenset[str] = frozenset()
        self.max_prompt_tokens = config.max_batch_tokens
        self._max_rows = min(config.max_batch_size, config.max_batch_tokens)
        self._max_tokens = config.max_batch_tokens
        self._max_chunk = config.chunked_prefill_tokens
        self._step_time = StepTimeModel()
        self._credit_s = 0.0
        # Of steps of favoured rows alone that all decoded, by the number of rows.
        self._alone: dict[int, _Alone] = {}
        self._num_together = 0
        self._num_turns = 0
        self._last_tenant: str | None = None
        self._shared_until = -inf

    def update(self, tenants: TenantCounters, now: float) -> None:
        """Decides who is favoured: tenants with no more requests than their share of a step's rows, if another has
        more.

        A tenant that has been served over a step's worth more than those others is not favoured: it waits for them. And
        none is when together they could take every slot, for then slots have to be shared by what was served.
        """
        num_requests = tenants.num_requests
        many = len(num_requests) > self._max_rows
        favoured = self._favoured_of_many(tenants) if many else self._favoured_of_few(tenants)
        if favoured and not self.tenants:
            self._credit_s = 0.0
            self._alone.clear()
        self.note_present(tenants, now)
        self.tenants = favoured
        self.max_prompt_tokens = self._max_chunk if now < self._shared_until else self._max_tokens

    def note_present(self, tenants: TenantCounters, now: float) -> None:
        """Notes who has requests here, under other policies too: many a policy is switched because of several tenants,
        and none of them should then wait for a long step."""
        for tenant in islice(tenants.num_requests, 2):
            if tenant != self._last_tenant:
                self._shared_until = -inf if self._last_tenant is None else now + ARRIVAL_WINDOW_S
                self._last_tenant = tenant

    def end(self) -> None:
        """Favours nobody from now on."""
        self.tenants, self.max_prompt_tokens = frozenset(), self._max_tokens

    def choose(self, favoured: StepSize, others: Sequence[Request], max_tokens: int) -> tuple[list[Request], int]:
        """Returns which of the others, in the order given, get a row in a step that computes `favoured`, and the
        prefill budget for them and for requests that start. max_tokens: what the step's token budget has left."""
        step_time, seconds, alone_s = self._step_time, self._credit_s, self._seconds_alone(favoured)
        if seconds <= 0 or alone_s is None or self._num_together >= MAX_STEPS_TOGETHER:
            return [], 0
        if seconds < alone_s and seconds < step_time.added_s(self._demand(others)):
            return [], 0
        self._num_turns += 1
        chosen, prefill_budget = set(), 0
        for request in sorted(others, key=lambda request: (request.rank[1], request.last_turn)):
            if seconds <= 0 or max_tokens <= 0:
                break
            count = min(request.num_due, self._max_chunk, max_tokens)
            if request.num_due > 1:
                count = min(count, max(LEAST_CHUNK, self._num_affordable(seconds)))
                prefill_budget += count
                seconds -= step_time.token_s * count
            else:
                seconds -= step_time.row_s * count
            max_tokens -= count
            request.last_turn = self._num_turns
            chosen.add(request.id)
        if seconds > 0 and len(chosen) == len(others):
            prefill_budget += min(max_tokens, self._num_affordable(seconds))
        return [request for request in others if request.id in chosen], prefill_budget

    def plan(self, favoured: StepSize, whole: StepSize) -> SharedStep:
        """Records a step with favoured requests that is launched now; spends what the others are expected to add."""
        others = StepSize(whole.decode_rows - favoured.decode_rows, whole.prefill_tokens - favoured.prefill_tokens)
        predicted_s = self._step_time.added_s(others)
        self._credit_s -= predicted_s
        self._num_together = 0 if whole == favoured else self._num_together + 1
        return SharedStep(favoured, predicted_s)

    def note(self, size: StepSize, shared: SharedStep | None, seconds: float) -> None:
        """Learns from a step's time, and corrects the credit: what was spent for it was a prediction."""
        self._step_time.note(size, seconds)
        if shared is None:
            return
        alone_s = self._seconds_alone(shared.favoured)
        if size == shared.favoured:
            if not size.prefill_tokens:
                rows = size.decode_rows
                self._alone[rows] = self._alone.get(rows, _NEVER).with_step(seconds)
            alone_s = seconds
        alone_s = min(seconds, alone_s or seconds)
        max_s = MAX_CREDIT_STEPS * alone_s
        credit_s = self._credit_s + shared.predicted_s + LATENCY_FACTOR * alone_s - seconds
        self._credit_s = max(-max_s, min(max_s, credit_s))

    def _favoured_of_few(self, tenants: TenantCounters) -> frozenset[str]:
        """Returns the favoured tenants when there are no more tenants than a step has rows."""
        num_requests, served = tenants.num_requests, tenants.served
        total = sum(num_requests.values())
        share = min(self._max_rows, total) / max(1, len(num_requests))
        others = [served(tenant) for tenant, num in num_requests.items() if num > share]
        if not others:
            return frozenset()
        limit = min(others) + self._max_tokens
        favoured = frozenset(t for t, num in num_requests.items() if num <= share and served(t) <= limit)
        return favoured if sum(map(num_requests.__getitem__, favoured)) < self._max_rows else frozenset()

    def _favoured_of_many(self, tenants: TenantCounters) -> frozenset[str]:
        """Returns the favoured tenants when there are so many that the share of each is one request or less."""
        least = tenants.least_served_of_others
        if least is None:
            return frozenset()
        singles = tenants.singles(least + self._max_tokens, self._max_rows)
        return frozenset(singles) if len(singles) < self._max_rows else frozenset()

    def _seconds_alone(self, size: StepSize) -> float | None:
        """Returns what a step of favoured requests takes without others; None while that is not known."""
        if size.prefill_tokens:
            return self._step_time.seconds_of(size)
        known = self._alone.get(size.decode_rows, _NEVER)
        return known.seconds if known.num_steps == FIRST_STEPS_ALONE else None

    def _demand(self, others: Sequence[Request]) -> StepSize:
        """Returns what these would compute in a step of their own."""
        dues = [request.num_due for request in others]
        prefill_tokens = sum(min(due, self._max_chunk) for due in dues if due > 1)
        return StepSize(dues.count(1), min(prefill_tokens, self._max_tokens))

    def _num_affordable(self, seconds: float) -> int:
        """Returns how many prompt tokens can be computed in so many seconds."""
        return int(min(self._max_tokens, seconds / max(self._step_time.token_s, 1e-12)))
