"""Where a step's time goes on a CPU: each op's share, and how near the whole comes to what the machine can do.

    python -m benchmarks.op_shares --shapes S M --dtypes float32 bfloat16 --quantization none int8 int4

decode_1 and decode_32 generate for so many requests behind 128 tokens each, prefill computes one prompt of 1024. Beside
the shares stand the weights' bytes per second, with the machine's measured bandwidth, and the products' operations per
second (the output matrix counted for every token, though a prefill multiplies by it once). Results go to
benchmarks/results/op_shares.json unless --out says otherwise.
"""

import argparse
import dataclasses
import functools
import itertools
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console

from benchmarks import record
from benchmarks.shapes import SHAPES, VOCAB_SIZE, write_model
from inferflux import LLM, SamplingParams
from inferflux.engine.runner import build
from inferflux.kernels.bench.roofline import CPU_PROBE, TOY_PROBE, measure_roofline
from inferflux.kernels.kernel_set import KernelSet

NONE = "none"
FUNCTIONS = ("attention", "norm", "add_norm", "rope", "activation")
PRODUCTS = ("linear", "quantized_linear")
NUM_STEPS = 32
# Requests and prompt tokens of each workload; prefill generates nothing but the first token.
WORKLOADS = {"decode_1": (1, 128), "decode_32": (32, 128), "prefill": (1, 1024)}
# Of a weight; int4 with its 32nd of a scale.
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "fp8": 8, "int4": 5}


class Clock:
    """Seconds spent in each op since the last `clear`."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def timed(self, op: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def run(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                self.seconds[op] += time.perf_counter() - start

        return run

    def watch(self, kernels: KernelSet) -> KernelSet:
        ops: dict[str, Any] = {op: self.timed(op, getattr(kernels, op)) for op in FUNCTIONS}
        for op in PRODUCTS:
            module = getattr(kernels, op)
            ops[op] = SimpleNamespace(pack=module.pack, run=self.timed("products", module.run))
        return dataclasses.replace(kernels, **ops)


def measure(folder: Path, dtype: str, scheme: str, num_steps: int) -> dict[str, Any]:
    """Returns, per workload, milliseconds per step and each op's share of them."""
    clock, select = Clock(), build.select
    build.select = lambda *arguments, **options: clock.watch(select(*arguments, **options))
    try:
        llm = LLM(folder, dtype=dtype, quantization=None if scheme == NONE else scheme, max_model_len=2048)
    finally:
        build.select = select
    file_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    num_weights = file_bytes // (BITS[dtype] // 8)
    weight_bytes = num_weights * BITS[dtype if scheme == NONE else scheme] // 8
    return {name: _shares(llm, clock, name, num_steps, num_weights, weight_bytes) for name in WORKLOADS}


def _shares(
    llm: LLM, clock: Clock, workload: str, num_steps: int, num_weights: int, weight_bytes: int
) -> dict[str, Any]:
    num_requests, length = WORKLOADS[workload]
    rng = random.Random(0)
    prompts = [[rng.randrange(300, VOCAB_SIZE) for _ in range(length)] for _ in range(num_requests)]
    steps = 1 if workload == "prefill" else num_steps
    if workload != "prefill":  # so that the prompts are cached but for their last tokens
        llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True), progress=False)
    clock.seconds.clear()
    start = time.perf_counter()
    llm.generate(prompts, SamplingParams(max_tokens=steps, temperature=0, ignore_eos=True), progress=False)
    total = time.perf_counter() - start
    num_rows = length if workload == "prefill" else num_requests
    shares = {op: round(seconds / total, 3) for op, seconds in clock.seconds.most_common()}
    return {
        "ms_per_step": round(1e3 * total / steps, 2),
        "shares": {**shares, "the rest": round(1 - sum(shares.values()), 3)},
        "weights_gb_s": round(weight_bytes * steps / total / 1e9, 2),
        "products_gflop_s": round(2 * num_weights * num_rows * steps / clock.seconds["products"] / 1e9, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["S"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--quantization", nargs="+", choices=[NONE, "int8", "int4", "fp8"], default=[NONE])
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "inferflux-bench-models")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    probe = TOY_PROBE if arguments.shapes == ["toy"] else CPU_PROBE
    limits = measure_roofline(torch.device("cpu"), (torch.float32,), probe)
    results: dict[str, Any] = {
        "machine": {
            "read_gb_s": round(limits.bytes_per_s / 1e9, 1),
            "float32_gflop_s": round(limits.flops_per_s[torch.float32] / 1e9, 1),
        }
    }
    for shape, dtype in itertools.product(arguments.shapes, arguments.dtypes):
        folder = write_model(arguments.cache / f"{shape}-{dtype}", SHAPES[shape], getattr(torch, dtype))
        for scheme in arguments.quantization:
            name = f"{shape} {dtype if scheme == NONE else scheme + ' ' + dtype}"
            results[name] = measure(folder, dtype, scheme, arguments.steps)
            Console().print(name, results[name])
    print(record.write("op_shares", results, arguments.out))


if __name__ == "__main__":
    main()
