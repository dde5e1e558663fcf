"""The runner with a decoder that answers from the pool: chunks, slots, scoring, seeds and broken rows."""

from typing import Any

import msgspec
import pytest
import torch

from inferflux.engine.runner.isolation import FAILED, MAX_FAILURES
from inferflux.engine.runner.outputs import NOT_FINITE
from inferflux.engine.runner.runner import SCORED_AT_ONCE, Runner
from inferflux.engine.step import Row, RowOutput, RowStart, StepPlan
from inferflux.kernels.kernel_set import select
from inferflux.sampling_params import SamplingParams
from tests.support.fake_decoder import FakeDecoder

KERNELS = select(torch.device("cpu"), torch.float32)
PAGE_TOKENS = 4
NUM_SLOTS = 4
PAGES_PER_SLOT = 10


class Sequences:
    """Plays the scheduler: requests with pages of their own, stepped as the test says."""

    def __init__(self, decoder: FakeDecoder, num_slots: int = NUM_SLOTS) -> None:
        self.decoder = decoder
        pool = decoder.make_pool(num_slots * PAGES_PER_SLOT, PAGE_TOKENS)
        self.runner = Runner(decoder, KERNELS, pool, max_batch_size=num_slots, max_pages_per_row=PAGES_PER_SLOT)
        self.runner.isolate_failures()
        self.tokens: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.prompts: dict[int, int] = {}
        self.params: dict[int, SamplingParams] = {}
        self._starts: list[RowStart] = []

    def start(self, slot: int, tokens: list[int], num_prompt_tokens: int | None = None, **params: Any) -> None:
        self.tokens[slot], self.computed[slot] = list(tokens), 0
        self.prompts[slot] = len(tokens) if num_prompt_tokens is None else num_prompt_tokens
        self.params[slot] = SamplingParams(**params)
        seed = self.params[slot].seed or 0
        self._starts.append(RowStart(slot, slot, self.params[slot], seed, list(tokens), self.prompts[slot], []))

    def row(self, slot: int, count: int | None = None) -> Row:
        """The next `count` tokens of the slot (None: all that are known)."""
        tokens, first = self.tokens[slot], self.computed[slot]
        end = len(tokens) if count is None else min(len(tokens), first + count)
        pages = range(-(-first // PAGE_TOKENS), -(-end // PAGE_TOKENS))
        score = self.params[slot].prompt_logprobs is not None and first < self.prompts[slot]
        is_last = end == len(tokens)
        # Pages in descending order, so that neighbours in a row are not neighbours in the pool.
        new_pages = [(slot + 1) * PAGES_PER_SLOT - 1 - page for page in pages]
        next_token_id = tokens[end] if score and not is_last else None
        return Row(slot, first, tokens[first:end], new_pages, is_last, score, next_token_id)

    def step(self, *rows: Row) -> list[RowOutput]:
        plan = StepPlan(7, self._starts, list(rows))
        self._starts = []
        output = self.runner.execute(plan)
        assert output.step_id == 7
        for row, result in zip(rows, output.rows, strict=True):
            self.computed[row.slot] += len(row.token_ids)
            if result.token_id is not None:
                assert row.sample
                self.tokens[row.slot].append(result.token_id)
        return output.rows


def generate(tokens: list[int], num_tokens: int, chunk: int, **params: Any) -> list[int]:
    """One request alone, its prompt in chunks; returns its output."""
    sequences = Sequences(FakeDecoder())
    sequences.start(2, tokens, **params)
    while len(sequences.tokens[2]) < len(tokens) + num_tokens:
        sequences.step(sequences.row(2, chunk))
    return sequences.tokens[2][len(tokens) :]


@pytest.mark.parametrize("chunk", [1, 3, 4, 100])
def test_greedy_follows_the_decoder_whatever_the_chunks(chunk: int):
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    tokens = list(prompt)
    for _ in range(8):
        tokens.append(int(FakeDecoder().logits_after(tokens).argmax()))
    assert generate(prompt, 8, chunk, temperature=0.0) == tokens[len(prompt) :]


RANDOM: list[dict[str, Any]] = [
    {"seed": 5},
    {"seed": 6, "top_k": 4, "temperature": 1.5},
    {"seed": 7, "repetition_penalty": 1.5, "frequency_penalty": 0.3},
    {"temperature": 0.0, "presence_penalty": 1.0, "logprobs": 1},
]


def test_output_does_not_depend_on_neighbours_or_chunks():
    prompts = [[slot + 1] * (3 * slot + 1) for slot in range(4)]
    together = Sequences(FakeDecoder())
    for slot, params in enumerate(RANDOM):
        together.start(slot, prompts[slot], **params)
    for step in range(16):
        together.step(*(together.row(slot, 2 + slot) for slot in range(4) if (step + slot) % 3))
    for slot, params in enumerate(RANDOM):
        output = together.tokens[slot][len(prompts[slot]) :]
        assert len(output) >= 5
        assert output == generate(prompts[slot], len(output), 100, **params)


def test_resuming_with_a_history_changes_nothing():
    """As after a preemption: another slot, all known tokens computed anew, counts rebuilt from the history."""
    params = {"seed": 7, "repetition_penalty": 1.5, "frequency_penalty": 0.3}
    expected = generate([4, 2, 4], 10, 100, **params)
    sequences = Sequences(FakeDecoder())
    sequences.start(1, [4, 2, 4, *expected[:6]], num_prompt_tokens=3, **params)
    while len(sequences.tokens[1]) < 13:
        sequences.step(sequences.row(1, 4))
    assert sequences.tokens[1][3:] == expected


@pytest.mark.parametrize("chunk", [1, 5, 200])
def test_prompt_scores_equal_a_full_log_softmax(chunk: int):
    """Beside a row that is not scored."""
    decoder = FakeDecoder()
    sequences = Sequences(decoder)
    prompt = [(7 * index) % 11 for index in range(31)]
    sequences.start(0, prompt, temperature=0.0, prompt_logprobs=2)
    sequences.start(3, [1, 2, 3], temperature=0.0)
    scored = []
    while len(sequences.tokens[0]) == len(prompt):
        result, other = sequences.step(sequences.row(0, chunk), sequences.row(3))
        assert result.prompt_logprobs is not None
        assert other.prompt_logprobs is None
        scored += result.prompt_logprobs
    assert [entry.token_id for entry in scored] == prompt[1:]
    for index, entry in enumerate(scored):
        logprobs = torch.log_softmax(decoder.logits_after(prompt[: index + 1]), dim=0)
        assert entry.logprob == float(logprobs[entry.token_id])
        assert entry.rank == 1 + int((logprobs > logprobs[entry.token_id]).sum())
        assert entry.top == list(zip(logprobs.topk(2).indices.tolist(), logprobs.topk(2).values.tolist(), strict=True))


def test_scoring_goes_beyond_what_is_held_at_once():
    decoder = FakeDecoder()
    pool = decoder.make_pool(40, PAGE_TOKENS)
    runner = Runner(decoder, KERNELS, pool, max_batch_size=1, max_pages_per_row=40)
    prompt = [index % 13 for index in range(150)]
    start = RowStart(0, 0, SamplingParams(prompt_logprobs=0, temperature=0.0), 0, prompt, len(prompt), [])
    (result,) = runner.execute(StepPlan(1, [start], [Row(0, 0, prompt, list(range(38)), True, score=True)])).rows
    assert result.prompt_logprobs is not None
    assert len(result.prompt_logprobs) == 149
    assert result.prompt_logprobs[130].logprob == float(
        torch.log_softmax(decoder.logits_after(prompt[:131]), 0)[prompt[131]]
    )
    assert decoder.most_logits == SCORED_AT_ONCE, "logits of a whole prompt were held"


def test_a_prompt_of_one_token_has_nothing_to_score():
    sequences = Sequences(FakeDecoder())
    sequences.start(0, [5], temperature=0.0, prompt_logprobs=1)
    (result,) = sequences.step(sequences.row(0))
    assert result.prompt_logprobs == []
    assert result.token_id is not None


def test_sampled_logprobs_come_back_for_the_rows_that_asked():
    decoder = FakeDecoder()
    sequences = Sequences(decoder)
    sequences.start(0, [1, 2], temperature=0.0)
    sequences.start(1, [3, 4], temperature=0.0, logprobs=2)
    sequences.start(2, [6] * 9, temperature=0.0, logprobs=0)
    plain, asked, unfinished = sequences.step(sequences.row(0), sequences.row(1), sequences.row(2, 4))
    assert plain.logprobs is None
    assert unfinished == RowOutput()
    logprobs = torch.log_softmax(decoder.logits_after([3, 4]), dim=0)
    assert asked.logprobs is not None
    assert asked.logprobs.token_id == asked.token_id
    assert asked.logprobs.rank == 1
    assert asked.logprobs.logprob == float(logprobs.max())
    assert [token_id for token_id, _ in asked.logprobs.top] == logprobs.topk(2).indices.tolist()


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"seed": 1}, {"temperature": 0.0, "prompt_logprobs": 1}])
def test_a_broken_row_errs_alone(params: dict[str, Any]):
    sequences = Sequences(FakeDecoder(broken_token=13))
    healthy = Sequences(FakeDecoder(broken_token=13))
    for slot, prompt in enumerate(([1, 2], [13, 2], [3])):
        sequences.start(slot, prompt, **params)
        healthy.start(slot, [1 if token_id == 13 else token_id for token_id in prompt], **params)
    results = sequences.step(*(sequences.row(slot) for slot in range(3)))
    expected = healthy.step(*(healthy.row(slot) for slot in range(3)))
    assert results[1].error is not None
    assert results[1].token_id is None
    assert [results[0], results[2]] == [expected[0], expected[2]]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_broken_chunk_errs_though_nothing_is_drawn_from_it(count: int):
    """Of its first, its last or any of its tokens. What it wrote is no prefix for others."""
    sequences = Sequences(FakeDecoder(broken_token=13))
    for slot, prompt in enumerate(([1, 2, 3, 4], [5, 13, 6, 7], [8, 9])):
        sequences.start(slot, prompt, temperature=0.0)
    results = sequences.step(*(sequences.row(slot, count) for slot in range(3)))
    assert results[1] == RowOutput(error=None if count == 1 else NOT_FINITE)
    assert [result.error for result in results[::2]] == [None, None]
    sequences.step(sequences.row(2), sequences.row(0))
    assert len(sequences.tokens[0]) == 5


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"seed": 1}, {"presence_penalty": 1.0, "seed": 2}])
def test_a_row_on_which_a_kernel_raises_fails_alone(params: dict[str, Any]):
    """The others say what they would have said, in this step and after it, though they were computed twice."""
    failing, healthy = Sequences(FakeDecoder()), Sequences(FakeDecoder())
    failing.decoder.refused_token = 13
    for slot, prompt in enumerate(([1, 2], [13, 2], [3, 4, 5, 6, 7], [8])):
        failing.start(slot, prompt, **params)
        healthy.start(slot, [1 if token_id == 13 else token_id for token_id in prompt], **params)
    results = failing.step(*(failing.row(slot) for slot in range(4)))
    expected = healthy.step(*(healthy.row(slot) for slot in range(4)))
    assert results[1] == RowOutput(error=FAILED)
    assert failing.decoder.num_forwards <= 1 + 2 * 2, "halves, and halves of the half that failed"
    del results[1], expected[1]
    assert results == expected
    for slots in [(0, 2, 3)] * 6:
        failing.decoder.refused_token = None
        assert failing.step(*map(failing.row, slots)) == healthy.step(*map(healthy.row, slots))


