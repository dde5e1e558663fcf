"""StepPlanner: fills one step with running and waiting requests, within its budget of tokens and pages.

Running requests are served in order of rank (`order`), and pages are taken from those ranked last: so the first always
advances, which rules out livelock. Moves requests between the queues and allocates pages as it goes; when a step is
planned, and what becomes of its results, is the scheduler's work.
"""

from collections.abc import Callable, Collection, Iterable
from itertools import chain
from typing import Final

from inferflux.config import SchedulerConfig
from inferflux.engine.kv.manager import KVManager
from inferflux.engine.request import Request, RequestState
from inferflux.engine.scheduler.in_flight import InFlightStep
from inferflux.engine.scheduler.order import Order
from inferflux.engine.scheduler.queues import Queues
from inferflux.engine.scheduler.step_builder import StepBuilder
from inferflux.engine.scheduler.step_time import StepSize
from inferflux.engine.stats import EngineStats

# Longest time that a step may spend on prompt tokens: new requests wait for its end, and an engine that is silent for a
# minute is taken for stuck.
LONGEST_STEP_S: Final = 10.0
# How many requests that wait for pages being computed right now may be passed over in one step.
MAX_PASSED_OVER: Final = 16
# Where steps or chunks are smaller than this, prompts advance by single tokens too, or much of a step stayed empty.
SMALLEST_PAIRED_STEP: Final = 8


