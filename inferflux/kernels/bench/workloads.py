"""The workloads of every op at a layer's shape, each with what it costs at least.

Numbers are drawn on the device they run on, so that gigabytes of pages take no time to make. Knows no backend.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Final

import torch

from inferflux.kernels.bench.shapes import LayerShape
from inferflux.kernels.bench.workload import Build, Cost, Workload
from inferflux.kernels.cases.case import Draw, Inputs
from inferflux.kernels.cases.paged import Paging
from inferflux.kernels.quantized_weight import INT4_GROUP, Scheme, quantize

# Page-major pools of two layers: one layer's view is strided, as in a model.
NUM_LAYERS = 2
NUM_EXPERTS = 8
EXPERTS_PER_TOKEN = 2
_WEIGHT_BYTES: Final[Mapping[Scheme, float]] = MappingProxyType({"int8": 1.0, "int4": 0.5 + 4 / INT4_GROUP, "fp8": 1.0})


def workloads_of(op: str, shape: LayerShape) -> tuple[Workload, ...]:
    """Returns the workloads of `op`, one of `backends.OPS`."""
    return tuple(_WORKLOADS[op](shape))


def _draw(dtype: torch.dtype, device: torch.device) -> Draw:
    return Draw(dtype, device, torch.Generator().manual_seed(0))


def _normal(dtype: torch.dtype, device: torch.device, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device).normal_(std=scale)


def _attention(shape: LayerShape) -> Iterator[Workload]:
    for rows, length in shape.decodes:
        paging = Paging(((length - 1, length),) * rows, num_layers=NUM_LAYERS)
        yield Workload("attention", f"decode {rows}x{length}", _attention_cost(shape, paging), True,
                       _attention_inputs(shape, paging))  # fmt: skip
    for cached, count in shape.prefills:
        paging = Paging(((cached, cached + count),), num_layers=NUM_LAYERS)
        name = f"prefill {count}" + (f" after {cached}" if cached else "")
        yield Workload("attention", name, _attention_cost(shape, paging), True, _attention_inputs(shape, paging))


def _attention_cost(shape: LayerShape, paging: Paging) -> Cost:
    """Each cached key and value once, queries in and out; two products of D per query head and visible position."""
    contexts = sum(stop for _, stop in paging.spans)
    seen = sum((start + 1 + stop) * (stop - start) // 2 for start, stop in paging.spans)
    elements = 2 * contexts * shape.num_kv_heads * shape.head_dim
    elements += 2 * paging.num_tokens * shape.num_heads * shape.head_dim
    return Cost(elements, 4 * seen * shape.num_heads * shape.head_dim)


def _attention_inputs(shape: LayerShape, paging: Paging) -> Build:
    def build(dtype: torch.dtype, device: torch.device) -> Inputs:
        metadata = paging.metadata(_draw(dtype, device))
        size = (paging.num_pages, paging.num_layers, 2, paging.page_tokens, shape.num_kv_heads, shape.head_dim)
        pool = _normal(dtype, device, *size)
        all_heads = shape.num_heads + 2 * shape.num_kv_heads
        query = _normal(dtype, device, paging.num_tokens, all_heads, shape.head_dim)[:, : shape.num_heads]
        settings = {"scale": shape.head_dim**-0.5, "window": None, "soft_cap": None}
        return Inputs((query, pool[:, 0], metadata), settings)

    return build


def _linear(shape: LayerShape) -> Iterator[Workload]:
    sizes = shape.matrices()
    for name, (rows, columns) in sizes.items():
        for count in shape.batches:
            cost = Cost(rows * columns + count * (rows + columns), 2 * count * rows * columns)
            yield Workload("linear", f"{name} {count}", cost, True, _linear_inputs(rows, columns, count))


def _linear_inputs(rows: int, columns: int, count: int) -> Build:
    def build(dtype: torch.dtype, device: torch.device) -> Inputs:
        weight = _normal(dtype, device, rows, columns, scale=columns**-0.5)
        return Inputs((weight, None, _normal(dtype, device, count, columns)))

    return build


def _quantized_linear(shape: LayerShape) -> Iterator[Workload]:
    rows, columns = 2 * shape.intermediate, shape.hidden
    for scheme, weight_bytes in _WEIGHT_BYTES.items():
        for count in shape.batches:
            cost = Cost(count * (rows + columns), 2 * count * rows * columns, int(rows * columns * weight_bytes))
            build = _quantized_inputs(scheme, rows, columns, count)
            yield Workload("quantized_linear", f"{scheme} gate_up {count}", cost, True, build)


def _quantized_inputs(scheme: Scheme, rows: int, columns: int, count: int) -> Build:
    def build(dtype: torch.dtype, device: torch.device) -> Inputs:
        weight = quantize(_normal(dtype, device, rows, columns, scale=columns**-0.5), scheme)
        return Inputs((weight, None, _normal(dtype, device, count, columns)))

    return build


def _moe(shape: LayerShape) -> Iterator[Workload]:
    """Two of eight experts, each a quarter as wide as the layer's MLP."""
    hidden, inner = shape.hidden, shape.intermediate // 4
    for count in shape.batches:
        num_used = min(NUM_EXPERTS, EXPERTS_PER_TOKEN * count)
        cost = Cost(3 * num_used * hidden * inner + 2 * count * hidden, 6 * EXPERTS_PER_TOKEN * count * hidden * inner)
        yield Workload(
            "moe", f"{EXPERTS_PER_TOKEN} of {NUM_EXPERTS}, {count}", cost, True, _moe_inputs(hidden, inner, count)
        )


