"""CPU kernels in C++, compiled once per machine, for what stock operators cannot do in one pass.

Paged attention, norms, rope with the KV write, and gated activations, in one call each. Shapes that they do not cover
go to the torch backend, call by call. Products are not an op here but layouts (`panels`) among which the torch
backend's `cpu_table` chooses. All go through `calls`, so that a whole step can be replayed at once (`tape`).
"""

from typing import Final

import torch

from inferflux.kernels.dtypes import dtype_name
from inferflux.kernels.native.loading import library

DTYPES = (torch.float32, torch.bfloat16)
# Reads and writes pages of 8 bits (see `quantized_kv`).
QUANTIZED_KV: Final = True


def supports(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns why the op cannot be served there, or None."""
    if device.type != "cpu":
        return "for CPUs only"
    if dtype not in DTYPES:
        return f"not written for {dtype_name(dtype)}"
    return library().reason
