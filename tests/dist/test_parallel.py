"""Two and four ranks say what one process says, in float32, for every family, while requests are chunked and preempted."""

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.config.tree import DistributedConfig, KernelsConfig
from inferflux.dist.check import problems
from inferflux.dist.launch import launch, leave
from inferflux.engine.executor import Executor
from inferflux.errors import ConfigError
from inferflux.sampling_params import Grammar, Pooling, SamplingParams
from tests.support.adapters import ATTENTION, EVERYTHING, FUSED, write_adapter
from tests.support.engines import Result, run_requests, start_engine
from tests.support.models import CLEAR_GAP, FAMILIES, VOCAB_SIZE, TinyModel
from tests.support.world import World, answer, answer_all_to_all

PROMPT_LENGTHS = (1, 5, 9, 13)
PARAMS = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, logprobs=2)
# All four start, and then find that they cannot all grow.
RUNTIME = {
    "scheduler": {"chunked_prefill_tokens": 7, "max_batch_tokens": 16, "max_batch_size": 4},
    "paged_kv": {"page_tokens": 4, "device_pages": 15},
}

Answers = Callable[[str], tuple[Path, list[list[int]], list[Result]]]


@pytest.fixture(scope="module", params=[2, 4])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with World(request.param) as world:
        yield world


@pytest.fixture(scope="module")
def one_process(tiny_model: Callable[[str], TinyModel]) -> Answers:
    """Returns a family's folder, prompts and what one process says to them; computed once for all worlds."""

    @functools.cache
    def answers(family: str) -> tuple[Path, list[list[int]], list[Result]]:
        folder = tiny_model(family).folder
        return folder, *clear_answers(folder)

    return answers


def clear_answers(folder: Path) -> tuple[list[list[int]], list[Result]]:
    """Returns prompts and answers in which no choice is so close that rounding could decide it."""
    engine = start_engine(folder)
    generator = torch.Generator().manual_seed(0)
    prompts, results = [], []
    for length in PROMPT_LENGTHS:
        while True:
            prompt = torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
            (result,) = run_requests(engine, [prompt], PARAMS)
            if min(entry.top[0][1] - entry.top[1][1] for entry in result.logprobs) > CLEAR_GAP:
                break
        prompts.append(prompt)
        results.append(result)
    return prompts, results


@pytest.mark.parametrize("family", list(FAMILIES))
def test_ranks_say_what_one_process_says(world: World, family: str, one_process: Answers) -> None:
    folder, prompts, expected = one_process(family)
    results, num_preemptions = world.run(answer, folder, RUNTIME, prompts, PARAMS)
    assert_same(results, expected)
    assert num_preemptions > 0, "the pool was meant to be too small for all"


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_experts_rows_may_go_all_to_all(world: World, family: str, one_process: Answers) -> None:
    """Two experts per token and four ranks: the rows of two ranks are not sent at all."""
    if world.size < 4:
        pytest.skip("with two ranks an all-reduce moves no more")
    folder, prompts, expected = one_process(family)
    assert_same(world.run(answer_all_to_all, folder, RUNTIME, prompts, PARAMS)[0], expected)


