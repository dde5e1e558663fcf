"""One process needs no collectives; several share dimensions evenly or say which equation failed."""

import pytest
import torch

from inferflux.config.tree import DistributedConfig
from inferflux.dist.context import ParallelContext
from inferflux.dist.launch import launch
from inferflux.errors import ConfigError

CPU = torch.device("cpu")


def test_collectives_of_one_rank_hand_the_tensor_back():
    context = launch(DistributedConfig(), CPU)
    tensor = torch.ones(3)
    for result in (context.all_reduce(tensor), context.all_gather(tensor), context.broadcast(tensor)):
        assert result is tensor
    assert context.split(7, "num_heads") == slice(0, 7)


def test_ranks_split_a_dimension_into_even_parts():
    parts = [ParallelContext(rank, 4, CPU).split(8, "num_heads") for rank in range(4)]
    assert [index for part in parts for index in range(8)[part]] == list(range(8))
    with pytest.raises(ConfigError, match=r"num_heads % distributed.world_size == 0 failed: 6 % 4 = 2"):
        ParallelContext(0, 4, CPU).split(6, "num_heads")


@pytest.mark.parametrize(("rank", "size"), [(1, 1), (-1, 2), (0, 0)])
def test_rank_must_be_one_of_the_ranks(rank, size):
    with pytest.raises(ConfigError, match="0 <= rank < world_size failed"):
        ParallelContext(rank, size, CPU)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (DistributedConfig(backend="gloo", world_size=2), "distributed.backend"),
        (DistributedConfig(backend="nccl"), "distributed.backend"),
        (DistributedConfig(world_size=2), "distributed.world_size"),
        (DistributedConfig(rank=1), "rank"),
    ],
)
def test_what_cannot_be_launched_is_refused(config, words):
    with pytest.raises(ConfigError, match=words):
        launch(config, CPU)
