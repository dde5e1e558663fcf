"""The golden test: every family, in every way a request can be run, says what transformers says.

Greedy decoding by transformers of the same prompt gives the same tokens exactly if each token is the argmax of its
forward over all that came before; so one forward over prompt and answer checks all 64 tokens, and their
log-probabilities besides.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import PreTrainedModel

from inferflux.engine.engine import Engine
from inferflux.sampling_params import SamplingParams
from tests.support.engines import Result, run_requests, start_engine
from tests.support.models import FAMILIES, SPECIAL_TOKENS, VOCAB_SIZE

PROMPT_LENGTHS = (1, 15, 16, 17, 33, 300)
NUM_OUTPUT = 64
TOLERANCE = 1e-4
PARAMS = SamplingParams(max_tokens=NUM_OUTPUT, temperature=0, ignore_eos=True, logprobs=0)
PAGES_OF_LONGEST = -(-(max(PROMPT_LENGTHS) + NUM_OUTPUT - 1) // 16)


@dataclass(frozen=True)
class Family:
    folder: Path
    oracle: PreTrainedModel


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    return Family(folder, FAMILIES[request.param](folder))


def prompts() -> list[list[int]]:
    rng = Random(0)
    return [[rng.randrange(len(SPECIAL_TOKENS), VOCAB_SIZE) for _ in range(length)] for length in PROMPT_LENGTHS]


def alone(folder: Path) -> list[Result]:
    engine = start_engine(folder, prefix_cache={"enabled": False})
    return [run_requests(engine, [prompt], PARAMS)[0] for prompt in prompts()]


def mixed_batch(folder: Path) -> list[Result]:
    return run_requests(start_engine(folder), prompts(), PARAMS)


def chunks_of_7(folder: Path) -> list[Result]:
    engine = start_engine(folder, scheduler={"chunked_prefill_tokens": 7, "max_batch_tokens": 16, "max_batch_size": 6})
    return run_requests(engine, prompts(), PARAMS)


def prefix_hit(folder: Path) -> list[Result]:
    engine = start_engine(folder)
    run_requests(engine, prompts(), PARAMS)
    results = run_requests(engine, prompts(), PARAMS, first_id=100)
    cached = [result.num_cached_tokens for result in results]
    assert cached == [(length - 1) // 16 * 16 for length in PROMPT_LENGTHS]
    return results


def preemption(folder: Path) -> list[Result]:
    engine = start_engine(folder, paged_kv={"device_pages": PAGES_OF_LONGEST + 12})
    results = run_requests(engine, prompts(), PARAMS)
    assert engine.stats().preemptions > 0, "the pool was meant to be too small for all"
    return results


def pool_that_just_fits(folder: Path) -> list[Result]:
    return run_requests(start_engine(folder, paged_kv={"device_pages": PAGES_OF_LONGEST}), prompts(), PARAMS)


WAYS: Mapping[str, Callable[[Path], list[Result]]] = {
    way.__name__: way for way in (alone, mixed_batch, chunks_of_7, prefix_hit, preemption, pool_that_just_fits)
}


@pytest.mark.parametrize("way", list(WAYS))
def test_equals_transformers(family: Family, way: str) -> None:
    for prompt, result in zip(prompts(), WAYS[way](family.folder), strict=True):
        assert result.error is None
        assert result.finish_reason == "length"
        assert len(result.token_ids) == NUM_OUTPUT
        assert_greedy(family.oracle, prompt, result)


def assert_greedy(oracle: PreTrainedModel, prompt: list[int], result: Result) -> None:
    """Asserts that `result` is the oracle's own greedy answer, with its log-probabilities."""
    with torch.inference_mode():
        logits = oracle(torch.tensor([prompt + result.token_ids[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
    assert result.token_ids == logits.argmax(dim=1).tolist(), f"prompt of {len(prompt)} tokens"
    expected = torch.log_softmax(logits.float(), dim=1).amax(dim=1)
    actual = torch.tensor([entry.logprob for entry in result.logprobs])
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def test_pages_come_back(family: Family) -> None:
    """After everything has run, no page is held: what is not free is cached."""
    engine: Engine = start_engine(family.folder)
    run_requests(engine, prompts()[:3], PARAMS)
    assert engine.stats().device_pages_in_use == 0
