"""FakeRunner: a runner whose "model" is a hash of everything it reads through the page table.

Pages hold the tokens written to them, and whose salt and which adapter wrote them. The next token depends on the whole
context as read back from the pages as they were before the step, so a page given away too early, found too early or put
in the wrong place garbles the output, and is caught on the spot besides. `expected_tokens` says what a request must
yield.
"""

import zlib
from array import array
from dataclasses import dataclass, field

from msgspec import structs

from inferflux.engine.request import Request
from inferflux.engine.step import Row, RowOutput, RowStart, StepOutput, StepPlan, TokenLogprobs
from tests.support.fake_tiers import FakeTiers

VOCAB_SIZE = 53


@dataclass
class _Slot:
    """owner: whose pages it may read. has_failed: rows planned before that was known read what it left behind."""

    request_id: int
    seed: int
    owner: bytes
    known: list[int]
    written: list[int] = field(default_factory=list)
    table: list[int] = field(default_factory=list)
    has_failed: bool = False


class FakeRunner:
    """Executes plans in plain Python.

    salts: request id to salt; every token a request reads must have been written under its own, by its own adapter.
    failing: request ids whose next row yields an error, and leaves behind what is none of its tokens. tiers: where the
    plans' page moves go.
    """

    def __init__(self, num_pages: int, page_tokens: int, tiers: FakeTiers | None = None) -> None:
        self.tiers = tiers
        self.page_tokens = page_tokens
        self.salts: dict[int, bytes] = {}
        self.failing: set[int] = set()
        self._cells: list[list[tuple[bytes, int] | None]] = [[None] * page_tokens for _ in range(num_pages)]
        self._slots: dict[int, _Slot] = {}

    def execute(self, plan: StepPlan) -> StepOutput:
        if self.tiers is not None:
            self.tiers.start(plan.moves, plan.wipe, self._cells)
        for start in plan.starts:
            self._start(start)
        writes: dict[tuple[int, int], tuple[bytes, int]] = {}
        results = []
        for planned in plan.rows:
            slot = self._slots[planned.slot]
            row = _with_tokens(planned, slot)
            slot.table += row.new_pages
            if not row.is_draft:
                slot.written = []
            self._write(slot, row, writes)
            results.append(self._compute(slot, row))
            slot.written += row.token_ids
        for (page, offset), cell in writes.items():
            self._cells[page][offset] = cell
        moves, file_changes = ([], []) if self.tiers is None else self.tiers.poll(self._cells)
        return StepOutput(plan.step_id, results, moves, file_changes)

    def _start(self, start: RowStart) -> None:
        owner = b"%d " % start.adapter + self.salts.get(start.request_id, b"")
        self._slots[start.slot] = _Slot(
            start.request_id, seed_of(start.seed, start.adapter), owner, list(start.history)
        )

    def _write(self, slot: _Slot, row: Row, writes: dict[tuple[int, int], tuple[bytes, int]]) -> None:
        end = row.start + len(row.token_ids)
        assert row.token_ids, "an empty row"
        if not row.is_draft:
            assert row.token_ids == slot.known[row.start : end], "a row computes tokens that are not the request's"
            assert row.sample == (end == len(slot.known)), "a row samples before its last token, or fails to"
        for position, token in zip(range(row.start, end), row.token_ids, strict=True):
            place = (slot.table[position // self.page_tokens], position % self.page_tokens)
            assert place not in writes, "two tokens of one step go to the same place"
            writes[place] = (slot.owner, -1 if slot.request_id in self.failing else token)

    def _compute(self, slot: _Slot, row: Row) -> RowOutput:
        context = [*self._read(slot, row.start - len(slot.written)), *slot.written, *row.token_ids]
        if slot.request_id in self.failing:
            self.failing.discard(slot.request_id)
            slot.has_failed = True
            return RowOutput(error="out of luck")
        scores = self._score(slot, row, context) if row.score else None
        if not row.sample:
            return RowOutput(prompt_logprobs=scores)
        token = next_token(context, slot.seed)
        if not row.is_draft or context == slot.known:
            slot.known.append(token)
        return RowOutput(token, score_of(context, token), scores)

    def _read(self, slot: _Slot, end: int) -> list[int]:
        places = (divmod(position, self.page_tokens) for position in range(end))
        cells = [self._cells[slot.table[index]][offset] for index, offset in places]
        expected = [(slot.owner, token) for token in slot.known[:end]]
        assert cells == expected or slot.has_failed, f"request {slot.request_id} reads another context than its own"
        return [token for _, token in expected]

    def _score(self, slot: _Slot, row: Row, context: list[int]) -> list[TokenLogprobs]:
        following = row.token_ids[1:] + ([] if row.next_token_id is None else [row.next_token_id])
        return [score_of(context[: row.start + 1 + i], token) for i, token in enumerate(following)]


def _with_tokens(row: Row, slot: _Slot) -> Row:
    """Fills in the token that the step before sampled; after a failed row that is any."""
    if not row.follows:
        return row
    assert row.token_ids == [0], "a token that nobody knows yet"
    slot.known += [0] * (row.start + 1 - len(slot.known))
    return structs.replace(row, token_ids=[slot.known[row.start]])


def seed_of(seed: int, adapter: int) -> int:
    """An adapter's request says something else."""
    return seed + 1000 * adapter


def next_token(context: list[int], seed: int) -> int:
    return zlib.crc32(array("q", [seed, *context]).tobytes()) % VOCAB_SIZE


def score_of(context: list[int], token: int) -> TokenLogprobs:
    """A made-up log-probability that depends on the token and all before it."""
    return TokenLogprobs(token, -float(zlib.crc32(array("q", [*context, token]).tobytes()) % 1000), 1, [])


def expected_tokens(request: Request, capacity_tokens: int) -> tuple[list[int], str]:
    """Returns the output and finish reason that `request` must have, computed without pages or batches."""
    sampling, tokens = request.sampling, list(request.prompt_token_ids)
    num_prompt = len(tokens)
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else request.eos_token_ids)
    while True:
        token = next_token(tokens, seed_of(request.seed, request.adapter))
        tokens.append(token)
        if token in stops and len(tokens) - num_prompt > sampling.min_tokens:
            return tokens[num_prompt:], "stop"
        if len(tokens) >= min(request.max_total_tokens, capacity_tokens + 1):
            return tokens[num_prompt:], "length"
