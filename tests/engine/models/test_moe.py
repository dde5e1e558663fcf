"""Mixtures of experts: who got how much, and configs that cannot be served. What they compute is the golden test's."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from inferflux.engine.models.partition import check_partition
from inferflux.engine.models.spec import read_spec
from inferflux.errors import ConfigError, ModelLoadError
from inferflux.sampling_params import SamplingParams
from tests.support.engines import run_requests, start_engine
from tests.support.models import TinyModel

MakeModel = Callable[[str], TinyModel]


def test_every_token_is_counted_once_per_expert_and_sparse_layer(tiny_model: MakeModel) -> None:
    engine = start_engine(tiny_model("qwen3_moe").folder)
    assert engine.executor.expert_tokens() == [0] * 8, "what a start computes is nobody's token"
    run_requests(engine, [list(range(10, 20))], SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
    counts = engine.executor.expert_tokens()
    # Ten tokens of prompt and four of the five generated are computed, by three of the four layers, three experts each.
    assert sum(counts) == (10 + 4) * 3 * 3
    assert len(counts) == 8
    assert max(counts) > 0


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_the_spec_counts_every_parameter(tiny_model: MakeModel, family: str) -> None:
    model = tiny_model(family)
    assert read_spec(model.folder).num_parameters == model.reference.num_parameters()


def edited(model: TinyModel, folder: Path, **changes: object) -> Path:
    config = json.loads((model.folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_what_is_not_supported_is_refused(tiny_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"clip_qkv: must be a number >= 0\.001"):
        read_spec(edited(tiny_model("olmoe"), tmp_path, clip_qkv=0))
    with pytest.raises(ModelLoadError, match="num_experts_per_tok: must be an integer >= 1 and <= 8"):
        read_spec(edited(tiny_model("olmoe"), tmp_path, num_experts_per_tok=9))


def test_ranks_that_cannot_share_experts_print_the_equation(tiny_model: MakeModel, tmp_path: Path) -> None:
    spec = read_spec(edited(tiny_model("olmoe"), tmp_path, num_experts=7))
    with pytest.raises(ConfigError, match=r"num_experts % distributed.world_size == 0 failed: 7 % 2 = 1"):
        check_partition(spec, 2)
