"""Attention on the GPU: decode beside the measured copy bandwidth, prefill beside the best of torch's own backends.

With the sizes that were measured there, by the section `tune` before this one, and with the shipped ones.
"""

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from inferflux.kernels.backends import Backend, find_backend
from inferflux.kernels.bench.measure import Contender, contend, make_sampler, take_turns
from inferflux.kernels.bench.roofline import CUDA_PROBE, TOY_PROBE, measure_roofline
from inferflux.kernels.bench.shapes import SHAPES, LayerShape
from inferflux.kernels.bench.workload import Workload
from inferflux.kernels.bench.workloads import workloads_of

ROUNDS = 20
SDPA = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def measure(device: torch.device, toy: bool) -> Iterator[tuple[str, Any]]:
    """Yields (name, figures) one after another, so that what is done is kept whatever comes next."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    roof = measure_roofline(device, (dtype,), TOY_PROBE if toy else CUDA_PROBE)
    copy = roof.bytes_per_s
    yield "roofline", {"copy_gb_per_s": copy / 1e9, "matmul_tflop_per_s": roof.flops_per_s[dtype] / 1e12}
    shape = SHAPES["toy" if toy else "large"]
    backend = find_backend("torch" if device.type == "cpu" else "triton")
    for workload in workloads_of("attention", shape):
        ours = _ours(backend, workload, dtype, device)
        rivals = [] if workload.name.startswith("decode") else _sdpa(workload, shape, dtype, device)
        times = take_turns([*ours, *rivals], make_sampler(workload, device, toy=toy), 3 if toy else ROUNDS)
        seconds = statistics.median(times[0])
        figures: dict[str, Any] = {"us": seconds * 1e6, "backend": backend.name}
        if len(ours) > 1:
            figures["us_with_shipped_sizes"] = statistics.median(times[1]) * 1e6
        if not rivals:
            figures["gb_per_s"] = workload.cost.num_bytes(dtype) / seconds / 1e9
            figures["share_of_copy"] = workload.cost.num_bytes(dtype) / seconds / copy
        else:
            figures["tflop_per_s"] = workload.cost.flops / seconds / 1e12
            named = zip(rivals, times[len(ours) :], strict=True)
            figures["sdpa_us"] = {rival.name: statistics.median(own) * 1e6 for rival, own in named}
            figures["share_of_best_sdpa"] = min(figures["sdpa_us"].values()) / figures["us"]
        yield workload.name, figures


def _ours(backend: Backend, workload: Workload, dtype: torch.dtype, device: torch.device) -> list[Contender]:
    """With the sizes that serve here; of Triton's kernels with the shipped ones, too, over the same pages."""
    torch.manual_seed(0)
    inputs = workload.build(dtype, device)
    op = backend.find("attention")
    ways = {backend.name: op}
    if backend.name == "triton":
        from inferflux.kernels.triton.tuning import SHIPPED  # here, since a dry run may have no Triton

        ways["shipped"] = functools.partial(op, sizes=SHIPPED)
    return [contend(name, way, "attention", inputs) for name, way in ways.items()]


def _sdpa(workload: Workload, shape: LayerShape, dtype: torch.dtype, device: torch.device) -> list[Contender]:
    """Each backend that takes it, on contiguous keys and values: causal from the lower right corner."""
    metadata = workload.build(dtype, device).positional[2]
    num_queries, length = metadata.query_lengths_host[0], metadata.kv_lengths_host[0]
    sizes = ((shape.num_heads, num_queries), (shape.num_kv_heads, length), (shape.num_kv_heads, length))
    query, key, value = (
        torch.randn(1, heads, tokens, shape.head_dim, device=device).to(dtype) for heads, tokens in sizes
    )
    mask = None
    if num_queries != length:
        positions = torch.arange(length - num_queries, length, device=device).unsqueeze(1)
        mask = torch.arange(length, device=device) <= positions

    def call(backend: SDPBackend) -> Callable[[], object]:
        def run() -> object:
            with sdpa_kernel(backend):
                return functional.scaled_dot_product_attention(
                    query, key, value, mask, is_causal=mask is None, enable_gqa=True
                )

        return run

    contenders = []
    for backend in SDPA:
        run = call(backend)
        try:
            run()
        except RuntimeError:
            continue
        contenders.append(Contender(backend.name.lower(), run, lambda: None))
    return contenders or [Contender("math", call(SDPBackend.MATH), lambda: None)]
