"""Draft tokens: what is proposed, how many pay, and that what comes out is what came out without them.

Whether pages and rows are kept in order with drafts among them is in `test_scheduler` and `test_scheduler_properties`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from inferflux.config import SchedulerConfig
from inferflux.engine.kv.manager import KVManager
from inferflux.engine.ngrams import MAX_TOKENS, Ngrams
from inferflux.engine.request import Request
from inferflux.engine.scheduler.row_cost import RowCost
from inferflux.engine.scheduler.speculator import Speculator
from inferflux.engine.scheduler.step_builder import StepBuilder
from inferflux.engine.scheduler.step_time import StepSize
from inferflux.engine.step import Row
from inferflux.errors import ConfigError
from inferflux.sampling_params import Grammar, SamplingParams
from tests.support.engines import run_requests, start_engine, tokens_of
from tests.support.models import VOCAB_SIZE, TinyModel, build, make_tiny_model

MakeModel = Callable[[str], TinyModel]

PAGE_TOKENS = 4
LIMITS = SchedulerConfig(max_batch_size=32, max_batch_tokens=64)


def test_the_longest_run_that_came_up_before_is_continued() -> None:
    ngrams = Ngrams()
    assert ngrams.continuation([1, 2, 3, 4, 5], 3) == []
    assert ngrams.continuation([1, 2, 3, 4, 5, 9, 3, 4], 2) == [5, 9]
    # Both (3, 4) and (2, 3, 4) came up; of the pair the last place counts, of four tokens the only one.
    assert ngrams.continuation([1, 2, 3, 4, 5, 9, 3, 4, 8, 1, 2, 3, 4], 3) == [5, 9, 3]


def test_a_run_that_overlaps_its_continuation_goes_round() -> None:
    assert Ngrams().continuation([7, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
    assert Ngrams().continuation([6, 6, 6], 4) == [6, 6, 6, 6]


def test_only_the_end_of_a_long_sequence_is_looked_at() -> None:
    filler = list(range(1000, 1000 + MAX_TOKENS))
    assert Ngrams().continuation([1, 2, 3, *filler, 1, 2], 1) == []
    assert Ngrams().continuation([1, 2, 3, *filler[: MAX_TOKENS // 2], 1, 2], 1) == [3]


class Drafting:
    """A speculator with one request that decodes and whose drafts are all `token`."""

    def __init__(self, max_drafts: int = 8, num_pages: int = 16, token: int = 3) -> None:
        self.kv = KVManager(num_pages, PAGE_TOKENS, b"model", prefix_cache=True)
        self.speculator = Speculator(self.kv, LIMITS, max_drafts, lambda _, count: [token] * count)
        self.request = self.running(SamplingParams())
        for rows in (1, 2) * 5:
            self.speculator.note_step(StepSize(rows, 0), 1.0)

    def running(self, sampling: SamplingParams, max_total_tokens: int = 40) -> Request:
        request = Request(1, [5] * 6, sampling, 0, max_total_tokens, slot=0)
        assert self.kv.admit(request, [], 6, 0)
        self.kv.commit(request, 6)
        request.tokens.append(5)
        return request

    def num_drafts(self, request: Request | None = None, rows: int = 1, others: int = 0) -> int:
        """Of a step with so many rows that decode, all the request's, and tokens of other rows."""
        step = StepBuilder()
        for _ in range(rows):
            step.add_decode(self.request if request is None else request, [])
        step.num_tokens += others
        self.speculator.extend(step, 1)
        return step.num_rows - rows


def test_drafts_follow_how_the_last_ones_fared() -> None:
    drafting = Drafting()
    for rows in (1, 9) * 50:
        drafting.speculator.note_step(StepSize(rows, 0), 0.9 + 0.1 * rows)
    first = drafting.num_drafts()
    for _ in range(6):
        drafting.speculator.accepts(drafting.request, _row(drafting.request, right=True))
    assert drafting.num_drafts() > first > 0
    for _ in range(12):
        drafting.speculator.accepts(drafting.request, _row(drafting.request, right=False))
    assert drafting.num_drafts() == 0
    # Without any for a while, one is tried again.
    assert any(drafting.num_drafts() for _ in range(100))


