"""What passes between scheduler and runner: a StepPlan goes down, a StepOutput comes back.

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
    adapter: the number of the request's adapter; 0: none.
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
    follows: the only token is the one that the previous step samples for this slot. Its value was not known when this
        row was planned: the runner has it, and `token_ids` holds a 0 in its place.
    pool: the hidden states of all its tokens go into the request's vector. A request with `SamplingParams.pooling` gets
        a vector instead of a next token when `sample` is set.
    is_draft: the only token is a draft: a guess at what the slot's previous row samples. The result counts only if the
        guess is right.
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
    """Moves one page between tiers; every rank moves its own shard. Each move has one MoveResult, in any order.

    demote: device to host, before this step's rows write anything (which may reuse the page).
    promote: host to device. store: host to the file. load: the file to host and on to the device.
    The last three run in parallel with the steps; nothing else touches their source and destination until their result.
    Moves start in the given order: a later one may write where an earlier demote reads.
    name: of the page (see `kv.hashing`), stored in and checked against the file.
    host, device, file: slot numbers; those that the move does not involve are None.
    """

    id: int
    kind: MoveKind
    name: bytes
    host: int
    device: int | None = None
    file: int | None = None


class MoveResult(msgspec.Struct, frozen=True):
    """seconds: how long the move itself took. error: why its destination is invalid; `damaged`: the file has no intact
    page of that name; `io`: the file failed, and a FileChange follows."""

    id: int
    seconds: float
    error: Literal["damaged", "io"] | None = None


class FileChange(msgspec.Struct, frozen=True):
    """The file tier has changed its state. num_slots: how many slots can be used from now on.

    state: `on`; `full`, when pages can be read but no more written; `off`, when the file has failed.
    pages: when it turns `on`, the slots with the names of their pages, least recently stored first, which replaces what
    was known; None: nothing else has changed. num_foreign: pages of another model found there.
    """

    state: FileState
    num_slots: int
    pages: list[tuple[int, bytes]] | None = None
    num_foreign: int = 0


class StepPlan(msgspec.Struct, frozen=True):
    """What to compute in one step. Results come in the order of `rows`; there may be none.

    starts: requests that take a slot, before any row. moves: page moves, started before the rows are computed.
    wait: there is nothing to compute until a move ends, so wait some milliseconds for one. wipe: first forget all pages
    in the file.
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
    """A token's log-probability (natural log) in the model's distribution, before temperature, penalties and filters.

    rank: 1 for the likeliest token. top: the k likeliest as (token id, logprob), likeliest first.
    """

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class RowOutput(msgspec.Struct, frozen=True):
    """The result of one row.

    token_id: the sampled token; None when the row did not sample. logprobs: its log-probabilities, if asked for.
    prompt_logprobs: for a scored row, one entry per scored token, in order.
    vector: for a pooled request, float32 little-endian.
    error: why this row failed (the others did not); the request must end. error_param: the request field to blame.
    """

    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    error: str | None = None
    vector: bytes | None = None
    error_param: str | None = None


class StepOutput(msgspec.Struct, frozen=True):
    """Results of a step. rows: in the order of StepPlan.rows. moves: of moves that have ended, of this step or earlier
    ones. file_changes: to be applied after `moves`."""

    step_id: int
    rows: list[RowOutput]
    moves: list[MoveResult] = []
    file_changes: list[FileChange] = []