def _moe_inputs(hidden: int, inner: int, count: int) -> Build:
    def build(dtype: torch.dtype, device: torch.device) -> Inputs:
        gate_up = _normal(dtype, device, NUM_EXPERTS, 2 * inner, hidden, scale=hidden**-0.5)
        down = _normal(dtype, device, NUM_EXPERTS, hidden, inner, scale=inner**-0.5)
        ids = torch.arange(EXPERTS_PER_TOKEN * count, device=device).view(count, EXPERTS_PER_TOKEN) % NUM_EXPERTS
        weights = torch.full(ids.shape, 1 / EXPERTS_PER_TOKEN, device=device)
        return Inputs((gate_up, down, _normal(dtype, device, count, hidden), ids, weights, "silu"))

    return build


def _quantized_moe(shape: LayerShape) -> Iterator[Workload]:
    hidden, inner = shape.hidden, shape.intermediate // 4
    for scheme, weight_bytes in _WEIGHT_BYTES.items():
        for count in shape.batches:
            num_used = min(NUM_EXPERTS, EXPERTS_PER_TOKEN * count)
            flops = 6 * EXPERTS_PER_TOKEN * count * hidden * inner
            cost = Cost(2 * count * hidden, flops, int(3 * num_used * hidden * inner * weight_bytes))
            name = f"{scheme} {EXPERTS_PER_TOKEN} of {NUM_EXPERTS}, {count}"
            build = _quantized_moe_inputs(scheme, hidden, inner, count)
            yield Workload("quantized_moe", name, cost, True, build)


def _quantized_moe_inputs(scheme: Scheme, hidden: int, inner: int, count: int) -> Build:
    def build(dtype: torch.dtype, device: torch.device) -> Inputs:
        gate_up, down, *rest = _moe_inputs(hidden, inner, count)(dtype, device).positional
        experts = ([quantize(matrix, scheme) for matrix in matrices] for matrices in (gate_up, down))
        return Inputs((*experts, *rest))

    return build


def _norm(shape: LayerShape) -> Iterator[Workload]:
    for count in shape.batches:
        cost = Cost(2 * count * shape.hidden + shape.hidden, 4 * count * shape.hidden)
        yield Workload("norm", f"{count}x{shape.hidden}", cost, False, _norm_inputs(shape.hidden, count, adds=False))


