"""Triton kernels: paged attention, norms, rotary embedding with the KV write, gated activations.

Correct under Triton's interpreter; not yet measured on a GPU, so `auto` prefers torch's and `triton` must be asked for.
"""

import torch


def supports(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns why `op` cannot run here, or None."""
    from triton import knobs

    if device.type != "cuda" and not knobs.runtime.interpret:
        return "Triton needs a CUDA device (or TRITON_INTERPRET=1)"
    return None