class StepPlanner:
    """One per scheduler, over its queues. in_flight: the steps without results so far, which the scheduler keeps."""

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVManager,
        queues: Queues,
        order: Order,
        stats: EngineStats,
        in_flight: Collection[InFlightStep],
    ) -> None:
        self._kv = kv
        self._queues = queues
        self._order = order
        self._stats = stats
        self._in_flight = in_flight
        self._max_batch_tokens = config.max_batch_tokens
        self._max_chunk_tokens = config.chunked_prefill_tokens
        self._keeps_pairs = min(config.max_batch_tokens, config.chunked_prefill_tokens) >= SMALLEST_PAIRED_STEP

    def fill(self, step: StepBuilder, has_favoured: bool) -> StepSize | None:
        """Puts a step together: requests that go first, running and waiting ones, then the others. Within each group
        decodes come first in the budget, then running prefills by rank, then waiting requests.

        has_favoured: some tenants are favoured (see `fair_share`). Returns what the requests that go first compute;
        None when none of them is favoured.
        """
        order, queues, num_preemptions = self._order, self._queues, self._stats.preemptions
        max_prompt_tokens = self._kv.rates.tokens_within(LONGEST_STEP_S)
        favoured = self._plan_favoured(step, max_prompt_tokens) if has_favoured else None
        others = queues.running[order.num_first(queues.running) :] if has_favoured else queues.running
        budget = self._max_batch_tokens - step.num_tokens
        if favoured is None:
            rows = others[:budget]
            step.prefill_budget = min(
                budget - _num_decoding(rows),
                order.fair_share.max_prompt_tokens,
                max_prompt_tokens - step.size.prefill_tokens,
            )
        else:
            rows, step.prefill_budget = order.fair_share.choose(favoured, others, budget)
        self._plan_running(step, rows)
        if self._stats.preemptions == num_preemptions:
            self._admit(step)
        return favoured

    def _plan_favoured(self, step: StepBuilder, max_prompt_tokens: int) -> StepSize | None:
        """Plans the requests that go first, running and waiting ones. Returns as `fill`."""
        order, queues = self._order, self._queues
        first = queues.running[: order.num_first(queues.running)]
        step.prefill_budget = min(self._max_batch_tokens - _num_decoding(first), max_prompt_tokens)
        self._plan_running(step, first)
        self._admit(step, order.goes_first)
        if queues.is_blocked and order.is_favoured(queues.waiting.first):
            # One of the others is preempted now: else they would have this step to themselves.
            victim = order.victim(queues.waiting.first, queues.running[order.num_first(queues.running) :])
            if victim is not None:
                queues.preempt(victim)
                self._admit(step, order.goes_first)
        return step.size if any(map(order.is_favoured, step.requests)) else None

    def _plan_running(self, step: StepBuilder, rows: list[Request]) -> None:
        """Adds rows for these running requests, in order of rank, as far as budget and pages go."""
        allocate, add_decode = self._kv.allocate, step.add_decode
        # Making room preempts requests from the end of the list: later ones, or at worst this one.
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
                count = self._chunk(num_due, step.prefill_budget)
                pages = self._make_room(request, request.num_planned + count) if count else None
                if pages is not None:
                    step.add_prefill(request, count, pages, request.id in self._queues.prompt_logprobs)

    def _make_room(self, request: Request, count: int) -> list[int] | None:
        """Returns pages for the `count` tokens after the computed ones. To make room, loading requests wait again, then
        running ones are preempted, each from the end of the list.

        None when the request was itself the last one and was preempted, or when it must wait for pages held by moves.
        """
        while (pages := self._kv.allocate(request, count)) is None:
            if self._queues.loading:
                self._queues.stop_loading(self._queues.loading[-1])
                continue
            if len(self._queues.running) == 1:
                assert self._kv.num_moves_in_progress, "a request alone always fits: add() saw to it"
                return None
            victim = self._queues.running[-1]
            self._queues.preempt(victim)
            if victim is request:
                return None
        return pages

    def _chunk(self, num_due: int, budget: int) -> int:
        """Returns how many of a prompt's `num_due` tokens to compute in a step that has room for `budget`; 0: none yet.

        Neither one alone nor all but one. Attention of a single token is that of a decode, whose last bits differ from
        a prompt's: what a prompt's caller receives would depend on the room that other requests leave.
        """
        count = min(num_due, self._max_chunk_tokens, budget)
        if count == num_due or not self._keeps_pairs:
            return count
        count -= num_due - count == 1
        return count if count > 1 else 0

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
        in_flight = chain.from_iterable(step.live_requests() for step in self._in_flight)
        computing = {kv.next_page_name(request) for request in (*step.prefilling, *in_flight)} - {None}
        num_reserved = sum(map(kv.num_pages_still_needed, queues.running + queues.loading))
        num_passed_over, is_blocked = 0, False
        while queues.waiting and queues.has_free_slot and step.prefill_budget > 0:
            request = queues.waiting.first
            if may_start is not None and not may_start(request):
                break
            matched = kv.match_prefix(request)
            missing = kv.first_missing_name(request, len(matched))
            if missing in computing or kv.is_being_loaded(missing):
                queues.waiting.set_aside(request)
                num_passed_over += 1
                if num_passed_over == MAX_PASSED_OVER:
                    break
                continue
            count = self._chunk(kv.num_uncached_tokens(request, matched), step.prefill_budget)
            if not count:
                break
            if not self._start(step, request, matched, count, num_reserved):
                is_blocked = True
                break
            num_reserved += kv.num_pages_still_needed(request)
            if request.state is RequestState.RUNNING:
                computing |= {kv.next_page_name(request)} - {None}
        queues.waiting.take_back()
        if is_blocked:
            queues.block()

    def _start(self, step: StepBuilder, request: Request, matched: list[int], count: int, num_reserved: int) -> bool:
        """Starts a waiting request, or the load of the rest of its prefix. False, and nothing changed, if there is no
        room. matched: its cached pages, as of now. count: how many tokens to compute, if it starts."""
        kv, queues = self._kv, self._queues
        in_tiers = kv.match_lower_tiers(request, len(matched))
        if in_tiers.sources:
            if not kv.start_load(request, matched, in_tiers, num_reserved):
                return False
            queues.load(request)
            return True
        if not kv.admit(request, matched, count, num_reserved):
            return False
        kv.note_declined(in_tiers)
        queues.start(request)
        step.add_start(request)
        step.add_prefill(request, count, request.pages.copy(), request.id in queues.prompt_logprobs)
        return True


def _num_decoding(requests: Iterable[Request]) -> int:
    return [request.num_due for request in requests].count(1)
