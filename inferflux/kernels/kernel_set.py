"""KernelSet: one implementation per op, and why it was chosen.

For each op the best backend that has it and accepts the device and dtype is chosen. Knows no model and no weights.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from inferflux.config import KernelsConfig
from inferflux.errors import ConfigError
from inferflux.kernels.backends import BUILT_IN, OPS, Backend, find_backend
from inferflux.kernels.blame import wrong_signature
from inferflux.kernels.dtypes import dtype_name
from inferflux.kernels.ops import (
    ActivationOp,
    AddNormOp,
    AttentionOp,
    LinearOp,
    MoeOp,
    NormOp,
    QuantizedLinearOp,
    QuantizedMoeOp,
    RopeOp,
    SamplingOp,
)

AUTO: Final = "auto"
# Returns why a backend cannot be used, or None.
Refusal = Callable[[Backend], str | None]


@dataclass(frozen=True, slots=True)
class Choice:
    """backend serves `op`. refused: better ones that do not, each with the reason. device_lengths: of attention, see
    `Backend.device_lengths`."""

    op: str
    backend: str
    refused: tuple[tuple[str, str], ...] = ()
    device_lengths: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSet:
    """The ops a model computes with. choices: one per op, in order of `backends.OPS`."""

    attention: AttentionOp
    linear: LinearOp
    quantized_linear: QuantizedLinearOp
    norm: NormOp
    add_norm: AddNormOp
    rope: RopeOp
    activation: ActivationOp
    moe: MoeOp
    quantized_moe: QuantizedMoeOp
    sampling: SamplingOp
    choices: tuple[Choice, ...] = ()


def select(
    device: torch.device, dtype: torch.dtype, overrides: KernelsConfig | None = None, *, quantized_kv: bool = False
) -> KernelSet:
    """Returns the best implementation of each op for `device` and `dtype`, or the one `overrides` names.

    quantized_kv: keys and values are cached in 8 bits (see `quantized_kv`).
    Raises ConfigError when a named backend is unknown, cannot be imported, lacks the op, refuses it or takes other
    arguments.
    """
    settings = overrides or KernelsConfig()
    # A file is executed once, for all the ops that it serves.
    find = functools.cache(functools.partial(find_backend, also=(AUTO,)))
    ops: dict[str, Any] = {}
    choices = []
    for op in OPS:
        wanted = getattr(settings, op)
        refusal = functools.partial(Backend.refusal, op=op, device=device, dtype=dtype, quantized_kv=quantized_kv)
        if wanted == AUTO:
            choice = _best(op, refusal)
        else:
            choice = _named(op, wanted, find, refusal, f"{dtype_name(dtype)} on {device}")
        backend = find(choice.backend)
        ops[op] = backend.find(op)
        choices.append(replace(choice, device_lengths=op == "attention" and backend.device_lengths))
    return KernelSet(**ops, choices=tuple(choices))


def _best(op: str, refusal: Refusal) -> Choice:
    refused: list[tuple[str, str]] = []
    for name in BUILT_IN:
        reason = refusal(find_backend(name))
        if reason is None:
            return Choice(op, name, tuple(refused))
        refused.append((name, reason))
    raise AssertionError(f"no backend has {op}: {refused}")


def _named(op: str, name: str, find: Callable[[str], Backend], refusal: Refusal, where: str) -> Choice:
    key = f"runtime.kernels.{op}"
    try:
        backend = find(name)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    reason = refusal(backend) or wrong_signature(op, backend.find(op))
    if reason is not None:
        raise ConfigError(f"{key}: {name} cannot serve {op} in {where}: {reason}")
    return Choice(op, name)
