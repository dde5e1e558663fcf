"""What this machine's CPU computes quickly, as oneDNN and the system tell it."""

from pathlib import Path

import torch


def description() -> str:
    """Returns what tells this CPU from others, as Linux says it: model and features. Elsewhere nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return ""
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))


def has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())


def multiplies_bytes() -> bool:
    """Whether the CPU has instructions for sums of 8-bit products (VNNI, AMX), and oneDNN is there to use them."""
    words = set(description().split())
    return has_onednn() and not words.isdisjoint(("avx512_vnni", "avx_vnni", "amx_int8"))


def multiplies_tiles() -> bool:
    """Whether the CPU multiplies tiles of bfloat16 at once (AMX), several times as fast as float32."""
    return has_onednn() and "amx_bf16" in description().split()


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
