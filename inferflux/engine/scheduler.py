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

import heapq
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from copy import copy
from itertools import chain

from inferflux.config import FairnessConfig, SchedulerConfig
from inferflux.engine.draft import StepDraft
from inferflux.engine.flight import Flight, is_alive, is_own, living
from inferflux.engine.kv.manager import KVManager
from inferflux.engine.news import error_news, finish_reason, token_news, vector_news
from inferflux.engine.order import Order, by_rank, check_queues
from inferflux.engine.policies import Policy
from inferflux.engine.request import FinishReason, Request, RequestState
from inferflux.engine.service.protocol import Output
from inferflux.engine.stats import EngineStats
from inferflux.engine.step import RowOutput, StepOutput, StepPlan, TokenLogprobs
from inferflux.errors import RequestError

# How many requests that wait for pages being computed right now may be passed over in one step.
MAX_PASSED_OVER = 16


class Scheduler:
    """The queue, the running requests and their slots.

    Both queues are sorted by rank. `_scores` holds the prompt log-probabilities collected so far, by request id.
    `_in_flight`: steps without results so far, oldest first.
    `_admission_blocked`: the waiting request next in order found no room, and none has been freed since.
    Raises ConfigError when the policy is not known.
    """

    def __init__(
        self, config: SchedulerConfig, fairness: FairnessConfig, kv: KVManager, clock: Callable[[], float]
    ) -> None:
        self._kv = kv
        self._clock = clock
        self._order = Order(config.policy, fairness, kv.num_cached_tokens, clock)
        self._max_batch_tokens = config.max_batch_tokens
        self._max_chunk_tokens = config.chunked_prefill_tokens
        # A row needs at least one token of the budget, so more rows than tokens could not all advance.
        self._num_slots = min(config.max_batch_size, config.max_batch_tokens)
        self._free_slots = list(range(self._num_slots))
        self._requests: dict[int, Request] = {}
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._loading: list[Request] = []
        self._in_flight: deque[Flight] = deque()
        self._scores: dict[int, list[TokenLogprobs]] = {}
        self._admission_blocked = False
        self._stats = EngineStats()

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting or self._loading)

    def add(self, request: Request) -> None:
        """Queues a request. Lowers its max_total_tokens to what the pool could hold if it were alone.

        Raises RequestError when even its prompt and one token of output are more than that.
        """
        num_tokens = len(request.tokens)
        assert request.max_total_tokens > num_tokens > 0, "nothing to compute or nothing to generate"
        if not self._kv.fits(num_tokens + (request.sampling.pooling is None)):
            raise RequestError(
                f"prompt: has {num_tokens} tokens, which with one of output is more than the KV pool's "
                f"{self._kv.capacity_tokens}",
                param="prompt",
                code="context_length_exceeded",
            )
        if request.id in self._requests:
            raise RequestError(f"request_id: {request.id} is running already", param="request_id")
        # The last token is never computed, so it needs no place.
        request.max_total_tokens = min(request.max_total_tokens, self._kv.capacity_tokens + 1)
        self._order.enter(request)
        self._requests[request.id] = request
        insort(self._waiting, request, key=by_rank)
        self._admission_blocked = False

    def configure(self, policy: str | Policy, fairness: FairnessConfig) -> None:
        """Puts another policy in force, by name or one of your own, for those that wait and run already too.

        Raises ConfigError.
        """
        self._order.configure(policy, fairness)
        self._order.sort(self._waiting, self._running, self._loading)
        self._admission_blocked = False

    def abort(self, request_ids: list[int]) -> None:
        """Ends these requests at once, whatever they are doing; unknown ids are ignored. No news follows."""
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None:
                self._end(request, "abort")

    def abort_all(self) -> None:
        """Ends every request."""
        self.abort(list(self._requests))

    def schedule(self) -> StepPlan | None:
        """Returns the next step, or None when there is nothing to run, or nothing before the step in flight has its
        results.

        Decodes come first in the budget, then running prefills by rank, then waiting requests. Pages of the plan's rows
        are taken here. At most one plan may be without its `update` when this is called.
        """
        assert sum(map(is_alive, self._in_flight)) <= 1, "the update of the plan before the last one is still due"
        if self._must_wait():
            return None
        stats, kv = self._stats, self._kv
        for request in list(filter(kv.is_loaded, self._loading)):
            self._stop_loading(request)
        if self._waiting:
            self._give_way()
        num_preemptions = stats.preemptions
        rows = self._order.next_rows(self._running)
        budget = self._max_batch_tokens - [request.num_due for request in rows].count(1)
        draft = StepDraft(min(budget, self._max_chunk_tokens) if self._order.is_limited else budget)
        self._plan_running(draft, rows)
        if stats.preemptions == num_preemptions:
            self._admit(draft)
        planned = draft.requests
        if not planned and any(map(is_alive, self._in_flight)):
            return None
        moves, wipe = kv.take_moves()
        if not (planned or wipe or kv.has_chores):
            return None
        stats.steps += 1
        stats.batch_tokens = draft.num_tokens
        plan = draft.plan(stats.steps, moves, wait=not planned and self.has_work, wipe=wipe)
        for row, request in zip(plan.rows, planned, strict=True):
            request.num_planned += len(row.token_ids)
            request.num_pending += row.sample
        lives = [(request, request.num_preemptions) for request in planned]
        self._in_flight.append(Flight(stats.steps, lives, self._clock(), draft.num_prefill_tokens))
        return plan

    def update(self, plan: StepPlan, output: StepOutput) -> list[Output]:
        """Takes in the oldest plan's results and returns the requests' news. Results of requests that have ended or
        yielded since are dropped."""
        while (flight := self._in_flight.popleft()).step_id < plan.step_id:
            assert not is_alive(flight), "results of an earlier step are still due"
        assert output.step_id == plan.step_id == flight.step_id, "results of another step"
        if output.moves or output.file_news:
            self._kv.end_moves(output.moves, output.file_news)
            self._admission_blocked = False
        if plan.rows:
            seconds = self._clock() - flight.started
            self._kv.rates.note_step(flight.num_prefill_tokens, plan.num_tokens, seconds)
            if not flight.num_prefill_tokens:
                self._order.note_step(plan.num_tokens, seconds)
        commit = self._kv.commit
        news: list[Output] = []
        for row, result, (request, life) in zip(plan.rows, output.rows, flight.requests, strict=True):
            if not is_own(request, life):
                continue
            request.num_planned -= len(row.token_ids)
            request.num_pending -= row.sample
            if result.error is not None:
                # What the failed step wrote is not committed, so nobody else will find it.
                self._end(request, "error")
                news.append(error_news(request, result.error))
                continue
            commit(request, len(row.token_ids))
            if row.score and result.prompt_logprobs:
                self._scores[request.id] += result.prompt_logprobs
            if row.sample:
                news.append(self._append(request, result))
        return news

    def stats(self) -> EngineStats:
        """Returns the numbers of this moment."""
        stats = copy(self._stats)
        stats.running = len(self._running)
        stats.waiting = len(self._waiting) + len(self._loading)
        stats.loading = len(self._loading)
        self._kv.report(stats)
        return stats

    def check_integrity(self) -> None:
        """Asserts that every page, slot and request is accounted for. For tests and idle moments."""
        self._kv.check_integrity(self._running + self._loading)
        slots = [request.slot for request in self._running if request.slot is not None]
        assert sorted(slots + self._free_slots) == list(range(self._num_slots)), "a slot is lost or taken twice"
        assert len(slots) == len(self._running), "a running request has no slot"
        check_queues(self._waiting, self._loading, self._running)
        assert len(self._requests) == len(self._waiting) + len(self._loading) + len(self._running)
        assert self._scores.keys() <= {request.id for request in self._running}
        flown = {request.id for request in chain.from_iterable(map(living, self._in_flight))}
        assert {request.id for request in self._requests.values() if request.num_planned} == flown

    def _give_way(self) -> None:
        """Brings the queues up to date. Where nobody can be admitted, running requests yield their places as the policy
        wants it: all whose turn is over, or one to a request that may take it."""
        if self._order.moves:
            first = self._waiting[0]
            self._order.sort(self._waiting, self._running, self._loading)
            self._admission_blocked &= self._waiting[0] is first
        if self._free_slots and not self._admission_blocked:
            return
        spent = self._order.spent(self._waiting, self._running)
        for request in spent:
            self._preempt(request, turn_over=True)
        victim = None if spent else self._order.victim(self._waiting[0], self._running)
        if victim is not None:
            self._preempt(victim)

    def _must_wait(self) -> bool:
        """Whether planning ahead of the step in flight is no use: a row's next token is chosen by the value of the one
        still to come, or pages are so short that a request might have to yield them to one about to end."""
        for flight in self._in_flight:
            if any(request.num_pending and request.sampling.reads_tokens for request, _ in flight.requests):
                return True
            if is_alive(flight):
                num_wanted = len(self._running) + self._kv.num_pages_for(self._max_batch_tokens)
                return not self._kv.has_room(num_wanted)
        return False

    def _plan_running(self, draft: StepDraft, rows: list[Request]) -> None:
        """Gives these running requests, the first ones, their shares of the step, as far as budget and pages go."""
        allocate, add_decode = self._kv.allocate, draft.add_decode
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
            elif num_due and draft.prefill_budget > 0:
                count = min(num_due, self._max_chunk_tokens, draft.prefill_budget)
                pages = self._make_room(request, request.num_planned + count)
                if pages is not None:
                    draft.add_prefill(request, count, pages, request.id in self._scores)

    def _make_room(self, request: Request, count: int) -> list[int] | None:
        """Returns pages for the `count` tokens after the computed ones. To make room, loading requests wait again, then
        running ones are preempted, each from the end of the list.

        None when the request was itself the last one and had to yield, or sits this step out, since moves hold pages.
        """
        while (pages := self._kv.allocate(request, count)) is None:
            if self._loading:
                self._stop_loading(self._loading[-1])
                continue
            if len(self._running) == 1:
                assert self._kv.num_under_way, "a request alone always fits: add() saw to it"
                return None
            victim = self._running[-1]
            self._preempt(victim)
            if victim is request:
                return None
        return pages

    def _admit(self, draft: StepDraft) -> None:
        """Starts waiting requests in order of rank while there are slots, budget and pages for all of their tokens.

        A request whose next page is being computed or loaded by another right now is passed over: it will find that
        page cached. One whose next pages are worth loading from a lower tier begins to load instead of starting.
        The first one that finds no room stops the rest, so that small requests do not starve a large one.
        """
        if self._admission_blocked or not self._waiting:
            return
        kv = self._kv
        in_flight = chain.from_iterable(map(living, self._in_flight))
        computing = {kv.computing_name(request) for request in (*draft.prefilling, *in_flight)} - {None}
        num_reserved = sum(map(kv.num_pages_to_come, self._running + self._loading))
        num_passed_over = 0
        while self._free_slots and draft.prefill_budget > 0:
            if num_passed_over == min(MAX_PASSED_OVER, len(self._waiting)):
                return
            request = self._waiting[num_passed_over]
            if not self._order.may_start(request, self._running):
                return
            matched = kv.match_prefix(request)
            awaited = kv.awaited_name(request, len(matched))
            if awaited in computing or kv.is_coming(awaited):
                num_passed_over += 1
                continue
            below = kv.look_below(request, len(matched))
            if below.sources:
                if not kv.start_load(request, matched, below, num_reserved):
                    self._admission_blocked = True
                    return
                del self._waiting[num_passed_over]
                request.state = RequestState.LOADING
                insort(self._loading, request, key=by_rank)
                num_reserved += kv.num_pages_to_come(request)
                continue
            max_tokens = min(self._max_chunk_tokens, draft.prefill_budget)
            if not kv.admit(request, matched, max_tokens, num_reserved):
                self._admission_blocked = True
                return
            kv.note_declined(below)
            del self._waiting[num_passed_over]
            self._start(request)
            draft.add_start(request)
            count = min(request.num_uncomputed, max_tokens)
            draft.add_prefill(request, count, request.pages.copy(), request.id in self._scores)
            computing |= {kv.computing_name(request)} - {None}
            num_reserved += kv.num_pages_to_come(request)
            if self._order.shares:
                self._order.sort(self._waiting)

    def _stop_loading(self, request: Request) -> None:
        """Makes a loading request wait again, whatever of its prefix has come."""
        _remove(self._loading, request)
        self._kv.finish_load(request)
        request.state = RequestState.WAITING
        insort(self._waiting, request, key=by_rank)
        self._admission_blocked = False

    def _start(self, request: Request) -> None:
        """Makes a request that has just been given pages a running one."""
        request.slot = heapq.heappop(self._free_slots)
        request.state = RequestState.RUNNING
        insort(self._running, request, key=by_rank)
        if request.first_scheduled_time is None:
            request.first_scheduled_time = self._clock()
            request.num_cached = request.num_computed
            self._order.charge_prompt(request)
            self._stats.prompt_tokens += request.num_prompt_tokens
        if request.sampling.prompt_logprobs is not None and request.num_output_tokens == 0:
            self._scores[request.id] = []

    def _append(self, request: Request, result: RowOutput) -> Output:
        """Appends a sampled token, ends the request when it is its last, and returns the news."""
        if result.vector is not None:
            self._end(request, "stop")
            return vector_news(request, result.vector)
        token_id = result.token_id
        assert token_id is not None, "the row was to sample"
        request.tokens.append(token_id)
        self._order.charge_output(request)
        self._stats.generation_tokens += 1
        reason = finish_reason(request, token_id)
        news = token_news(request, result, reason, self._scores.pop(request.id, None))
        if reason is not None:
            self._end(request, reason)
        return news

    def _preempt(self, request: Request, *, turn_over: bool = False) -> None:
        self._leave(request)
        if turn_over:
            self._order.queue_again(request)
        request.state = RequestState.WAITING
        request.num_preemptions += 1
        insort(self._waiting, request, key=by_rank)
        self._stats.preemptions += 1

    def _end(self, request: Request, reason: FinishReason) -> None:
        if request.state is RequestState.LOADING:
            self._stop_loading(request)
        if request.state is RequestState.RUNNING:
            self._leave(request)
        else:
            _remove(self._waiting, request)
            self._admission_blocked = False
        del self._requests[request.id]
        self._order.leave(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason

    def _leave(self, request: Request) -> None:
        """Takes a running request out of the running list, and its pages and slot back."""
        assert request.slot is not None
        _remove(self._running, request)
        self._kv.release(request)
        self._scores.pop(request.id, None)
        heapq.heappush(self._free_slots, request.slot)
        request.slot = None
        request.num_planned = request.num_pending = 0
        self._admission_blocked = False


def _remove(queue: list[Request], request: Request) -> None:
    del queue[bisect_left(queue, request.rank, key=by_rank)]
