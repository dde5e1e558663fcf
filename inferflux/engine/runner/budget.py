"""Whether a model fits, judged before its weights are read, and what its budget leaves for the KV pool.

Decides from plain numbers; loads nothing. `models[].memory_gb` is the budget, of weights and pool together.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from inferflux.config import ModelConfig
from inferflux.engine.runner.memory import FreeMemory
from inferflux.errors import ModelLoadError

GIGABYTE: Final = 10**9
_BITS: Final[Mapping[str, int]] = MappingProxyType({"int8": 8, "fp8": 8, "int4": 4})


def weight_bytes(num_parameters: int, dtype_bytes: int, quantization: str | None) -> int:
    """Returns the fewest bytes that the weights can take."""
    bits = _BITS[quantization] if quantization is not None else 8 * dtype_bytes
    return num_parameters * bits // 8


def check_fits(model: ModelConfig, num_bytes: int, free: FreeMemory) -> None:
    """Raises ModelLoadError, which says how much is missing, when weights of num_bytes bytes cannot fit."""
    budget = _budget(model)
    bounds = [(free.num_bytes, "that are free")]
    if budget is not None:
        bounds.append((budget, "of models[].memory_gb"))
    for allowed, words in bounds:
        if num_bytes > allowed:
            missing = f"{_gigabytes(num_bytes - allowed)} more than the {_gigabytes(allowed)} {words}"
            raise ModelLoadError(f"{model.id}: its weights take {_gigabytes(num_bytes)}, {missing}")


def pool_memory(model: ModelConfig, num_bytes: int, free: FreeMemory) -> FreeMemory:
    """Returns what there is for the KV pool beside weights of num_bytes bytes, within the model's budget."""
    budget = _budget(model)
    return free if budget is None else free._replace(limit=max(0, budget - num_bytes))


def _budget(model: ModelConfig) -> int | None:
    return None if model.memory_gb is None else int(model.memory_gb * GIGABYTE)


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / GIGABYTE:.3g} GB"
