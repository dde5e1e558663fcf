"""Cases: sample inputs of every op, shared by the tests, the benchmarks and `inferflux kernels check`.

Odd sizes, strided views and poison: whatever an op must not read is NaN. Knows no backend. Inputs are drawn in float32
from a generator seeded by the case's name, so that every dtype and device sees the same numbers.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from inferflux.kernels.cases.case import Case, NamedCases
from inferflux.kernels.cases.dense import activation_cases, add_norm_cases, linear_cases, norm_cases
from inferflux.kernels.cases.moe import moe_cases, quantized_moe_cases
from inferflux.kernels.cases.paged import (
    attention_cases,
    quantized_attention_cases,
    quantized_rope_cases,
    rope_cases,
)
from inferflux.kernels.cases.quantized import quantized_linear_cases
from inferflux.kernels.cases.sampling import sampling_cases

_CASES: Final[Mapping[str, Callable[[], NamedCases]]] = MappingProxyType(
    {
        "attention": attention_cases,
        "linear": linear_cases,
        "quantized_linear": quantized_linear_cases,
        "norm": norm_cases,
        "add_norm": add_norm_cases,
        "rope": rope_cases,
        "activation": activation_cases,
        "moe": moe_cases,
        "quantized_moe": quantized_moe_cases,
        "sampling": sampling_cases,
    }
)
# With pages of 8 bits, of the ops that see any.
_QUANTIZED_KV_CASES: Final[Mapping[str, Callable[[], NamedCases]]] = MappingProxyType(
    {"attention": quantized_attention_cases, "rope": quantized_rope_cases}
)


def cases_of(op: str, *, quantized_kv: bool = False) -> tuple[Case, ...]:
    """Returns the cases of `op`, one of `backends.OPS`; quantized_kv: those with pages of 8 bits instead."""
    table = _QUANTIZED_KV_CASES if quantized_kv else _CASES
    return tuple(Case(op, name, build) for name, build in table[op]())
