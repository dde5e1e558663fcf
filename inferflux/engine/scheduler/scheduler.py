"""Scheduler: decides what each step computes (with `step_planner`), and applies its results.

Continuous batching: one step mixes decodes and prefill chunks under one token budget. Knows tokens, pages and slots as
numbers; knows no tensor, no model and no runner. One thread calls everything here; `schedule` and `update` alternate,
or `schedule` is one step ahead; `add` and `abort` may come between any two calls.

Planning ahead: while a step is in flight, its tokens count as computed, and the tokens it samples as present, although
their values are not known. The result of a row whose request has ended or was preempted meanwhile is dropped. What such
a row still writes is harmless: it goes past its request's full pages, and the next owner of that page writes later.

A preempted request waits again with its old rank, ahead of later ones; its full pages stay cached, so resuming is a
prefix hit. One whose timeslice is over queues again behind the others. A request whose prefix is in a lower tier holds
pages while it is loading, but no slot; when they are filled it waits again, and finds them.
"""

from collections import deque
from collections.abc import Callable
from copy import copy

from inferflux.config import FairnessConfig, SchedulerConfig
from inferflux.engine.interface import Output
from inferflux.engine.kv.manager import KVManager
from inferflux.engine.request import Request
from inferflux.engine.scheduler.in_flight import InFlightStep, is_current
from inferflux.engine.scheduler.order import Order
from inferflux.engine.scheduler.policies import Policy
from inferflux.engine.scheduler.queues import Queues
from inferflux.engine.scheduler.request_outputs import (
    failed_output,
    finish_reason,
    pooled_output,
    prompt_output,
    token_output,
)
from inferflux.engine.scheduler.speculator import Speculator
from inferflux.engine.scheduler.step_builder import StepBuilder
from inferflux.engine.scheduler.step_planner import StepPlanner
from inferflux.engine.stats import EngineStats
from inferflux.engine.step import RowOutput, StepOutput, StepPlan
from inferflux.errors import RequestError


