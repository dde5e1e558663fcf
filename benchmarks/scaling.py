"""A scaling model: tokens per second of one decode step on 1 to 64 GPUs, from a roofline and the times of collectives.

    python -m benchmarks.scaling                                  # with the links assumed below
    inferflux bench dist --json > collectives.json
    python -m benchmarks.scaling --collectives collectives.json   # with times measured on this machine's ranks

A step takes as long as its slowest part of each kind, one after another: memory traffic or arithmetic (whichever is
longer), then collectives, then handing the plan on. Nothing overlaps and nothing is lost between kernels. It says where
to look, not what will be measured; docs/distributed.md has the assumptions.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

GPUS = (1, 2, 4, 8, 16, 32, 64)
GPUS_PER_HOST = 8
BYTES = 2


@dataclass(frozen=True)
class Shape:
    """A model's sizes. experts, per_token, expert_size: of its mixtures; 0 for a dense one."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    experts: int = 0
    per_token: int = 0

    @property
    def attention(self) -> int:
        """Weights of one layer's projections."""
        return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def mlp(self) -> int:
        """Weights of one layer's MLP, or of one of its experts."""
        return 3 * self.hidden * self.intermediate


SHAPES = (
    Shape("Llama-3-70B", 80, 8192, 64, 8, 128, 28672, 128256),
    Shape("Qwen3-235B-A22B", 94, 4096, 64, 4, 128, 1536, 151936, 128, 8),
)


@dataclass(frozen=True)
class Gpu:
    """bytes_per_s: what streams of weights and pages reach. flops: what dense products reach. memory: bytes of weights
    and pages."""

    bytes_per_s: float = 3.4e12
    flops: float = 600e12
    memory: float = 130e9


@dataclass(frozen=True)
class Link:
    """One all-reduce takes latency_s + 2 (n - 1) / n * bytes / bytes_per_s."""

    latency_s: float
    bytes_per_s: float

    def all_reduce(self, num_bytes: float, size: int) -> float:
        return 0.0 if size == 1 else self.latency_s + 2 * (size - 1) / size * num_bytes / self.bytes_per_s


INSIDE_A_HOST = Link(12e-6, 350e9)
BETWEEN_HOSTS = Link(40e-6, 45e9)


def fitted(path: Path) -> Link:
    """Returns the link that explains the shortest and the longest measured all-reduce."""
    measured = json.loads(path.read_text())
    times = sorted(
        (one["bytes"], one["us"] * 1e-6) for one in measured["collectives"] if one["collective"] == "all_reduce"
    )
    (few, short), (many, long) = times[0], times[-1]
    share = 2 * (measured["ranks"] - 1) / measured["ranks"]
    rate = share * (many - few) / (long - short)
    return Link(max(0.0, short - share * few / rate), rate)


@dataclass(frozen=True)
class Load:
    """rows requests decode, each with `context` tokens before it. plan_s: handing a plan on."""

    rows: int
    context: int
    plan_s: float


def weights_on_a_rank(shape: Shape, size: int) -> float:
    num_mlps = shape.experts or 1
    return BYTES * (shape.layers * (shape.attention + num_mlps * shape.mlp) + 2 * shape.vocab * shape.hidden) / size


def step_s(shape: Shape, size: int, load: Load, links: tuple[Link, Link], gpu: Gpu) -> float:
    """Returns the seconds of a decode step of one group of `size` ranks. links: inside a host, between hosts."""
    used = 1.0
    if shape.experts:
        used = shape.experts * (1 - (1 - shape.per_token / shape.experts) ** load.rows)
    read = shape.layers * (shape.attention + used * shape.mlp) + shape.vocab * shape.hidden
    kv_share = max(1 / size, 1 / shape.kv_heads)
    pages = 2 * shape.layers * shape.kv_heads * shape.head_dim * load.context * load.rows * kv_share
    computed = shape.layers * (shape.attention + (shape.per_token or 1) * shape.mlp) + shape.vocab * shape.hidden
    memory = BYTES * (read / size + pages) / gpu.bytes_per_s
    arithmetic = 2 * computed * load.rows / size / gpu.flops
    link = links[0] if size <= GPUS_PER_HOST else links[1]
    reduces = (2 * shape.layers + 1) * link.all_reduce(BYTES * load.rows * shape.hidden, size)
    logits = 0.0 if size == 1 else BYTES * load.rows * shape.vocab / link.bytes_per_s
    return max(memory, arithmetic) + reduces + logits + (load.plan_s if size > 1 else 0.0)


def fits(shape: Shape, size: int, load: Load, gpu: Gpu) -> bool:
    kv_share = max(1 / size, 1 / shape.kv_heads)
    pages = BYTES * 2 * shape.layers * shape.kv_heads * shape.head_dim * load.context * load.rows * kv_share
    return weights_on_a_rank(shape, size) + pages <= gpu.memory


def predict(
    shape: Shape, gpus: int, load: Load, links: tuple[Link, Link], gpu: Gpu
) -> list[tuple[int, int, float, float]]:
    """Returns (ranks, replicas, ms per step, tokens per second of all replicas) for every way to use so many GPUs in
    groups that hold the model; each replica has load.rows requests."""
    ways = []
    for ranks in (size for size in GPUS if size <= min(gpus, shape.heads) and gpus % size == 0):
        if fits(shape, ranks, load, gpu):
            seconds = step_s(shape, ranks, load, links, gpu)
            ways.append((ranks, gpus // ranks, seconds * 1e3, gpus // ranks * load.rows / seconds))
    return ways


def main() -> int:
    parser = argparse.ArgumentParser(description="tokens per second on 1 to 64 GPUs, as a model says")
    parser.add_argument("--collectives", type=Path, help="of `inferflux bench dist --json`, in place of assumed links")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--plan-us", type=float, default=150.0, help="handing a plan on, see `inferflux bench dist`")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    link = fitted(args.collectives) if args.collectives else None
    links = (INSIDE_A_HOST, BETWEEN_HOSTS) if link is None else (link, link)
    load = Load(args.rows, args.context, args.plan_us * 1e-6)
    rows = [
        {"model": shape.name, "gpus": gpus, "ranks": ranks, "replicas": replicas,
         "ms_per_step": round(ms, 2), "tokens_per_s": round(rate)}
        for shape in SHAPES for gpus in GPUS for ranks, replicas, ms, rate in predict(shape, gpus, load, links, Gpu())
    ]  # fmt: skip
    if args.json:
        print(json.dumps(rows))
        return 0
    table = Table(title=f"{args.rows} rows per replica after {args.context} tokens")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
