"""Speculator: decides which requests get draft tokens, and how many; counts which were right.

A draft token is a guess at a request's next tokens. It has a row of its own in the step, one position after the token
before it; all rows are computed at once, and one counts only if the row before it sampled exactly the token that this
row assumed (speculative decoding: Leviathan et al. 2023, arXiv 2211.17192). A sample is a function of logits, seed and
position, so verification is a comparison, and the output is the same as without drafts.

Drafts are worth their time while rows are cheap: as long as the probability that a draft row counts is above the share
of a step's time that its rows take (the rest is fixed cost). So a single request gets many drafts and a full batch
none. Until the cost of a row is known, every other step has one draft, to measure it. A wrong draft leaves keys and
values past the computed ones, where the next step writes. Called from the scheduler's thread only. Knows no model.
"""

from collections.abc import Callable
from typing import Final

from inferflux.config import SchedulerConfig
from inferflux.engine.kv.manager import KVManager
from inferflux.engine.ngrams import Ngrams
from inferflux.engine.request import INITIAL_ACCEPTANCE, Request
from inferflux.engine.scheduler.row_cost import RowCost
from inferflux.engine.scheduler.step_builder import StepBuilder
from inferflux.engine.scheduler.step_time import StepSize
from inferflux.engine.smoothing import moving_average
from inferflux.engine.stats import EngineStats
from inferflux.engine.step import Row

# How much the newest verified draft counts: from the initial acceptance two wrong ones halve it, five right ones bring
# it to nine tenths.
WEIGHT: Final = 0.3
# How far a request without drafts returns to the initial acceptance with each step: its text may have changed.
FORGETTING: Final = 0.02

# Returns up to `count` tokens that may follow a request's.
Propose = Callable[[Request, int], list[int]]


class Speculator:
    """Adds drafts within a step's `limits`, at most max_drafts per request. propose: see `Propose`; may be replaced."""

    def __init__(self, kv: KVManager, limits: SchedulerConfig, max_drafts: int, propose: Propose) -> None:
        self._kv = kv
        self._limits = limits
        self._max_drafts = max_drafts
        self.propose = propose
        self._row_cost = RowCost()
        self._tries_one = False
        self._num_drafts = 0
        self._num_accepted = 0

    def extend(self, step: StepBuilder, num_running: int) -> None:
        """Adds draft rows, with their pages, for the step's decoding requests, leaving a page for each of num_running
        requests."""
        least = self._row_cost.share(len(step.decoding))
        left = self._num_allowed()
        for request in step.decoding:
            count = 0 if request.sampling.reads_tokens else min(left, self._num_worth(request, step, least))
            token_ids = self.propose(request, count)[:count] if count else []
            if not token_ids:
                request.draft_acceptance = moving_average(request.draft_acceptance, INITIAL_ACCEPTANCE, FORGETTING)
            elif self._kv.has_room(num_running + self._kv.num_pages_for(len(token_ids))):
                pages = self._kv.allocate(request, request.num_planned + 1 + len(token_ids))
                assert pages is not None, "there is room"
                step.add_drafts(request, token_ids, pages)
                left -= len(token_ids)
                self._num_drafts += len(token_ids)

    def accepts(self, request: Request, row: Row) -> bool:
        """Whether the request's newest token is the one that this draft row assumed. Called once per row, in order."""
        if row.start != len(request.tokens) - 1:
            return False  # a draft before this one was wrong
        is_right = row.token_ids[0] == request.tokens[-1]
        request.draft_acceptance = moving_average(request.draft_acceptance, is_right, WEIGHT)
        self._num_accepted += is_right
        return is_right

    def note_step(self, size: StepSize, seconds: float) -> None:
        """Learns from the time of a step without prompts."""
        if not size.prefill_tokens:
            self._row_cost.note(size.decode_rows, seconds)

    def report(self, stats: EngineStats) -> None:
        """Fills in the numbers of drafts."""
        stats.draft_tokens, stats.accepted_draft_tokens = self._num_drafts, self._num_accepted

    def _num_allowed(self) -> int:
        """Returns how many drafts a step may have in all. Until the cost of a row is known, one in every other step:
        eight for each of eight requests made a step six times as long on two cores, and learning took ten such
        steps."""
        if self._row_cost.is_known:
            return self._limits.max_batch_size
        self._tries_one = not self._tries_one
        return int(self._tries_one)

    def _num_worth(self, request: Request, step: StepBuilder, least: float) -> int:
        """Returns how many drafts fit and have at least the chance `least` to count, each being right with the
        request's acceptance if those before it are."""
        most = min(
            self._max_drafts,
            request.max_total_tokens - len(request.tokens) - 1,
            self._limits.max_batch_size - step.num_rows,
            self._limits.max_batch_tokens - step.num_tokens,
        )
        count, chance = 0, request.draft_acceptance
        while count < most and chance > least:
            count += 1
            chance *= request.draft_acceptance
        return count


def prompt_lookup(request: Request, count: int) -> list[int]:
    """Proposes what followed the request's last tokens earlier in its text (Yang et al. 2023, arXiv 2304.04487)."""
    if request.ngrams is None:
        request.ngrams = Ngrams()
    return request.ngrams.continuation(request.tokens, count)


def placeholders(request: Request, count: int) -> list[int]:
    """Proposes zeros, which a draft model will replace."""
    return [0] * count