def test_the_rows_part_of_a_step_is_learnt_and_forgotten() -> None:
    cost = RowCost()
    assert cost.share(1) == 0
    assert not cost.is_known
    for rows in (1, 3, 9, 1, 5):
        cost.note(rows, 0.8 + 0.2 * rows)
    assert cost.share(1) == pytest.approx(0.2, rel=0.05)
    assert cost.share(16) == pytest.approx(0.8, rel=0.05)
    cost.note(1, 1e9)
    assert cost.share(1) < 1, "a step that was held up"
    for _ in range(10):
        cost.note(1, 1.0)
    assert cost.is_known
    for _ in range(400):
        cost.note(1, 1.0)
    assert cost.share(1) < 0.01
    assert not cost.is_known


def test_until_it_is_known_what_a_row_costs_one_draft_in_every_other_step_finds_out() -> None:
    drafting = Drafting()
    drafting.speculator = Speculator(drafting.kv, LIMITS, 8, lambda _, count: [3] * count)
    found = []
    for _ in range(40):
        found.append(drafting.num_drafts(rows=3))
        drafting.speculator.note_step(StepSize(3 + found[-1], 0), 1.0)
    assert found[:6] == [1, 0] * 3
    assert found[-1] == 24


def test_drafts_are_for_few_rows_where_rows_cost_time() -> None:
    drafting = Drafting()
    for rows in (1, 2, 4, 8, 16) * 20:
        drafting.speculator.note_step(StepSize(rows, 0), 0.8 + 0.2 * rows)
    assert drafting.num_drafts(rows=1) > 0
    assert drafting.num_drafts(rows=16) == 0


@pytest.mark.parametrize(
    ("sampling", "max_total_tokens", "others", "expected"),
    [
        (SamplingParams(), 40, 0, 8),
        (SamplingParams(), 10, 0, 2),
        (SamplingParams(), 40, 61, 2),
        (SamplingParams(frequency_penalty=0.5), 40, 0, 0),
        (SamplingParams(grammar=Grammar("regex", "a+")), 40, 0, 0),
    ],
    ids=["all", "short of tokens", "a full step", "penalties", "grammar"],
)
def test_drafts_have_their_bounds(sampling: SamplingParams, max_total_tokens: int, others: int, expected: int) -> None:
    drafting = Drafting()
    assert drafting.num_drafts(drafting.running(sampling, max_total_tokens), others=others) == expected


def test_no_drafts_where_pages_are_short() -> None:
    assert Drafting(num_pages=4).num_drafts() == 0


def _row(request: Request, *, right: bool) -> Row:
    token = request.tokens[-1] if right else request.tokens[-1] + 1
    return Row(0, len(request.tokens) - 1, [token], [], True, is_draft=True)


PROMPTS = [[5 + (11 * index + start) % 200 for index in range(length)] for start, length in enumerate((1, 16, 33, 70))]
MIXED = [
    SamplingParams(max_tokens=40, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=40, temperature=0.3, seed=7, top_p=0.9, logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=31, temperature=0.2, seed=1, top_k=9, logit_bias={3: 2.0}, ignore_eos=True),
    SamplingParams(max_tokens=40, temperature=0.1, seed=3, frequency_penalty=0.5, min_tokens=5),
]


SPECULATIVE = {"enabled": True, "chunk_size": 5}


