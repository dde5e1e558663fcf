"""Ranks that plan a step ahead of its results, and that replay recorded steps, say what one process says."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.config.tree import DistributedConfig
from inferflux.engine.engine import Engine
from inferflux.engine.executor import Executor
from inferflux.errors import EngineDeadError
from inferflux.sampling_params import SamplingParams
from tests.dist.test_parallel import RUNTIME, assert_same, clear_answers
from tests.support.engines import run_requests, start_engine
from tests.support.models import TinyModel
from tests.support.recorded import answer_recorded
from tests.support.world import World, answer

PARAMS = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, logprobs=2)
# Room for all, so that steps may be planned ahead; one size more of recordings than rows need.
ROOMY = {**RUNTIME, "paged_kv": {"page_tokens": 4, "device_pages": 60}}
NUM_RECORDINGS = 3


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(2) as world:
        yield world


@pytest.mark.parametrize(("family", "runtime"), [("llama", RUNTIME), ("mixtral", ROOMY)], ids=["preempted", "roomy"])
def test_ranks_plan_ahead(
    world: World, tiny_model: Callable[[str], TinyModel], family: str, runtime: dict[str, object]
) -> None:
    folder = tiny_model(family).folder
    prompts, expected = clear_answers(folder)
    results, num_preemptions = world.run(answer, folder, runtime, prompts, PARAMS, True)
    assert_same(results, expected)
    assert (num_preemptions > 0) == (runtime is RUNTIME)


def test_drawn_tokens_reach_every_rank(world: World, tiny_model: Callable[[str], TinyModel]) -> None:
    """Drawn at a temperature high enough that a rank with another token would soon compute something else."""
    folder = tiny_model("llama").folder
    prompts, _ = clear_answers(folder)
    params = SamplingParams(max_tokens=16, temperature=1.5, seed=7, ignore_eos=True)
    expected = run_requests(start_engine(folder), prompts, params)
    results, _ = world.run(answer, folder, ROOMY, prompts, params, True)
    assert [result.token_ids for result in results] == [single.token_ids for single in expected]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_replay_the_same_recordings(tiny_model: Callable[[str], TinyModel], size: int) -> None:
    folder = tiny_model("mixtral").folder
    prompts, expected = clear_answers(folder)
    with World(size) as ranks_of_size:
        ranks = ranks_of_size.run_all(answer_recorded, folder, ROOMY, prompts, PARAMS)
    assert_same(ranks[0].results, expected)
    assert {rank.num_captures for rank in ranks} == {NUM_RECORDINGS}
    assert len(ranks[0].replays) > 10
    assert all(rank.replays == ranks[0].replays for rank in ranks)


@pytest.mark.parametrize("failing", [(0, 1), (1, 0)])
def test_where_a_rank_cannot_record_none_replays(
    world: World, tiny_model: Callable[[str], TinyModel], failing: tuple[int, int]
) -> None:
    folder = tiny_model("llama").folder
    prompts, expected = clear_answers(folder)
    ranks = world.run_all(answer_recorded, folder, ROOMY, prompts, PARAMS, failing)
    assert_same(ranks[0].results, expected)
    assert all(rank.replays == [] for rank in ranks)
    assert max(rank.num_captures for rank in ranks) == failing[1] + 1, "nobody goes on recording alone"


def leave_with_a_plan(distributed: DistributedConfig, folder: Path) -> str | None:
    """A job: rank 1 is gone once it has heard the third plan, whose collectives it never enters."""
    model, runtime = ModelConfig(id="model", path=str(folder)), RuntimeConfig(dtype="float32")
    if distributed.rank > 0:
        executor = Executor(model, runtime, distributed)
        steps = executor.follow()
        next(steps)
        next(steps)
        executor._channel.receive()
        torch.distributed.destroy_process_group()
        return None
    engine = Engine(model, runtime, distributed, overlap=True)
    with pytest.raises(EngineDeadError) as caught:
        run_requests(engine, [[5, 6, 7]], PARAMS)
    torch.distributed.destroy_process_group()
    return str(caught.value)


def test_a_rank_that_goes_with_a_plan_in_hand_is_missed(tiny_model: Callable[[str], TinyModel]) -> None:
    with World(2) as world:
        message = world.run(leave_with_a_plan, tiny_model("llama").folder)
    assert message.startswith("a rank is gone or silent: ")