class Scheduler:
    """Holds the queues, and the steps in flight (without results so far, oldest first).

    Raises ConfigError when the policy is not known.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        fairness: FairnessConfig,
        kv: KVManager,
        clock: Callable[[], float],
        speculator: Speculator | None = None,
    ) -> None:
        self._kv = kv
        self._clock = clock
        self._speculator = speculator
        self._order = Order(config, fairness, kv.num_cached_tokens, clock)
        self._max_batch_tokens = config.max_batch_tokens
        # A row needs at least one token of the budget, so more rows than tokens could not all advance.
        num_slots = min(config.max_batch_size, config.max_batch_tokens)
        self._stats = EngineStats()
        self._queues = Queues(num_slots, kv, self._order, self._stats, clock)
        self._in_flight: deque[InFlightStep] = deque()
        self._planner = StepPlanner(config, kv, self._queues, self._order, self._stats, self._in_flight)
        self._last_update = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self._queues.requests)

    def add(self, request: Request) -> None:
        """Queues a request. Lowers its max_total_tokens to what the pool could hold if it were alone.

        Raises RequestError when even its prompt and one token of output are more than that.
        """
        num_tokens = len(request.tokens)
        assert request.max_total_tokens > num_tokens > 0, "nothing to compute or nothing to generate"
        if not self._kv.fits(num_tokens + request.sampling.generates):
            raise RequestError(
                f"prompt: has {num_tokens} tokens, which with one output token exceed the KV pool's "
                f"{self._kv.capacity_tokens}",
                param="prompt",
                code="context_length_exceeded",
            )
        if request.id in self._queues.requests:
            raise RequestError(f"request_id: {request.id} is running already", param="request_id")
        # The last token is never computed, so it needs no room in a page.
        request.max_total_tokens = min(request.max_total_tokens, self._kv.capacity_tokens + 1)
        self._queues.add(request)

    def configure(self, policy: str | Policy, fairness: FairnessConfig) -> None:
        """Switches to another policy, by name or one of your own, also for requests that wait or run already.

        Raises ConfigError.
        """
        self._order.configure(policy, fairness)
        self._queues.rearrange()

    def abort(self, request_ids: list[int]) -> None:
        """Ends these requests at once, in any state; unknown ids are ignored. No output follows."""
        for request_id in request_ids:
            request = self._queues.requests.get(request_id)
            if request is not None:
                self._queues.end(request, "abort")

    def abort_all(self) -> None:
        """Ends every request."""
        self.abort(list(self._queues.requests))

    def schedule(self) -> StepPlan | None:
        """Returns the next step; None when there is nothing to run, or nothing until the step in flight has its
        results.

        Allocates the pages of the plan's rows. At most one plan may be without its `update` when this is called.
        """
        assert sum(step.is_live for step in self._in_flight) <= 1, "the update of the plan before the last is still due"
        if self._must_wait():
            return None
        stats, kv = self._stats, self._kv
        for request in list(filter(kv.is_loaded, self._queues.loading)):
            self._queues.stop_loading(request)
        has_favoured = self._queues.update_favoured()
        if self._queues.waiting:
            self._give_way()
        elif has_favoured:
            self._queues.sort()
        step = StepBuilder()
        favoured = self._planner.fill(step, has_favoured)
        if self._speculator is not None and favoured is None:
            self._speculator.extend(step, len(self._queues.running))
        planned = step.requests
        if not planned and any(step.is_live for step in self._in_flight):
            return None
        moves, wipe = kv.take_moves()
        if not (planned or wipe or kv.has_background_work):
            return None
        stats.steps += 1
        stats.batch_tokens = step.num_tokens
        plan = step.plan(stats.steps, moves, wait=not planned and self.has_work, wipe=wipe)
        for row, request in zip(plan.rows, planned, strict=True):
            if not row.is_draft:
                request.num_planned += len(row.token_ids)
                request.num_pending += row.sample
        requests = [(request, request.num_preemptions) for request in planned]
        shared = None if favoured is None else self._order.fair_share.plan(favoured, step.size)
        self._in_flight.append(InFlightStep(stats.steps, requests, self._clock(), step.size, shared))
        return plan

    def update(self, plan: StepPlan, output: StepOutput) -> list[Output]:
        """Applies the results of the oldest plan in flight and returns the requests' outputs. Results of requests that
        have ended or were preempted since are dropped."""
        while (step := self._in_flight.popleft()).step_id < plan.step_id:
            assert not step.is_live, "results of an earlier step are still due"
        assert output.step_id == plan.step_id == step.step_id, "results of another step"
        if output.moves or output.file_changes:
            self._kv.end_moves(output.moves, output.file_changes)
            self._queues.is_blocked = False
        self._note_time(step, plan)
        commit = self._kv.commit
        outputs: list[Output] = []
        for row, result, (request, num_preemptions) in zip(plan.rows, output.rows, step.requests, strict=True):
            if not is_current(request, num_preemptions):
                continue
            if row.is_draft:
                assert self._speculator is not None
                if not self._speculator.accepts(request, row):
                    continue
            else:
                request.num_planned -= len(row.token_ids)
                request.num_pending -= row.sample
            if result.error is not None:
                # What the failed step wrote is not committed, so nobody else will find it.
                self._queues.end(request, "error")
                outputs.append(failed_output(request, result))
                continue
            commit(request, len(row.token_ids))
            if row.score and result.prompt_logprobs:
                self._queues.prompt_logprobs[request.id] += result.prompt_logprobs
            if row.sample:
                outputs.append(self._append(request, result))
        return outputs

    def stats(self) -> EngineStats:
        """Returns the current statistics."""
        stats = copy(self._stats)
        stats.running = len(self._queues.running)
        stats.waiting = len(self._queues.waiting) + len(self._queues.loading)
        stats.loading = len(self._queues.loading)
        self._kv.report(stats)
        if self._speculator is not None:
            self._speculator.report(stats)
        return stats

    def check_integrity(self) -> None:
        """Asserts that every page, slot and request is accounted for. For tests and idle moments."""
        self._kv.check_integrity(self._queues.running + self._queues.loading)
        self._queues.check_integrity()
        in_flight = {request.id for step in self._in_flight for request in step.live_requests()}
        assert {request.id for request in self._queues.requests.values() if request.num_planned} == in_flight

    def _give_way(self) -> None:
        """Sorts the queues. If no request can be admitted, preempts running ones as the policy demands: all whose
        timeslice is over, or one for a waiting request that may take its slot."""
        waiting, running = self._queues.waiting, self._queues.running
        if self._order.is_dynamic and (self._queues.has_free_slot or self._order.may_displace(waiting.first)):
            self._queues.sort()
        elif self._order.is_dynamic:
            self._order.sort(running, self._queues.loading)
        if self._queues.has_free_slot and not self._queues.is_blocked:
            return
        spent = self._order.spent(waiting.front, running)
        for request in spent:
            self._queues.preempt(request, turn_over=True)
        victim = None if spent else self._order.victim(waiting.first, running)
        if victim is not None:
            self._queues.preempt(victim)

    def _must_wait(self) -> bool:
        """Whether the next step cannot be planned before the one in flight has its results: sampling a row needs the
        value of a token that is not known yet, or pages are so short that a request might be preempted for one that is
        about to end."""
        for step in self._in_flight:
            if self._speculator is not None and step.is_live:
                return True
            if any(request.num_pending and request.sampling.reads_tokens for request, _ in step.requests):
                return True
            if step.is_live:
                num_wanted = len(self._queues.running) + self._kv.num_pages_for(self._max_batch_tokens)
                return not self._kv.has_room(num_wanted)
        return False

    def _note_time(self, step: InFlightStep, plan: StepPlan) -> None:
        """Passes the step's time to everything that predicts the time of steps."""
        now = self._clock()
        if plan.rows:
            # A step planned ahead begins when the one before it ends.
            seconds = now - max(step.started, self._last_update)
            self._kv.rates.note_step(step.size.prefill_tokens, plan.num_tokens, seconds)
            self._order.note_step(step.size, step.shared, seconds)
            if self._speculator is not None:
                self._speculator.note_step(step.size, seconds)
        self._last_update = now

    def _append(self, request: Request, result: RowOutput) -> Output:
        """Appends a sampled token, ends the request if it is the last one, and returns its output."""
        if result.vector is not None:
            self._queues.end(request, "stop")
            return pooled_output(request, result.vector)
        if request.sampling.max_tokens == 0:
            output = prompt_output(request, self._queues.prompt_logprobs.pop(request.id, None))
            self._queues.end(request, "length")
            return output
        token_id = result.token_id
        assert token_id is not None, "the row was to sample"
        request.tokens.append(token_id)
        self._order.charge_output(request)
        self._stats.generation_tokens += 1
        reason = finish_reason(request, token_id)
        output = token_output(request, result, reason, self._queues.prompt_logprobs.pop(request.id, None))
        if reason is not None:
            self._queues.end(request, reason)
        return output
