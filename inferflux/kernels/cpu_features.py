"""What this machine's CPU computes quickly, as oneDNN tells it."""

import torch


def has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())


def is_fast(dtype: torch.dtype) -> bool:
    """Whether matrix products in `dtype` have instructions of their own here (bfloat16: AVX-512 or newer).

    Without them torch falls back to scalar loops: 0.3 GFLOP/s in bfloat16 on a Zen 3 EPYC (AVX2), torch 2.13.
    """
    if dtype in (torch.float32, torch.float64):
        return True
    if not has_onednn():
        return False
    probes = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in probes and bool(probes[dtype]())
