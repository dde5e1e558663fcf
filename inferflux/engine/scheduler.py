"""Scheduler: decides what each step computes, and takes in its results.

Continuous batching: one step mixes decodes and prefill chunks under one token budget. Knows tokens, pages and slots as
numbers; knows no tensor, no model and no runner. One thread calls everything here; `schedule` and `update` alternate,
or `schedule` is one step ahead; `add` and `abort` may come between any two calls.

Planned ahead means: while a step is in flight, its tokens count as computed and the ones it samples as there, though
nobody knows their values. What turns out otherwise is put right by `update`: a row whose request has ended, or has
yielded its pages, has no result. What such a row still writes is harmless: it goes to a place past its request's full
pages, and whoever gets that page writes later.

Order is by rank (`order`): running requests are served smallest rank first, and pages are taken from the largest.
So the smallest always advances, which rules out livelock. A request that yields its pages waits again under its old
rank, ahead of whatever came after it; its full pages stay cached, so resuming is a prefix hit. One whose timeslice is
over queues again behind the others. A request whose prefix lies in a lower tier holds pages while it is loading, and no
slot; when they are filled it waits again, and finds them.
"""

from collections import deque
from collections.abc import Callable, Iterable
from copy import copy
from itertools import chain

from inferflux.config import FairnessConfig, SchedulerConfig
from inferflux.engine.flight import Flight, is_alive, is_own, living
from inferflux.engine.interface import Output
from inferflux.engine.kv.manager import KVManager
from inferflux.engine.order import Order
from inferflux.engine.pace import Load
from inferflux.engine.policies import Policy
from inferflux.engine.queues import Queues
from inferflux.engine.request import Request
from inferflux.engine.request_outputs import failed_output, finish_reason, pooled_output, prompt_output, token_output
from inferflux.engine.speculator import Speculator
from inferflux.engine.stats import EngineStats
from inferflux.engine.step import RowOutput, StepOutput, StepPlan
from inferflux.engine.step_builder import StepBuilder
from inferflux.errors import RequestError

# No step computes more of prompts than takes this long: what comes meanwhile has to wait, and an engine that is silent
# for a minute is taken for stuck.
LONGEST_STEP_S = 10.0
# How many requests that wait for pages being computed right now may be passed over in one step.
MAX_PASSED_OVER = 16


