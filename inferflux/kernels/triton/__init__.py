"""Triton kernels for NVIDIA GPUs: every op; the plain `linear` where it is faster than the vendor's library.

Correct under Triton's interpreter (TRITON_INTERPRET=1) and compiled for an H100, the hardest of them for an A10, by
the tests; sizes in `tuning`.
"""

from importlib.util import find_spec
from typing import Final

import torch

from inferflux.config.process_env import asks_for_triton_interpreter
from inferflux.kernels.dtypes import dtype_name

# The first with bfloat16 in its tensor cores (Ampere).
MIN_CAPABILITY: Final = (8, 0)
# Reads and writes pages of 8 bits (see `quantized_kv`).
QUANTIZED_KV: Final = True
# Attention may be recorded (see `Backend.device_lengths`): on the host only the longest row's length matters.
DEVICE_LENGTHS: Final = True
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


def supports(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns why `op` cannot run here, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in DTYPES:
        return f"not written for {dtype_name(dtype)}"
    if not _is_interpreted():
        if device.type != "cuda":
            return "Triton needs a CUDA device (or TRITON_INTERPRET=1)"
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            return f"needs compute capability 8.0 or newer (this is {capability[0]}.{capability[1]})"
    from inferflux.kernels.triton import tuning

    if op == "linear" and not tuning.sizes_for(device, dtype).linear:
        return "not measured to be faster than the vendor's library (`inferflux kernels tune` measures it)"
    return None


def _is_interpreted() -> bool:
    """Asks Triton, but imports it for that only where the answer may be yes: on a CPU that would take 75 MB and 0.1 s
    for nothing."""
    if not asks_for_triton_interpreter():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)
