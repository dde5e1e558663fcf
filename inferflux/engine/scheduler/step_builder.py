"""StepBuilder: one step being put together, row by row.

Knows what a row looks like; who gets one is the scheduler's decision.
"""

from inferflux.engine.request import Request
from inferflux.engine.scheduler.step_time import StepSize
from inferflux.engine.step import PageMove, Row, RowStart, StepPlan


class StepBuilder:
    """Rows of one step. Decodes stand first, then their drafts, then prefills, whatever the order they are added in.

    prefill_budget: tokens that prefill may still use.
    """

    __slots__ = (
        "_decode_rows",
        "_draft_rows",
        "_drafting",
        "_prefill_rows",
        "_starts",
        "decoding",
        "num_tokens",
        "prefill_budget",
        "prefilling",
    )

    def __init__(self) -> None:
        self.prefill_budget = 0
        self.decoding: list[Request] = []
        self.prefilling: list[Request] = []
        self.num_tokens = 0
        self._starts: list[RowStart] = []
        self._decode_rows: list[Row] = []
        self._drafting: list[Request] = []
        self._draft_rows: list[Row] = []
        self._prefill_rows: list[Row] = []

    @property
    def requests(self) -> list[Request]:
        """The rows' requests, in the plan's order."""
        return self.decoding + self._drafting + self.prefilling

    @property
    def num_rows(self) -> int:
        return len(self.decoding) + len(self._drafting) + len(self.prefilling)

    @property
    def size(self) -> StepSize:
        num_rows = len(self.decoding) + len(self._drafting)
        return StepSize(num_rows, self.num_tokens - num_rows)

    def add_decode(self, request: Request, new_pages: list[int]) -> None:
        """The request's last token, which may be still to come, is computed and the next one sampled."""
        slot = request.slot
        assert slot is not None
        if request.num_pending:
            start = request.num_computed + request.num_planned
            self._decode_rows.append(Row(slot, start, [0], new_pages, True, follows=True))
        else:
            start = len(request.tokens) - 1
            self._decode_rows.append(Row(slot, start, request.tokens[-1:], new_pages, True, pool=_is_summed(request)))
        self.decoding.append(request)
        self.num_tokens += 1

    def add_drafts(self, request: Request, token_ids: list[int], new_pages: list[int]) -> None:
        """Behind a request that decodes: what it may sample now and in the steps to come, each token in its place."""
        assert request.slot is not None
        for start, token_id in enumerate(token_ids, len(request.tokens)):
            self._draft_rows.append(Row(request.slot, start, [token_id], new_pages, True, is_draft=True))
            self._drafting.append(request)
            new_pages = []
        self.num_tokens += len(token_ids)

    def add_prefill(self, request: Request, count: int, new_pages: list[int], score: bool) -> None:
        """The request's next `count` tokens are computed; when they are its last, the next one is sampled."""
        assert request.slot is not None
        tokens, start = request.tokens, request.num_computed + request.num_planned
        end = start + count
        is_last = end == len(tokens)
        self._prefill_rows.append(
            Row(
                slot=request.slot,
                start=start,
                token_ids=tokens[start:end],
                new_pages=new_pages,
                sample=is_last,
                score=score,
                next_token_id=tokens[end] if score and not is_last else None,
                pool=_is_summed(request),
            )
        )
        self.prefilling.append(request)
        self.prefill_budget -= count
        self.num_tokens += count

    def add_start(self, request: Request) -> None:
        """The request takes its slot in this step. Its row is added besides."""
        assert request.slot is not None
        self._starts.append(
            RowStart(
                slot=request.slot,
                request_id=request.id,
                sampling=request.sampling,
                seed=request.seed,
                history=request.tokens.copy(),
                num_prompt_tokens=request.num_prompt_tokens,
                eos_token_ids=[] if request.sampling.ignore_eos else sorted(request.eos_token_ids),
                adapter=request.adapter,
            )
        )

    def plan(self, step_id: int, moves: list[PageMove], *, wait: bool, wipe: bool) -> StepPlan:
        return StepPlan(
            step_id, self._starts, self._decode_rows + self._draft_rows + self._prefill_rows, moves, wait, wipe
        )


def _is_summed(request: Request) -> bool:
    """Whether every token of the request goes into its vector."""
    return request.sampling.pooling == "mean"
