"""The golden test: every family, in every way a request can be run, says what transformers says.

Each prompt's greedy continuation by transformers, with its log-probabilities, is computed once per family; then our
engine answers the same prompts in each of WAYS.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from inferflux.engine.engine import Engine
from inferflux.sampling_params import SamplingParams
from tests.support.engines import Result, run_requests, start_engine
from tests.support.models import FAMILIES, TinyModel

PROMPT_LENGTHS = (1, 15, 16, 17, 33, 300)
NUM_OUTPUT = 64
TOLERANCE = 1e-4
PARAMS = SamplingParams(max_tokens=NUM_OUTPUT, temperature=0, ignore_eos=True, logprobs=0)
PAGES_OF_LONGEST = -(-(max(PROMPT_LENGTHS) + NUM_OUTPUT - 1) // 16)

Prompts = list[list[int]]


@dataclass(frozen=True)
class Case:
    """A prompt with transformers' greedy answer and that answer's log-probabilities [NUM_OUTPUT]."""

    prompt: list[int]
    expected: list[int]
    logprobs: torch.Tensor


@dataclass(frozen=True)
class Family:
    folder: Path
    cases: list[Case]

    @property
    def prompts(self) -> Prompts:
        return [case.prompt for case in self.cases]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tiny_model: Callable[[str], TinyModel]) -> Family:
    model = tiny_model(request.param)
    cases = model.clear_cases(PROMPT_LENGTHS, NUM_OUTPUT)
    return Family(model.folder, [make_case(model, prompt, expected) for prompt, expected in cases])


def make_case(model: TinyModel, prompt: list[int], expected: list[int]) -> Case:
    logits = model.logits(prompt + expected)[len(prompt) - 1 : -1]
    return Case(prompt, expected, torch.log_softmax(logits, dim=1).amax(dim=1))


def alone(folder: Path, prompts: Prompts) -> list[Result]:
    engine = start_engine(folder, prefix_cache={"enabled": False})
    return [run_requests(engine, [prompt], PARAMS)[0] for prompt in prompts]


def mixed_batch(folder: Path, prompts: Prompts) -> list[Result]:
    return run_requests(start_engine(folder), prompts, PARAMS)


def chunks_of_7(folder: Path, prompts: Prompts) -> list[Result]:
    engine = start_engine(folder, scheduler={"chunked_prefill_tokens": 7, "max_batch_tokens": 16, "max_batch_size": 6})
    return run_requests(engine, prompts, PARAMS)


def prefix_hit(folder: Path, prompts: Prompts) -> list[Result]:
    engine = start_engine(folder)
    run_requests(engine, prompts, PARAMS)
    results = run_requests(engine, prompts, PARAMS, first_id=100)
    cached = [result.num_cached_tokens for result in results]
    assert cached == [max(0, length - 2) // 16 * 16 for length in PROMPT_LENGTHS]
    return results


def preemption(folder: Path, prompts: Prompts) -> list[Result]:
    engine = start_engine(folder, paged_kv={"device_pages": PAGES_OF_LONGEST + 12})
    results = run_requests(engine, prompts, PARAMS)
    assert engine.stats().preemptions > 0, "the pool was meant to be too small for all"
    return results


def pool_that_just_fits(folder: Path, prompts: Prompts) -> list[Result]:
    return run_requests(start_engine(folder, paged_kv={"device_pages": PAGES_OF_LONGEST}), prompts, PARAMS)


WAYS: Mapping[str, Callable[[Path, Prompts], list[Result]]] = {
    way.__name__: way for way in (alone, mixed_batch, chunks_of_7, prefix_hit, preemption, pool_that_just_fits)
}


@pytest.mark.parametrize("way", list(WAYS))
def test_equals_transformers(family: Family, way: str) -> None:
    for case, result in zip(family.cases, WAYS[way](family.folder, family.prompts), strict=True):
        assert result.error is None
        assert result.finish_reason == "length"
        assert result.token_ids == case.expected, f"prompt of {len(case.prompt)} tokens"
        logprobs = torch.tensor([entry.logprob for entry in result.logprobs])
        torch.testing.assert_close(logprobs, case.logprobs, rtol=0, atol=TOLERANCE)


def test_pages_come_back(family: Family) -> None:
    """After everything has run, no page is held: what is not free is cached."""
    engine: Engine = start_engine(family.folder)
    run_requests(engine, family.prompts[:3], PARAMS)
    assert engine.stats().device_pages_in_use == 0