@pytest.fixture
def free_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine is busy with, drafts seem worth their time."""
    monkeypatch.setattr(RowCost, "share", lambda _self, _rows: 0.0)
    monkeypatch.setattr(RowCost, "is_known", True)


@pytest.mark.parametrize(
    "runtime",
    [{}, {"cuda_graphs": "off"}, {"paged_kv": {"device_pages": 64, "page_tokens": 4}}],
    ids=["recorded", "op by op", "short of pages"],
)
@pytest.mark.usefixtures("free_rows")
def test_answers_are_those_without_drafts(tiny_model: MakeModel, runtime: dict[str, object]) -> None:
    model = tiny_model("llama")
    plain = run_requests(start_engine(model.folder), PROMPTS, MIXED)
    engine = start_engine(model.folder, speculative_decoding=SPECULATIVE, **runtime)
    drafted = run_requests(engine, PROMPTS, MIXED)
    assert tokens_of(drafted) == tokens_of(plain)
    assert [[entry.token_id for entry in result.logprobs] for result in drafted] == [
        [entry.token_id for entry in result.logprobs] for result in plain
    ]
    assert engine.stats().draft_tokens > engine.stats().accepted_draft_tokens > 0


@pytest.mark.usefixtures("free_rows")
def test_an_answer_that_repeats_itself_takes_fewer_steps(tiny_model: MakeModel) -> None:
    params = SamplingParams(max_tokens=120, temperature=0, ignore_eos=True, logit_bias={10: 100, 11: 100})
    model = tiny_model("llama")
    engine = start_engine(model.folder, speculative_decoding=SPECULATIVE)
    assert run_requests(engine, PROMPTS[2:3], params) == run_requests(start_engine(model.folder), PROMPTS[2:3], params)
    stats = engine.stats()
    assert stats.steps == stats.generation_tokens - stats.accepted_draft_tokens < 60


@pytest.mark.usefixtures("free_rows")
@pytest.mark.parametrize("family", ["llama", "qwen2"], ids=["itself", "another"])
def test_answers_are_those_without_a_draft_model(tiny_model: MakeModel, family: str) -> None:
    """A model that drafts for itself is always right, also where tokens are drawn; another one hardly ever."""
    model, small = tiny_model("llama"), tiny_model(family)
    scheduler = {"chunked_prefill_tokens": 24, "max_batch_tokens": 64}
    plain = run_requests(start_engine(model.folder, scheduler=scheduler), PROMPTS, MIXED)
    drafts = {"enabled": True, "draft_model": str(small.folder), "chunk_size": 3}
    engine = start_engine(model.folder, scheduler=scheduler, speculative_decoding=drafts)
    for _ in range(2):  # the second time their prompts are cached
        assert tokens_of(run_requests(engine, PROMPTS, MIXED)) == [result.token_ids for result in plain]
    share = engine.stats().accepted_draft_tokens / engine.stats().draft_tokens
    assert share > 0.95 if family == "llama" else share < 0.1


@pytest.mark.usefixtures("free_rows")
@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE - 20, 3 * VOCAB_SIZE], ids=["fewer", "more"])
def test_a_draft_model_may_know_other_tokens(tiny_model: MakeModel, tmp_path: Path, vocab_size: int) -> None:
    """Models of one tokenizer are padded to different sizes. What only the small one has must not reach the large."""
    build_small = partial(build, name="small", architecture="LlamaForCausalLM", vocab_size=vocab_size)
    small, model = make_tiny_model(build_small, tmp_path), tiny_model("llama")
    plain = run_requests(start_engine(model.folder), PROMPTS, MIXED)
    engine = start_engine(
        model.folder, speculative_decoding={"enabled": True, "draft_model": str(small.folder), "chunk_size": 3}
    )
    assert tokens_of(run_requests(engine, PROMPTS, MIXED)) == [result.token_ids for result in plain]
    assert engine.stats().draft_tokens > 0


@pytest.mark.usefixtures("free_rows")
def test_a_draft_model_that_fails_to_compute_costs_its_drafts_only(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    plain = run_requests(start_engine(model.folder), PROMPTS, MIXED)
    engine = start_engine(
        model.folder, speculative_decoding={"enabled": True, "draft_model": str(model.folder), "chunk_size": 3}
    )
    draft = engine.executor._draft
    assert draft is not None
    decoder = draft._runner.decoder
    compute = decoder.hidden_states

    def fail_on_prompts(token_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(token_ids) > 16:
            raise RuntimeError("no memory")
        return compute(token_ids, *rest)

    monkeypatch.setattr(decoder, "hidden_states", fail_on_prompts)
    assert tokens_of(run_requests(engine, PROMPTS, MIXED)) == [result.token_ids for result in plain]
    assert engine.stats().draft_tokens > 0


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        ({"method": "draft_model"}, "draft_model: must be a model folder"),
        ({"draft_model": "stub"}, "another tokenizer"),
        ({"draft_model": "nowhere"}, "must be a model folder .got nowhere"),
    ],
)
def test_a_draft_model_that_does_not_fit_is_refused(
    tiny_model: MakeModel, runtime: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        start_engine(tiny_model("llama").folder, speculative_decoding={"enabled": True, **runtime})


def test_a_draft_model_goes_without_lower_tiers(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    drafts = {"enabled": True, "draft_model": str(model.folder)}
    with pytest.raises(ConfigError, match="lower KV tiers"):
        start_engine(model.folder, speculative_decoding=drafts, paged_kv={"cpu_pages": 4})
