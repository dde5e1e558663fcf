"""The words between deciding and computing: StepPlan goes down to the runner, StepOutput comes back.

Plain data that can be printed, recorded, replayed and broadcast. The scheduler and the runner share this file and
nothing else.
"""

from typing import Literal

import msgspec

from inferflux.sampling_params import SamplingParams


class RowStart(msgspec.Struct, frozen=True):
    """A request takes a slot in the runner's tables (first time, or again after a preemption).

    slot: 0 <= slot < max_batch_size; whatever held it before is gone.
    history: prompt and output tokens so far; kept by the runner only when a penalty needs them.
    eos_token_ids: ids held back from sampling until min_tokens are out.
    adapter: the number of the adapter that computes it; 0: the model as it is.
    """

    slot: int
    request_id: int
    sampling: SamplingParams
    seed: int
    history: list[int]
    num_prompt_tokens: int
    eos_token_ids: list[int]
    adapter: int = 0


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One request's share of a step: compute `token_ids` at positions start, start+1, ...

    new_pages: pages to append to the slot's page table before computing (after a RowStart the table is empty).
    sample: the last token's logits yield the request's next token.
    score: also return the log-probability of each token that follows within this chunk and of `next_token_id`.
    next_token_id: the prompt token after this chunk, for `score`; None at the prompt's end.
    is_draft: the only token is a guess at the one that the row before of this slot samples; the result counts only if
        it is right.
    pool: the hidden states of all its tokens go into the request's vector. A request with `SamplingParams.pooling` has
        its vector instead of a next token when `sample` says so.
    follows: the only token is the one that the step before sampled for this slot, whose value was not known when this
        was planned: the runner has it, `token_ids` holds a 0 in its place.
    """

    slot: int
    start: int
    token_ids: list[int]
    new_pages: list[int]
    sample: bool
    score: bool = False
    next_token_id: int | None = None
    follows: bool = False
    pool: bool = False
    is_draft: bool = False


Tier = Literal["cpu", "nvme"]
MoveKind = Literal["demote", "promote", "store", "load"]
FileState = Literal["on", "full", "off"]


class PageMove(msgspec.Struct, frozen=True):
    """One page's way between tiers; every rank moves its own shard of it. Each move has one MoveResult, in any order.

    demote: device to host, before this step's rows write anything (the page is theirs from then on).
    promote: host to device. store: host to the file's slot. load: the file's slot to host and on to device.
    These three run beside the steps; until their result, what they read and write is touched by nobody else.
    Moves start in the order they are given: a later one may write where an earlier demote reads.
    name: the page's (see `kv.hashing`), written to and checked against the file.
    """

    id: int
    kind: MoveKind
    name: bytes
    host: int
    device: int | None = None
    file: int | None = None


class MoveResult(msgspec.Struct, frozen=True):
    """seconds: how long the move itself took. error: why its destination holds nothing of use; `damaged`: the file had
    no such page, whole and of that name; `io`: the file failed, and FileChange follows."""

    id: int
    seconds: float
    error: Literal["damaged", "io"] | None = None


class FileChange(msgspec.Struct, frozen=True):
    """The file tier's state changed. num_slots: how many slots can be used from now on.

    pages: on turning `on`, the slots that hold pages with their names, least recently stored first; the books forget
    what they knew. None: what they know still holds. num_foreign: pages found there that are another model's.
    """

    state: FileState
    num_slots: int
    pages: list[tuple[int, bytes]] | None = None
    num_foreign: int = 0


class StepPlan(msgspec.Struct, frozen=True):
    """What to compute in one step. Rows stand in the order of their results; there may be none.

    moves: pages that change tiers, started before the rows are computed. wait: nothing else is to be done until one
    of the moves under way has its result, so wait for it, if only for some milliseconds. wipe: forget all pages in the
    file first.
    """

    step_id: int
    starts: list[RowStart]
    rows: list[Row]
    moves: list[PageMove] = []
    wait: bool = False
    wipe: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities (natural log, of the model's own distribution: before temperature, penalties and filters).

    top: the k likeliest (token id, logprob), likeliest first. rank: 1 for the likeliest token.
    """

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class RowOutput(msgspec.Struct, frozen=True):
    """The result of one row. token_id is None when the row did not sample.

    prompt_logprobs: for a scored row, one entry per scored token, in order.
    vector: of a pooled request, its float32 numbers, little-endian.
    error: this row failed (others did not); the request must end. error_param: the request's field that is to blame.
    """

    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    error: str | None = None
    vector: bytes | None = None
    error_param: str | None = None


class StepOutput(msgspec.Struct, frozen=True):
    """Results in the order of StepPlan.rows. moves: of moves that have ended, this step's or earlier ones'."""

    step_id: int
    rows: list[RowOutput]
    moves: list[MoveResult] = []
    file_changes: list[FileChange] = []
