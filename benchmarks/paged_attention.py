"""Paged decode attention beside torch's fused attention on contiguous keys and values: what paging costs,
and how fast pages of 8 bits are.

    python -m benchmarks.paged_attention                       # heads of S and M, float32: a minute
    python -m benchmarks.paged_attention --shapes S --dtype bfloat16 --rounds 5

Every row of a batch has one query. The rival gets its keys and values already padded to one length, side by side, and
its query heads laid out as it likes them best: it is what attention would cost if no pages had to be followed at all.
All take turns in one run, on caches large enough to lie in memory. Results go to
benchmarks/results/paged_attention.json unless --out says otherwise.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from benchmarks import record
from benchmarks.shapes import SHAPES, Shape
from inferflux.kernels.backends import find_backend
from inferflux.kernels.cases.case import Draw
from inferflux.kernels.cases.paged import Paging
from inferflux.kernels.quantized_kv import SCALE_BYTES, quantize

CPU = torch.device("cpu")
BATCHES = ((1, 192), (1, 2048), (1, 16384), (8, 1024), (32, 192), (32, 512))
# Layers whose caches are visited in turn, so that none is still in the processor's.
NUM_LAYERS = 8
# A backend of ours and the type of its pages; None: the queries'.
OURS: Final = {
    "native": ("native", None),
    "native_int8": ("native", torch.int8),
    "native_fp8": ("native", torch.float8_e4m3fn),
    "torch": ("torch", None),
    "torch_int8": ("torch", torch.int8),
}

Layer = Callable[[int], object]


def paged(name: str, shape: Shape, batch: tuple[int, int], dtype: torch.dtype) -> Layer | None:
    """Returns one layer's attention by one of OURS, or None where its backend is refused."""
    backend, quantized_as = OURS[name]
    if find_backend(backend).refusal("attention", CPU, dtype, quantized_kv=quantized_as is not None) is not None:
        return None
    attention = find_backend(backend).find("attention")
    rows, length = batch
    paging = Paging(((length - 1, length),) * rows, num_layers=NUM_LAYERS)
    metadata = paging.metadata(Draw(dtype, CPU, torch.Generator().manual_seed(0)))
    size = (paging.num_pages, NUM_LAYERS, 2, paging.page_tokens, shape.num_kv_heads, shape.head_dim)
    pool = torch.randn(size)
    layers = (pool.to(dtype) if quantized_as is None else quantize(pool, quantized_as).view(quantized_as)).unbind(1)
    query = torch.randn(rows, shape.num_heads, shape.head_dim).to(dtype)
    scale = shape.head_dim**-0.5
    return lambda layer: attention(query, layers[layer], metadata, scale=scale, window=None, soft_cap=None)


def contiguous(shape: Shape, batch: tuple[int, int], dtype: torch.dtype) -> Layer:
    """Returns one layer's fused attention; query heads that share a key head stand as its queries."""
    rows, length = batch
    groups = shape.num_heads // shape.num_kv_heads
    caches = torch.randn(NUM_LAYERS, 2, rows, shape.num_kv_heads, length, shape.head_dim).to(dtype)
    query = torch.randn(rows, shape.num_kv_heads, groups, shape.head_dim).to(dtype)
    return lambda layer: functional.scaled_dot_product_attention(query, caches[layer, 0], caches[layer, 1])


def measure(contenders: dict[str, Layer], rounds: int) -> dict[str, float]:
    """Returns each one's best mean microseconds per layer over the rounds, in turns."""
    best = dict.fromkeys(contenders, float("inf"))
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for name, run in contenders.items():
                started = time.perf_counter()
                for layer in range(NUM_LAYERS):
                    run(layer)
                best[name] = min(best[name], (time.perf_counter() - started) / NUM_LAYERS * 1e6)
    return best


def run(name: str, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    shape, lines = SHAPES[name], []
    for batch in BATCHES:
        contenders: dict[str, Layer] = {"contiguous": contiguous(shape, batch, dtype)}
        contenders |= {each: ours for each in OURS if (ours := paged(each, shape, batch, dtype)) is not None}
        times = measure(contenders, rounds)
        num_heads = batch[0] * batch[1] * 2 * shape.num_kv_heads
        line: dict[str, Any] = {"shape": name, "rows": batch[0], "tokens": batch[1]}
        for each, microseconds in times.items():
            quantized_as = OURS[each][1] if each in OURS else None
            head_bytes = shape.head_dim * dtype.itemsize if quantized_as is None else shape.head_dim + SCALE_BYTES
            line[f"{each}_us"] = round(microseconds, 1)
            line[f"{each}_gb_s"] = round(num_heads * head_bytes / microseconds / 1e3, 2)
        lines.append(line)
    return lines


def show(lines: list[dict[str, Any]]) -> None:
    names = ("contiguous", *OURS)
    table = Table(title="decode attention of one layer: microseconds (GB/s of keys and values)")
    for column in ("shape", "rows", "tokens", *names):
        table.add_column(column, justify="right")
    for line in lines:
        cells = (
            f"{line[f'{name}_us']:.0f} ({line[f'{name}_gb_s']})" if f"{name}_us" in line else "-" for name in names
        )
        table.add_row(line["shape"], str(line["rows"]), str(line["tokens"]), *cells)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["S", "M"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = [line for name in arguments.shapes for line in run(name, getattr(torch, arguments.dtype), arguments.rounds)]
    show(lines)
    print(record.write("paged_attention", {"dtype": arguments.dtype, "lines": lines}, arguments.out))


if __name__ == "__main__":
    main()