def test_pooled_rows_are_summed_up_once_though_computed_twice():
    vectors = []
    for refused_token in (None, 13):
        sequences = Sequences(FakeDecoder())
        sequences.start(0, [1, 2, 3, 4, 5, 6], pooling="mean")
        sequences.start(1, [13, 2])
        sequences.decoder.refused_token = refused_token
        pooled = msgspec.structs.replace(sequences.row(0, 3), pool=True)
        sequences.step(pooled, sequences.row(1))
        vectors.append(sequences.step(msgspec.structs.replace(sequences.row(0), pool=True)))
    assert vectors[0] == vectors[1]


def test_where_nothing_can_be_computed_the_engine_has_failed():
    sequences = Sequences(FakeDecoder())
    sequences.decoder.refused_token = 13
    for step in range(MAX_FAILURES + 1):
        sequences.start(0, [13])
        if step == MAX_FAILURES:
            with pytest.raises(RuntimeError, match="a kernel failed"):
                sequences.step(sequences.row(0))
        else:
            assert sequences.step(sequences.row(0)) == [RowOutput(error=FAILED)]


@pytest.mark.parametrize("others", [[], [0]], ids=["alone", "beside another"])
def test_drafts_fail_with_their_request_and_not_the_engine(others: list[int]):
    """Each is a row that fails, and there are more of them than failures that an engine survives."""
    sequences = Sequences(FakeDecoder(), num_slots=16)
    sequences.decoder.refused_token = 13
    for slot in (*others, 1):
        sequences.start(slot, [13] if slot == 1 else [1, 2])
    base = [sequences.row(slot) for slot in (*others, 1)]
    drafts = [Row(1, start, [13], [18, 17, 16] if start == 1 else [], True, is_draft=True) for start in range(1, 15)]
    assert len(drafts) > 2 * MAX_FAILURES
    results = sequences.runner.execute(StepPlan(1, sequences._starts, [*base, *drafts])).rows
    assert [result.error for result in results] == [None] * len(others) + [FAILED] * (1 + len(drafts))
    assert sequences.decoder.num_forwards < len(results), "drafts behind a row that failed are computed"


def test_when_the_device_is_lost_no_row_is_to_blame():
    sequences = Sequences(FakeDecoder())
    sequences.decoder.refused_token, sequences.decoder.error = 13, torch.AcceleratorError("an illegal address")
    for slot, prompt in enumerate(([1], [13])):
        sequences.start(slot, prompt)
    with pytest.raises(torch.AcceleratorError):
        sequences.step(*map(sequences.row, range(2)))
    assert sequences.decoder.num_forwards == 1


def test_a_step_that_samples_nothing_returns_empty_results():
    sequences = Sequences(FakeDecoder())
    sequences.start(0, [1] * 9, temperature=0.0)
    assert sequences.step(sequences.row(0, 4)) == [RowOutput()]
