"""Request: all that the engine keeps of one sequence being generated.

Mutated by the scheduler and its parts (state, tokens, times) and by `kv.manager` (pages, page names, num_computed).
Holds no tensor.
"""

import enum
from dataclasses import dataclass, field
from typing import Final, Literal

from inferflux.engine.ngrams import Ngrams
from inferflux.engine.step import Tier
from inferflux.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]

# A request's `draft_acceptance` before any of its draft tokens has been verified.
INITIAL_ACCEPTANCE: Final = 0.6


class RequestState(enum.Enum):
    """LOADING: the request waits while its cached prefix is loaded from a lower tier."""

    WAITING = "waiting"
    LOADING = "loading"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One sequence. Keys and values of positions `0..num_computed-1` are in `pages`.

    max_total_tokens: limit of prompt and output together.
    tokens: prompt, then output; `len(tokens) - num_computed` are still to be computed (1 while decoding).
    num_cached: tokens of the prefix that were cached when it first ran.
    pages: device pages in order of position; page j holds positions j*page_tokens onwards.
    page_names: content names of the leading full pages known so far (see `kv.hashing`); never longer than
        len(tokens) // page_tokens.
    slot: the row's number in the runner's tables while RUNNING, else None.
    num_planned, num_pending: tokens that steps in flight compute, and tokens that they sample: not yet counted in
        num_computed and tokens.
    num_loads: how often its prefix was loaded since it last ran; num_loaded: pages that were loaded, by tier.
    rank: place in the scheduling policy's order, smallest first; set by `scheduler.order`. queued_time: since when it
        waits for its turn: its arrival, or the end of its last timeslice. turn_start: len(tokens) when its turn began.
    num_turns: timeslices it has used up. last_turn: when `scheduler.fair_share` last gave it a row.
    draft_acceptance: estimated probability that a draft token is right (see `scheduler.speculator`).
    ngrams: index of its tokens, for drafts by prompt lookup.
    adapter: number of its adapter, 0 for none; adapter_name: the adapter's part in the names of pages (see
        `kv.hashing`).
    """

    id: int
    prompt_token_ids: list[int]
    sampling: SamplingParams
    seed: int
    max_total_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    arrival_time: float = 0.0
    priority: int = 0
    tenant: str = ""
    salt: bytes = b""
    adapter: int = 0
    adapter_name: bytes = b""

    tokens: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    pages: list[int] = field(default_factory=list)
    page_names: list[bytes] = field(default_factory=list)
    slot: int | None = None
    num_planned: int = 0
    num_pending: int = 0
    rank: tuple[int, float, int] = (0, 0.0, 0)
    queued_time: float = 0.0
    turn_start: int = 0
    num_turns: int = 0
    last_turn: int = 0
    state: RequestState = RequestState.WAITING
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    first_scheduled_time: float | None = None
    num_loads: int = 0
    num_loaded: dict[Tier, int] = field(default_factory=dict)
    draft_acceptance: float = INITIAL_ACCEPTANCE
    ngrams: Ngrams | None = None

    def __post_init__(self) -> None:
        if not self.tokens:
            self.tokens = list(self.prompt_token_ids)
        self.queued_time, self.turn_start = self.arrival_time, len(self.tokens)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - len(self.prompt_token_ids)

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def num_due(self) -> int:
        """Tokens that the next step can compute: 1 while decoding, 0 when a step in flight samples the last one."""
        num_tokens = len(self.tokens)
        if self.num_pending:
            num_tokens += self.num_pending
            if num_tokens >= self.max_total_tokens:
                return 0
        return num_tokens - self.num_computed - self.num_planned
