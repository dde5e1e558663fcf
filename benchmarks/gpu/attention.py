"""Attention on the GPU: decode beside the measured copy bandwidth, prefill beside the best of torch's own backends."""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from inferflux.kernels.backends import find_backend
from inferflux.kernels.bench.measure import Contender, make_contender, make_sampler, take_turns
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
        ours = make_contender(backend.name, backend.find("attention"), workload, dtype, device)
        rivals = [] if workload.name.startswith("decode") else _sdpa(workload, shape, dtype, device)
        times = take_turns([ours, *rivals], make_sampler(workload, device, toy=toy), 3 if toy else ROUNDS)
        seconds = statistics.median(times[0])
        figures: dict[str, Any] = {"us": seconds * 1e6, "backend": backend.name}
        if not rivals:
            figures["gb_per_s"] = workload.cost.num_bytes(dtype) / seconds / 1e9
            figures["share_of_copy"] = workload.cost.num_bytes(dtype) / seconds / copy
        else:
            figures["tflop_per_s"] = workload.cost.flops / seconds / 1e12
            named = zip(rivals, times[1:], strict=True)
            figures["sdpa_us"] = {rival.name: statistics.median(own) * 1e6 for rival, own in named}
            figures["share_of_best_sdpa"] = min(figures["sdpa_us"].values()) / figures["us"]
        yield workload.name, figures
    if device.type == "cuda":
        yield from _other_sizes(shape, dtype, device)


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


def _other_sizes(shape: LayerShape, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Any]]:
    """Times other sizes than those in `tuning`, for whoever tunes next. Each compiles anew, which takes the time."""
    from inferflux.kernels.triton import attention, tuning

    workloads = workloads_of("attention", shape)

    def times_of(*places: int) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for workload in (workloads[place] for place in places):
            try:
                ours = make_contender("triton", attention.attention, workload, dtype, device)
                times = take_turns([ours], make_sampler(workload, device, toy=False), 5)
                figures[workload.name] = statistics.median(times[0]) * 1e6
            except Exception as error:
                figures[workload.name] = f"{type(error).__name__}: {error}"[:200]
        return figures

    usual = tuning.DECODE_SPLIT_TOKENS
    for split in (256, 1024, 2048):
        tuning.DECODE_SPLIT_TOKENS = split
        yield f"decode split {split}", times_of(0, 1)
    tuning.DECODE_SPLIT_TOKENS = usual
    kinds = {
        "decode": (tuning.DECODE, itertools.product((16,), (64, 128), (4,), (2, 3, 4)), (0, 1)),
        "prefill": (tuning.PREFILL, itertools.product((64, 128), (64, 128), (4, 8), (2, 3, 4)), (2, 3)),
    }
    for kind, (table, choices, places) in kinds.items():
        usual_tile = table[128]
        for block_m, block_n, num_warps, num_stages in choices:
            table[128] = dataclasses.replace(
                usual_tile, block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages
            )
            yield f"tile {kind} m{block_m} n{block_n} w{num_warps} s{num_stages}", times_of(*places)
        table[128] = usual_tile
