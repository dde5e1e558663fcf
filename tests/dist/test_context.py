"""One process needs no collectives; several share dimensions evenly or say which equation failed."""

import pytest
import torch

from inferflux.config.tree import DistributedConfig
from inferflux.dist import shares
from inferflux.dist.context import ParallelContext
from inferflux.dist.launch import launch
from inferflux.errors import ConfigError, EngineDeadError
from benchmarks.ports import free_port

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


def test_key_value_heads_are_repeated_where_ranks_outnumber_them():
    assert [shares.repeated(2, rank, 4, "num_kv_heads") for rank in range(4)] == [slice(0, 1)] * 2 + [slice(1, 2)] * 2
    assert shares.repeated(4, 1, 2, "num_kv_heads") == slice(2, 4)
    with pytest.raises(ConfigError, match=r"distributed.world_size % num_kv_heads == 0 failed: 4 % 3 = 1"):
        shares.repeated(3, 0, 4, "num_kv_heads")
    with pytest.raises(ConfigError, match=r"num_kv_heads % distributed.world_size == 0 failed: 3 % 2 = 1"):
        shares.repeated(3, 0, 2, "num_kv_heads")


def test_a_vocabulary_need_not_come_out_even():
    assert [shares.padded(10, rank, 4) for rank in range(4)] == [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 10)]
    assert shares.padded(2, 3, 4) == slice(2, 2)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (DistributedConfig(backend="stub", world_size=2), "distributed.world_size"),
        (DistributedConfig(backend="nccl"), "distributed.backend: nccl needs a model on CUDA devices"),
        (DistributedConfig(rank=1), "rank"),
    ],
)
def test_what_cannot_be_launched_is_refused(config, words):
    with pytest.raises(ConfigError, match=words):
        launch(config, CPU)


def test_a_group_nobody_opens_is_an_error_in_words(caplog: pytest.LogCaptureFixture):
    """And until then a rank says where it waits."""
    config = DistributedConfig(rank=1, world_size=2, master_port=free_port())
    with (
        caplog.at_level("INFO"),
        pytest.raises(EngineDeadError, match=r"rank 1 of 2 found no group at 127.0.0.1:\d+"),
    ):
        launch(config, CPU, start_timeout_s=0.2)
    assert f"rank 1 of 2 connects to the others at 127.0.0.1:{config.master_port}" in caplog.text