@pytest.mark.parametrize("family", ["llama_biased", "phi3", "mixtral"])
def test_ranks_share_adapters(
    world: World, family: str, tiny_model: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    """Fused matrices too, and heads that two of four ranks have copies of."""
    model = tiny_model(family)
    targets = {"phi3": FUSED, "mixtral": ATTENTION}.get(family, EVERYTHING)
    merged = TinyModel(model.folder, write_adapter(tmp_path / "a", model.reference, targets))
    cases = [one.clear_case(length, 16) for length, one in zip(PROMPT_LENGTHS, (merged, model, merged, model), strict=True)]
    prompts, chosen = [prompt for prompt, _ in cases], ["a", None, "a", None]
    results, _ = world.run(answer, model.folder, RUNTIME, prompts, PARAMS, None, {"a": tmp_path / "a"}, chosen)
    assert [result.token_ids for result in results] == [expected for _, expected in cases]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_ranks_make_the_same_vectors(world: World, one_process: Answers, pooling: Pooling) -> None:
    folder, prompts, _ = one_process("llama")
    params = SamplingParams(max_tokens=1, pooling=pooling)
    expected = run_requests(start_engine(folder), prompts, params)
    results, _ = world.run(answer, folder, RUNTIME, prompts, params)
    for result, single in zip(results, expected, strict=True):
        vectors = [torch.frombuffer(bytearray(one.vector), dtype=torch.float32) for one in (result, single)]
        torch.testing.assert_close(*vectors, rtol=0, atol=1e-4)


def test_ranks_follow_a_grammar(world: World, one_process: Answers) -> None:
    folder, prompts, _ = one_process("llama")
    params = SamplingParams(max_tokens=16, temperature=0, grammar=Grammar("regex", "[0-9]{3}"))
    expected = run_requests(start_engine(folder), prompts, params)
    results, _ = world.run(answer, folder, RUNTIME, prompts, params)
    assert [result.finish_reason for result in results] == ["stop"] * len(prompts)
    assert [result.token_ids for result in results] == [single.token_ids for single in expected]


def test_ranks_verify_what_one_of_them_drafts(world: World, one_process: Answers) -> None:
    folder, prompts, expected = one_process("llama")
    drafts = {"enabled": True, "draft_model": str(folder), "chunk_size": 2}
    runtime = {**RUNTIME, "paged_kv": {"page_tokens": 4, "device_pages": 60}, "speculative_decoding": drafts}
    results, _ = world.run(answer, folder, runtime, prompts, PARAMS)
    assert_same(results, expected)


def assert_same(results: list[Result], expected: list[Result]) -> None:
    for result, single in zip(results, expected, strict=True):
        assert result.error is None
        assert result.token_ids == single.token_ids
        logprobs = [torch.tensor([entry.logprob for entry in one.logprobs]) for one in (result, single)]
        torch.testing.assert_close(*logprobs, rtol=0, atol=1e-4)


def check_collectives(distributed: DistributedConfig) -> list[str]:
    context = launch(distributed, torch.device("cpu"))
    found = list(problems(context))
    leave(context)
    return found


def test_every_collective_gives_what_it_should(world: World) -> None:
    assert world.run(check_collectives) == []


def refusal(distributed: DistributedConfig, model: ModelConfig, runtime: RuntimeConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        Executor(model, runtime, distributed)
    torch.distributed.destroy_process_group()
    return str(caught.value)


def window_differs(distributed: DistributedConfig, folder: Path) -> str:
    model = ModelConfig(id="model", path=str(folder), max_model_len=64 + distributed.rank)
    return refusal(distributed, model, RuntimeConfig(dtype="float32"))


def kernels_differ(distributed: DistributedConfig, folder: Path) -> str:
    kernels = KernelsConfig(norm="reference" if distributed.rank else "torch")
    return refusal(
        distributed, ModelConfig(id="model", path=str(folder)), RuntimeConfig(dtype="float32", kernels=kernels)
    )


def weights_differ(distributed: DistributedConfig, folder: Path) -> str:
    """The last rank's are from another training run: of the same names, shapes and sizes."""
    if distributed.rank == distributed.world_size - 1:
        folder = Path(shutil.copytree(folder, folder.parent / f"other {distributed.world_size}"))
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-64, os.SEEK_END)
            file.write(bytes(64))
    return refusal(distributed, ModelConfig(id="model", path=str(folder)), RuntimeConfig(dtype="float32"))


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (window_differs, "models[].max_model_len: must be the same on every rank (this one has 64)"),
        (kernels_differ, 'runtime.kernels: must be the same on every rank (this one has {"attention":"auto"'),
        (weights_differ, "models[].path: must be the same on every rank (this one has"),
    ],
)
def test_ranks_of_different_settings_do_not_start(
    world: World, one_process: Answers, job: Callable[..., str], message: str
) -> None:
    assert world.run(job, one_process("llama")[0]).startswith(message)
