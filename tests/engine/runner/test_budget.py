"""A model that cannot fit is refused before its weights are read, in words that say how much is missing."""

from pathlib import Path

import pytest

from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.engine.demo import demo_model_path
from inferflux.engine.engine import Engine
from inferflux.engine.models.spec import read_spec
from inferflux.engine.runner.budget import check_fits, pool_memory, weight_bytes
from inferflux.engine.runner.memory import FreeMemory, plan_pool
from inferflux.errors import ModelLoadError

GB = 10**9


def test_the_weights_of_a_real_file_are_counted_right():
    """The demo model's file is 16 bits a weight and little else."""
    folder = demo_model_path()
    counted = weight_bytes(read_spec(folder).num_parameters, 2, None)
    size = (Path(folder) / "model.safetensors").stat().st_size
    assert counted <= size < 1.05 * counted


def test_quantised_weights_are_counted_by_their_bits():
    assert [weight_bytes(1000, 4, scheme) for scheme in (None, "int8", "fp8", "int4")] == [4000, 1000, 1000, 500]


def test_what_is_missing_is_said():
    model = ModelConfig(id="big", memory_gb=3)
    check_fits(model, 3 * GB, FreeMemory("cpu", 4 * GB))
    with pytest.raises(ModelLoadError, match=r"^big: its weights take 5 GB, 1 GB more than the 4 GB that are free$"):
        check_fits(model, 5 * GB, FreeMemory("cpu", 4 * GB))
    with pytest.raises(ModelLoadError, match=r"3\.5 GB, 0\.5 GB more than the 3 GB of models\[\]\.memory_gb"):
        check_fits(model, 7 * GB // 2, FreeMemory("cpu", 4 * GB))


def test_the_pool_takes_what_the_budget_leaves():
    free = pool_memory(ModelConfig(id="m", memory_gb=1), GB - 1000, FreeMemory("cpu", 100 * GB))
    plan = plan_pool(ModelConfig(id="m"), RuntimeConfig(), 100_000, 1, free)
    assert plan.num_pages == 1000
    with pytest.raises(ModelLoadError, match=r"or models\[\]\.memory_gb"):
        plan_pool(ModelConfig(id="m"), RuntimeConfig(), 100_000, 100, free)
    assert pool_memory(ModelConfig(id="m"), GB, FreeMemory("cpu", GB)) == FreeMemory("cpu", GB)


def test_an_engine_refuses_what_its_budget_cannot_hold():
    with pytest.raises(ModelLoadError, match=r"models\[\]\.memory_gb"):
        Engine(ModelConfig(id="m", path="stub", memory_gb=0.001), RuntimeConfig())
