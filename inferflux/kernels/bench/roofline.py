"""Roofline: what this machine does at most, measured here and now (Williams, Waterman and Patterson 2009).

Memory bandwidth is the better of reading and of copying arrays larger than any cache; arithmetic is a square matrix
product in each dtype, by the faster of torch's libraries. Knows no op.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from inferflux.kernels import cpu_features

# Rounds of which the best counts: a limit is what the machine can do, not what it did on average.
ROUNDS = 5
TRIAL_SIDE = 64
MAX_PROBE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Probe:
    """Sizes of the measurement: bytes per array, and the side of the matrices."""

    num_bytes: int
    side: int


TOY_PROBE = Probe(2**22, 64)
CPU_PROBE = Probe(2**28, 2048)
CUDA_PROBE = Probe(2**32, 8192)


@dataclass(frozen=True, slots=True)
class Roofline:
    """bytes_per_s: memory read and written. flops_per_s: by dtype."""

    bytes_per_s: float
    flops_per_s: Mapping[torch.dtype, float]

    def least_seconds(self, num_bytes: int, flops: int, dtype: torch.dtype) -> float:
        """The time below which this machine cannot do that much, and what `bound` names."""
        return max(num_bytes / self.bytes_per_s, flops / self.flops_per_s[dtype])

    def bound(self, num_bytes: int, flops: int, dtype: torch.dtype) -> str:
        return "memory" if num_bytes / self.bytes_per_s >= flops / self.flops_per_s[dtype] else "compute"


def probe_for(device: torch.device) -> Probe:
    return CPU_PROBE if device.type == "cpu" else CUDA_PROBE


def measure_roofline(device: torch.device, dtypes: tuple[torch.dtype, ...], probe: Probe) -> Roofline:
    return Roofline(_bandwidth(device, probe), {dtype: _arithmetic(device, dtype, probe.side) for dtype in dtypes})


def _bandwidth(device: torch.device, probe: Probe) -> float:
    source = torch.ones(probe.num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copying = 2 * probe.num_bytes / _best(lambda: target.copy_(source), device)
    reading = probe.num_bytes / _best(source.sum, device)
    return max(copying, reading)


def _arithmetic(device: torch.device, dtype: torch.dtype, most: int) -> float:
    """Operations per second at the largest side up to `most`: smaller where the type has no instructions of its own,
    and a product would take minutes. Doubled step by step: a small product's time is that of its launch."""
    side = min(TRIAL_SIDE, most)
    rate = _multiply(device, dtype, side)
    while side < most and 2 * (2 * side) ** 3 / rate <= MAX_PROBE_SECONDS:
        side *= 2
        rate = _multiply(device, dtype, side)
    return rate


def _multiply(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Operations per second of a product of two such matrices."""
    # Random numbers: constant ones draw less power, and a GPU then runs faster than it ever will.
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    least = _best(lambda: a @ b, device)
    if device.type == "cpu" and dtype != torch.float64 and cpu_features.has_onednn() and cpu_features.is_fast(dtype):
        # torch's own product in float32 is MKL's, which leaves AVX-512 aside on CPUs that are not Intel's: 215 GFLOP/s
        # where oneDNN reaches 485 (two cores of a Zen 5 EPYC).
        packed = torch.ops.mkldnn._reorder_linear_weight(b, side)
        least = min(least, _best(lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], ""), device))
    return 2 * side**3 / least


def _best(call: Callable[[], object], device: torch.device) -> float:
    call()
    times = []
    for _ in range(ROUNDS):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