class Scheduler:
    """The requests in their queues, and the steps in flight: those without results so far, oldest first.

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
        self._max_chunk_tokens = config.chunked_prefill_tokens
        # A row needs at least one token of the budget, so more rows than tokens could not all advance.
        num_slots = min(config.max_batch_size, config.max_batch_tokens)
        self._stats = EngineStats()
        self._queues = Queues(num_slots, kv, self._order, self._stats, clock)
        self._in_flight: deque[Flight] = deque()
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
                f"prompt: has {num_tokens} tokens, which with one of output is more than the KV pool's "
                f"{self._kv.capacity_tokens}",
                param="prompt",
                code="context_length_exceeded",
            )
        if request.id in self._queues.requests:
            raise RequestError(f"request_id: {request.id} is running already", param="request_id")
        # The last token is never computed, so it needs no place.
        request.max_total_tokens = min(request.max_total_tokens, self._kv.capacity_tokens + 1)
        self._queues.add(request)

    def configure(self, policy: str | Policy, fairness: FairnessConfig) -> None:
        """Puts another policy in force, by name or one of your own, for those that wait and run already too.

        Raises ConfigError.
        """
        self._order.configure(policy, fairness)
        self._queues.rearrange()

    def abort(self, request_ids: list[int]) -> None:
        """Ends these requests at once, whatever they are doing; unknown ids are ignored. No output follows."""
        for request_id in request_ids:
            request = self._queues.requests.get(request_id)
            if request is not None:
                self._queues.end(request, "abort")

    def abort_all(self) -> None:
        """Ends every request."""
        self.abort(list(self._queues.requests))

    def schedule(self) -> StepPlan | None:
        """Returns the next step, or None when there is nothing to run, or nothing before the step in flight has its
        results.

        Pages of the plan's rows are taken here. At most one plan may be without its `update` when this is called.
        """
        assert sum(map(is_alive, self._in_flight)) <= 1, "the update of the plan before the last one is still due"
        if self._must_wait():
            return None
        stats, kv = self._stats, self._kv
        for request in list(filter(kv.is_loaded, self._queues.loading)):
            self._queues.stop_loading(request)
        favours = self._queues.look()
        if self._queues.waiting:
            self._give_way()
        elif favours:
            self._queues.sort()
        step = StepBuilder()
        alone = self._fill(step, favours)
        if self._speculator is not None and alone is None:
            self._speculator.extend(step, len(self._queues.running))
        planned = step.requests
        if not planned and any(map(is_alive, self._in_flight)):
            return None
        moves, wipe = kv.take_moves()
        if not (planned or wipe or kv.has_chores):
            return None
        stats.steps += 1
        stats.batch_tokens = step.num_tokens
        plan = step.plan(stats.steps, moves, wait=not planned and self.has_work, wipe=wipe)
        for row, request in zip(plan.rows, planned, strict=True):
            if not row.is_draft:
                request.num_planned += len(row.token_ids)
                request.num_pending += row.sample
        lives = [(request, request.num_preemptions) for request in planned]
        beside = None if alone is None else self._order.favour.plan(alone, step.load)
        self._in_flight.append(Flight(stats.steps, lives, self._clock(), step.load, beside))
        return plan

    def update(self, plan: StepPlan, output: StepOutput) -> list[Output]:
        """Takes in the oldest plan's results and returns the requests' outputs. Results of requests that have ended or
        yielded since are dropped."""
        while (flight := self._in_flight.popleft()).step_id < plan.step_id:
            assert not is_alive(flight), "results of an earlier step are still due"
        assert output.step_id == plan.step_id == flight.step_id, "results of another step"
        if output.moves or output.file_changes:
            self._kv.end_moves(output.moves, output.file_changes)
            self._queues.is_blocked = False
        now = self._clock()
        if plan.rows:
            # A step planned ahead begins when the one before it ends.
            seconds = now - max(flight.started, self._last_update)
            self._kv.rates.note_step(flight.load.prompt, plan.num_tokens, seconds)
            self._order.note_step(flight.load, flight.beside, seconds)
            if self._speculator is not None:
                self._speculator.note_step(flight.load, seconds)
        self._last_update = now
        commit = self._kv.commit
        outputs: list[Output] = []
        for row, result, (request, life) in zip(plan.rows, output.rows, flight.requests, strict=True):
            if not is_own(request, life):
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
                self._queues.scores[request.id] += result.prompt_logprobs
            if row.sample:
                outputs.append(self._append(request, result))
        return outputs

    def stats(self) -> EngineStats:
        """Returns the numbers of this moment."""
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
        flown = {request.id for request in chain.from_iterable(map(living, self._in_flight))}
        assert {request.id for request in self._queues.requests.values() if request.num_planned} == flown

    def _give_way(self) -> None:
        """Brings the queues up to date. Where nobody can be admitted, running requests yield their places as the policy
        wants it: all whose turn is over, or one to a request that may take it."""
        waiting, running = self._queues.waiting, self._queues.running
        if self._order.moves and (self._queues.has_free_slot or self._order.may_displace(waiting.first)):
            self._queues.sort()
        elif self._order.moves:
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
        """Whether planning ahead of the step in flight is no use: a row's next token is chosen by the value of the one
        still to come, or pages are so short that a request might have to yield them to one about to end."""
        for flight in self._in_flight:
            if self._speculator is not None and is_alive(flight):
                return True
            if any(request.num_pending and request.sampling.reads_tokens for request, _ in flight.requests):
                return True
            if is_alive(flight):
                num_wanted = len(self._queues.running) + self._kv.num_pages_for(self._max_batch_tokens)
                return not self._kv.has_room(num_wanted)
        return False

    def _fill(self, step: StepBuilder, favours: bool) -> Load | None:
        """Puts a step together: requests that go first, running and waiting ones, then the others beside them. Of each,
        decodes come first in the budget, then running prefills by rank, then waiting requests.

        Returns what favoured requests compute, and those that go before them; None when no favoured one has a row.
        """
        order, queues, stats = self._order, self._queues, self._stats
        num_preemptions = stats.preemptions
        alone, others, budget = None, queues.running, self._max_batch_tokens
        max_prompt_tokens = self._kv.rates.tokens_within(LONGEST_STEP_S)
        if favours:
            first = queues.running[: order.num_first(queues.running)]
            step.prefill_budget = min(budget - _num_decoding(first), max_prompt_tokens)
            self._plan_running(step, first)
            self._admit(step, order.goes_first)
            if queues.is_blocked and order.is_favoured(queues.waiting.first):
                # One of the others yields now, for otherwise they would have this step to themselves.
                victim = order.victim(queues.waiting.first, queues.running[order.num_first(queues.running) :])
                if victim is not None:
                    queues.preempt(victim)
                    self._admit(step, order.goes_first)
            if any(map(order.is_favoured, step.requests)):
                alone = step.load
            others = queues.running[order.num_first(queues.running) :]
            budget -= step.num_tokens
        if alone is None:
            rows = others[:budget]
            limits = budget - _num_decoding(rows), order.favour.max_prompt_tokens, max_prompt_tokens - step.load.prompt
            step.prefill_budget = min(limits)
        else:
            rows, step.prefill_budget = order.favour.choose(alone, others, budget)
        self._plan_running(step, rows)
        if stats.preemptions == num_preemptions:
            self._admit(step)
        return alone

    def _plan_running(self, step: StepBuilder, rows: list[Request]) -> None:
        """Gives these running requests, in order of rank, their shares of the step, as far as budget and pages go."""
        allocate, add_decode = self._kv.allocate, step.add_decode
        # Making room removes requests from the end of the list: those not reached yet, at worst the one at hand.
        for request in rows:
            num_due = request.num_due
            if request.slot is None:
                return
            if num_due == 1:
                count = request.num_planned + 1
                pages = allocate(request, count)
                if pages is None:
                    pages = self._make_room(request, count)
                if pages is not None:
                    add_decode(request, pages)
            elif num_due and step.prefill_budget > 0:
                count = min(num_due, self._max_chunk_tokens, step.prefill_budget)
                pages = self._make_room(request, request.num_planned + count)
                if pages is not None:
                    step.add_prefill(request, count, pages, request.id in self._queues.scores)

    def _make_room(self, request: Request, count: int) -> list[int] | None:
        """Returns pages for the `count` tokens after the computed ones. To make room, loading requests wait again, then
        running ones are preempted, each from the end of the list.

        None when the request was itself the last one and had to yield, or sits this step out, since moves hold pages.
        """
        while (pages := self._kv.allocate(request, count)) is None:
            if self._queues.loading:
                self._queues.stop_loading(self._queues.loading[-1])
                continue
            if len(self._queues.running) == 1:
                assert self._kv.num_under_way, "a request alone always fits: add() saw to it"
                return None
            victim = self._queues.running[-1]
            self._queues.preempt(victim)
            if victim is request:
                return None
        return pages

    def _admit(self, step: StepBuilder, may_start: Callable[[Request], bool] | None = None) -> None:
        """Starts waiting requests in their turn while there are slots, budget and pages for all of their tokens; up to
        the first that may not.

        A request whose next page is being computed or loaded by another right now is passed over: it will find that
        page cached. One whose next pages are worth loading from a lower tier begins to load instead of starting.
        The first one that finds no room stops the rest, so that small requests do not starve a large one.
        """
        queues = self._queues
        if queues.is_blocked or not queues.waiting or not queues.has_free_slot or step.prefill_budget <= 0:
            return
        if may_start is not None and not may_start(queues.waiting.first):
            return
        kv = self._kv
        in_flight = chain.from_iterable(map(living, self._in_flight))
        computing = {kv.computing_name(request) for request in (*step.prefilling, *in_flight)} - {None}
        num_reserved = sum(map(kv.num_pages_to_come, queues.running + queues.loading))
        num_passed_over, is_blocked = 0, False
        while queues.waiting and queues.has_free_slot and step.prefill_budget > 0:
            request = queues.waiting.first
            if may_start is not None and not may_start(request):
                break
            matched = kv.match_prefix(request)
            awaited = kv.awaited_name(request, len(matched))
            if awaited in computing or kv.is_coming(awaited):
                queues.waiting.set_aside(request)
                num_passed_over += 1
                if num_passed_over == MAX_PASSED_OVER:
                    break
                continue
            below = kv.look_below(request, len(matched))
            if below.sources:
                if not kv.start_load(request, matched, below, num_reserved):
                    is_blocked = True
                    break
                queues.load(request)
                num_reserved += kv.num_pages_to_come(request)
                continue
            max_tokens = min(self._max_chunk_tokens, step.prefill_budget)
            if not kv.admit(request, matched, max_tokens, num_reserved):
                is_blocked = True
                break
            kv.note_declined(below)
            queues.start(request)
            step.add_start(request)
            count = min(request.num_uncomputed, max_tokens)
            step.add_prefill(request, count, request.pages.copy(), request.id in queues.scores)
            computing |= {kv.computing_name(request)} - {None}
            num_reserved += kv.num_pages_to_come(request)
        queues.waiting.take_back()
        if is_blocked:
            queues.block()

    def _append(self, request: Request, result: RowOutput) -> Output:
        """Appends a sampled token, ends the request when it is its last, and returns its output."""
        if result.vector is not None:
            self._queues.end(request, "stop")
            return pooled_output(request, result.vector)
        if request.sampling.max_tokens == 0:
            output = prompt_output(request, self._queues.scores.pop(request.id, None))
            self._queues.end(request, "length")
            return output
        token_id = result.token_id
        assert token_id is not None, "the row was to sample"
        request.tokens.append(token_id)
        self._order.charge_output(request)
        self._stats.generation_tokens += 1
        reason = finish_reason(request, token_id)
        output = token_output(request, result, reason, self._queues.scores.pop(request.id, None))
        if reason is not None:
            self._queues.end(request, reason)
        return output


def _num_decoding(requests: Iterable[Request]) -> int:
    return [request.num_due for request in requests].count(1)