def _add_norm(shape: LayerShape) -> Iterator[Workload]:
    for count in shape.batches:
        cost = Cost(4 * count * shape.hidden + shape.hidden, 5 * count * shape.hidden)
        yield Workload("add_norm", f"{count}x{shape.hidden}", cost, False, _norm_inputs(shape.hidden, count, adds=True))


def _norm_inputs(hidden: int, count: int, *, adds: bool) -> Build:
    def build(dtype: torch.dtype, device: torch.device) -> Inputs:
        streams = [_normal(dtype, device, count, hidden) for _ in range(1 + adds)]
        return Inputs((*streams, _normal(dtype, device, hidden), 1e-5))

    return build


def _rope(shape: LayerShape) -> Iterator[Workload]:
    all_heads = shape.num_heads + 2 * shape.num_kv_heads
    for count in shape.batches:
        elements = count * shape.head_dim * (2 * all_heads + 2)
        flops = 3 * count * shape.head_dim * (shape.num_heads + shape.num_kv_heads)
        yield Workload("rope", f"{count} tokens", Cost(elements, flops, 8 * count), False, _rope_inputs(shape, count))


def _rope_inputs(shape: LayerShape, count: int) -> Build:
    paging = Paging(((0, count),), num_layers=NUM_LAYERS)

    def build(dtype: torch.dtype, device: torch.device) -> Inputs:
        metadata = paging.metadata(_draw(dtype, device))
        all_heads = shape.num_heads + 2 * shape.num_kv_heads
        qkv = _normal(dtype, device, count, all_heads, shape.head_dim)
        angles = torch.rand(count, shape.head_dim // 2, device=device).repeat(1, 2)
        pool = paging.pool(_draw(dtype, device), shape.num_kv_heads, shape.head_dim)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return Inputs((qkv, cos, sin, pool, metadata.slots), {"num_heads": shape.num_heads})

    return build


def _activation(shape: LayerShape) -> Iterator[Workload]:
    for count in shape.batches:
        cost = Cost(3 * count * shape.intermediate, 5 * count * shape.intermediate)
        build = _activation_inputs(shape.intermediate, count)
        yield Workload("activation", f"silu {count}x{shape.intermediate}", cost, False, build)


def _activation_inputs(size: int, count: int) -> Build:
    return lambda dtype, device: Inputs((_normal(dtype, device, count, 2 * size), "silu"))


def _sampling(shape: LayerShape) -> Iterator[Workload]:
    rules = {"greedy": (0.0, 0, 1.0), "plain": (1.0, 0, 1.0), "top_k": (1.0, 50, 1.0), "top_p": (1.0, 0, 0.9)}
    rows = shape.batches[1]
    for name, rule in rules.items():
        cost = Cost(0, 4 * rows * shape.vocab, 4 * rows * shape.vocab)
        yield Workload("sampling", f"{name} {rows}x{shape.vocab}", cost, False, _sampling_inputs(rows, shape, rule))


def _sampling_inputs(rows: int, shape: LayerShape, rule: tuple[float, int, float]) -> Build:
    temperature, top_k, top_p = rule

    def build(dtype: torch.dtype, device: torch.device) -> Inputs:
        def column(value: float, kind: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.full((rows,), value, dtype=kind, device=device)

        logits = _normal(torch.float32, device, rows, shape.vocab, scale=3.0)
        uniform = torch.rand(rows, dtype=torch.float64, device=device)
        settings = (column(temperature), column(top_k, torch.int64), column(top_p), column(0.0))
        return Inputs((logits, *settings, uniform))

    return build


_WORKLOADS: Final[Mapping[str, Callable[[LayerShape], Iterator[Workload]]]] = MappingProxyType(
    {
        "attention": _attention,
        "linear": _linear,
        "quantized_linear": _quantized_linear,
        "norm": _norm,
        "add_norm": _add_norm,
        "rope": _rope,
        "activation": _activation,
        "moe": _moe,
        "quantized_moe": _quantized_moe,
        "sampling": _sampling,
    }
)
