"""The engine one step ahead of its results, with a real model: the same tokens, whatever else happens."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.engine.engine import Engine
from inferflux.engine.interface import Submit
from inferflux.engine.runner.outputs import NOT_FINITE
from inferflux.errors import RequestError
from inferflux.sampling_params import SamplingParams
from tests.support.engines import run_requests, tokens_of
from tests.support.models import TinyModel

MakeModel = Callable[[str], TinyModel]

PROMPTS = [[5 + (11 * index + start) % 200 for index in range(length)] for start, length in enumerate((1, 16, 33, 70))]
MIXED = [
    SamplingParams(max_tokens=24, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=24, temperature=1.0, seed=7, top_p=0.9, logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=17, temperature=0.8, seed=1, top_k=9, logit_bias={3: 2.0}, ignore_eos=True),
    SamplingParams(max_tokens=24, temperature=0.7, seed=3, frequency_penalty=0.5, min_tokens=5),
]
SEEDED = [msgspec.structs.replace(MIXED[1], seed=seed) for seed in range(4)]


def start(model: TinyModel, overlap: bool, **runtime: object) -> Engine:
    settings = msgspec.convert({"dtype": "float32", **runtime}, RuntimeConfig)
    return Engine(ModelConfig(id="model", path=str(model.folder)), settings, overlap=overlap)


@pytest.mark.parametrize("penalised", [False, True], ids=["by position alone", "one by value"])
def test_overlap_changes_no_token(tiny_model: MakeModel, penalised: bool) -> None:
    model = tiny_model("llama")
    params = MIXED if penalised else [*MIXED[:3], MIXED[0]]
    runtime = {"scheduler": {"chunked_prefill_tokens": 24, "max_batch_tokens": 64}}
    plain, ahead = (run_requests(start(model, overlap, **runtime), PROMPTS, params) for overlap in (False, True))
    assert tokens_of(ahead) == tokens_of(plain)
    assert [len(result.logprobs) for result in ahead] == [len(result.logprobs) for result in plain]


@pytest.mark.usefixtures("true_library")
@pytest.mark.parametrize("kind", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_seeded_answer_depends_on_nobody_else(tiny_model: MakeModel, dtype: str, kind: str) -> None:
    """Its log-probabilities do not either, to the bit, in whatever chunks its prompt is computed."""
    model = tiny_model("llama")
    runtime = {"dtype": dtype, "paged_kv": {"dtype": kind}, "prefix_cache": {"enabled": False}}
    engine = start(model, overlap=True, **runtime)
    alone = [run_requests(engine, [prompt], one)[0] for prompt, one in zip(PROMPTS, SEEDED, strict=True)]
    assert run_requests(engine, PROMPTS, SEEDED) == alone
    for chunk in (24, 32):
        chunks = {"chunked_prefill_tokens": chunk, "max_batch_tokens": 64}
        assert run_requests(start(model, overlap=True, scheduler=chunks, **runtime), PROMPTS, SEEDED) == alone


@pytest.mark.usefixtures("true_library")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cached_prompt_changes_no_bit(tiny_model: MakeModel, dtype: str) -> None:
    """Its log-probabilities are those of the first time, whether whole pages and one token, or two, are left of it."""
    engine = start(tiny_model("llama"), overlap=True, dtype=dtype)
    for length in (33, 34, 48, 65):
        prompt = [3 + (7 * index) % 190 for index in range(length)]
        first, second = (run_requests(engine, [prompt], SEEDED[2])[0] for _ in range(2))
        assert second.num_cached_tokens > 0
        assert (second.token_ids, second.logprobs) == (first.token_ids, first.logprobs)


def test_greedy_answers_are_the_oracles(tiny_model: MakeModel) -> None:
    model = tiny_model("qwen2")
    prompt, expected = model.clear_case(33, 40)
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    engine = start(model, overlap=True)
    assert tokens_of(run_requests(engine, [prompt, prompt], params)) == [expected] * 2


def test_pages_yielded_and_found_again(tiny_model: MakeModel) -> None:
    """A pool too small for all four: steps are planned ahead while it lasts, then requests are preempted and resume."""
    model = tiny_model("llama")
    params = [msgspec.structs.replace(MIXED[0], max_tokens=60)] * 4
    pages = {"device_pages": 60, "page_tokens": 4}
    small = start(model, overlap=True, paged_kv=pages, scheduler={"max_batch_tokens": 32})
    expected = run_requests(start(model, overlap=False), PROMPTS, params)
    assert tokens_of(run_requests(small, PROMPTS, params)) == [result.token_ids for result in expected]
    assert small.stats().preemptions > 0


@pytest.mark.parametrize("overlap", [False, True], ids=["in turns", "ahead"])
def test_a_kernel_that_raises_for_one_request_ends_that_one(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    """In the second step of its prompt, while the others generate."""
    engine = start(tiny_model("llama"), overlap, scheduler={"chunked_prefill_tokens": 24})
    expected = run_requests(engine, PROMPTS, [MIXED[0]] * 4)
    compute, bad = engine.executor.decoder.hidden_states, PROMPTS[3][40:44]

    def hidden_states(token_ids: torch.Tensor, *rest: object) -> torch.Tensor:
        tokens = token_ids.tolist()
        if any(tokens[place : place + 4] == bad for place in range(len(tokens))):
            raise RuntimeError("a kernel failed")
        result: torch.Tensor = compute(token_ids, *rest)
        return result

    engine.drop_cache()
    monkeypatch.setattr(engine.executor.decoder, "hidden_states", hidden_states)
    found = run_requests(engine, PROMPTS, [MIXED[0]] * 4)
    assert tokens_of(found) == [*tokens_of(expected[:3]), []]


@pytest.mark.parametrize("overlap", [False, True], ids=["in turns", "ahead"])
def test_no_other_request_finds_pages_of_what_is_no_number(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    """One token's embedding overflows, in the second of a prompt's chunks. What stands before it in that chunk may be
    spoiled with it, and what comes after is."""
    engine = start(tiny_model("llama"), overlap, scheduler={"chunked_prefill_tokens": 16}, paged_kv={"page_tokens": 4})
    decoder, prefix, bad = engine.executor.decoder, PROMPTS[3][:30], 250
    plain = [[*prefix, 3], [*prefix, 4, 4]]
    expected = [run_requests(engine, [prompt], MIXED[0])[0].token_ids for prompt in plain]
    engine.drop_cache()
    embed = decoder.embed

    def overflowing(token_ids: torch.Tensor, positions: torch.Tensor) -> object:
        hidden, angles = embed(token_ids, positions)
        hidden[token_ids == bad] = torch.inf
        return hidden, angles

    monkeypatch.setattr(decoder, "embed", overflowing)
    (failed,) = run_requests(engine, [[*prefix, bad, *PROMPTS[3]]], MIXED[0])
    assert (failed.finish_reason, failed.error, failed.token_ids) == ("error", NOT_FINITE, [])
    found = [run_requests(engine, [prompt], MIXED[0])[0] for prompt in plain]
    assert tokens_of(found) == expected
    assert [result.num_cached_tokens for result in found] == [16, 28]


def test_an_abort_with_a_step_in_flight_leaves_nothing_behind(tiny_model: MakeModel) -> None:
    engine = start(tiny_model("llama"), overlap=True)
    for index, prompt in enumerate(PROMPTS):
        engine.submit(Submit(index, prompt, MIXED[0]))
    assert engine.step() == []
    engine.abort([0, 1, 2, 3])
    assert engine.has_work, "the step in flight is still to be taken in"
    assert engine.step() == []
    assert not engine.has_work
    engine.check_integrity()
    assert engine.stats().device_pages_in_use == 0


def test_an_engine_that_waits_for_its_file_rests(tiny_model: MakeModel, tmp_path: Path) -> None:
    """Also one that plans ahead, and had a step in flight when the last request ended."""
    file = {"path": str(tmp_path / "no folder" / "kv"), "max_gb": 0.01}
    (tmp_path / "no folder").touch()
    engine = start(tiny_model("llama"), overlap=True, nvme_offload=file)
    engine.submit(Submit(0, PROMPTS[1], MIXED[0]))
    for _ in range(40):
        if engine.has_work or engine.has_background_work:
            engine.step()
    assert engine.has_background_work
    assert not engine.has_work
    engine.close()


def test_a_stop_token_ends_the_output_where_it_stands(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    tokens = run_requests(start(model, overlap=False), PROMPTS, [MIXED[0]] * 4)[3].token_ids
    stop = tokens[6]
    params = msgspec.structs.replace(MIXED[0], stop_token_ids=(stop,))
    stopped = run_requests(start(model, overlap=True), PROMPTS, [params] * 4)[3].token_ids
    assert stopped == tokens[: tokens.index(stop) + 1]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_prompt_that_nothing_follows_may_fill_the_window(tiny_model: MakeModel, overlap: bool) -> None:
    """Also where the pool holds no more than the window; one that is to be answered needs a place for the answer."""
    engine = start(tiny_model("llama"), overlap, paged_kv={"device_pages": 4, "page_tokens": 8})
    prompt = list(range(5, 5 + engine.info.max_model_len))
    (result,) = run_requests(engine, [prompt], SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert (result.error, result.token_ids, result.finish_reason) == (None, [], "length")
    for params in (SamplingParams(max_tokens=1), SamplingParams(max_tokens=None)):
        with pytest.raises(RequestError, match="leaves no room for an answer"):
            engine.submit(Submit(0, prompt, params))
    with pytest.raises(RequestError, match="33 tokens, which is more than"):
        engine.submit(Submit(0, [*prompt, 5], SamplingParams(max_tokens=0)))
