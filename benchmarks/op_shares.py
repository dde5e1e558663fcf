"""Where a step's time goes on a CPU: each op's share, and how near the whole comes to what the machine can do.

    python -m benchmarks.op_shares --shapes S M --dtypes float32 bfloat16 --quantization none int8 int4

decode_1 and decode_32 generate for so many requests behind 128 tokens each, prefill computes one prompt of 1024. Ops
are timed one by one in other runs than the whole, those of a decode step by the library on its tape if it has one, so
that the rest is what Python does around the layers. Beside the shares stand the weights' bytes per second, with the
machine's measured bandwidth, and the products' operations per second (the output matrix counted for every token, though
a prefill multiplies by it once). Results go to benchmarks/results/op_shares.json unless --out says otherwise.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console

from benchmarks import record
from benchmarks.shapes import SHAPES, VOCAB_SIZE, write_model
from inferflux import LLM, SamplingParams
from inferflux.engine.models.decoder import Decoder
from inferflux.engine.runner import build_decoder
from inferflux.kernels.bench.roofline import CPU_PROBE, TOY_PROBE, measure_roofline
from inferflux.kernels.kernel_set import KernelSet
from inferflux.kernels.native import calls
from inferflux.kernels.native.tape import Tape

NONE = "none"
FUNCTIONS = ("attention", "norm", "add_norm", "rope", "activation")
PRODUCTS = ("linear", "quantized_linear")
# The library's functions by their numbers on a tape.
ON_TAPE = {
    calls.NORM.number: "norms",
    calls.ROPE.number: "rope",
    calls.GATE.number: "activation",
    calls.ATTENTION.number: "attention",
    calls.PRODUCT.number: "products",
    calls.COPY.number: "norms",
}
WHOLE = "whole"
# What adding up a tape's times takes, which is no part of a step.
NOTING = "noting"
NUM_STEPS = 32
# Requests and prompt tokens of each workload; prefill generates nothing but the first token.
WORKLOADS = {"decode_1": (1, 128), "decode_32": (32, 128), "prefill": (1, 1024)}
# The least of so many turns counts.
TURNS = 3
# Of a weight; int4 with its 32nd of a scale.
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "fp8": 8, "int4": 5}


class Stopwatch:
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
        """Ops that are timed, and called one by one: a tape holds none but the library's own."""
        ops: dict[str, Any] = {
            op: self.timed("norms" if "norm" in op else op, getattr(kernels, op)) for op in FUNCTIONS
        }
        for op in PRODUCTS:
            module = getattr(kernels, op)
            ops[op] = SimpleNamespace(pack=module.pack, run=self.timed("products", module.run))
        return dataclasses.replace(kernels, **ops)

    def play(self, tape: Tape, arena: torch.Tensor) -> None:
        """Makes a tape's calls, which the library times."""
        timed = tape.play_timed(arena)
        start = time.perf_counter()
        for number, seconds in timed:
            self.seconds[ON_TAPE[number]] += seconds
        self.seconds[NOTING] += time.perf_counter() - start


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@dataclasses.dataclass
class Subject:
    """One model in two engines: as it is used, and with every op watched, which keeps it off the tapes."""

    plain: LLM
    watched: LLM
    watch: Stopwatch


def load(folder: Path, dtype: str, scheme: str) -> Subject:
    watch, select = Stopwatch(), build_decoder.select
    make = functools.partial(
        LLM, folder, dtype=dtype, quantization=None if scheme == NONE else scheme, max_model_len=2048
    )
    plain = make()
    with patched(build_decoder, "select", lambda *arguments, **options: watch.watch(select(*arguments, **options))):
        return Subject(plain, make(), watch)


def prefill(subject: Subject, length: int) -> tuple[float, Counter[str]]:
    """Returns the seconds of a prompt, and those of its ops with the whole of the run in which they were timed."""
    # Of other seeds than the decoded prompts, whose beginnings are cached.
    seconds = min(generate(subject.plain, prompts_of(1, length, 1 + turn), 1) for turn in range(TURNS))
    subject.watch.seconds.clear()
    whole = generate(subject.watched, prompts_of(1, length, 1), 1)
    return seconds, Counter({**subject.watch.seconds, WHOLE: whole})


def decode(subject: Subject, num_requests: int, length: int, num_steps: int) -> tuple[float, Counter[str]]:
    """Returns the same of a step behind prompts that are cached."""
    prompts, watch = prompts_of(num_requests, length, 0), subject.watch

    def spent(llm: LLM, num_tokens: int) -> Counter[str]:
        watch.seconds.clear()
        whole = generate(llm, prompts, num_tokens)
        return Counter({**watch.seconds, WHOLE: whole})

    def steps(llm: LLM) -> Counter[str]:
        """What num_steps more steps take, over num_steps."""
        turns = [spent(llm, 1) for _ in range(TURNS)]
        longer = spent(llm, 1 + num_steps)
        return Counter({op: (longer[op] - min(turn[op] for turn in turns)) / num_steps for op in longer})

    for llm in (subject.plain, subject.watched):
        generate(llm, prompts, 1 + num_steps)
    short, long = (min(generate(subject.plain, prompts, n) for _ in range(TURNS)) for n in (1, 1 + num_steps))
    with patched(Tape, "play", lambda tape, arena: watch.play(tape, arena)), _watched_logits(watch):
        ops = steps(subject.plain)
    if "attention" not in ops:  # there is no tape
        ops = steps(subject.watched)
    return (long - short) / num_steps, ops


def _watched_logits(watch: Stopwatch) -> contextlib.AbstractContextManager[None]:
    return patched(Decoder, "logits", watch.timed("products", Decoder.logits))


def prompts_of(num_requests: int, length: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(300, VOCAB_SIZE) for _ in range(length)] for _ in range(num_requests)]


def generate(llm: LLM, prompts: list[list[int]], num_tokens: int) -> float:
    """Returns the seconds it takes."""
    start = time.perf_counter()
    llm.generate(prompts, SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True), progress=False)
    return time.perf_counter() - start


def measure(folder: Path, dtype: str, scheme: str, num_steps: int) -> dict[str, Any]:
    """Returns, per workload, milliseconds per step and each op's share of them."""
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    num_weights = num_bytes // (BITS[dtype] // 8)
    weight_bytes = num_weights * BITS[dtype if scheme == NONE else scheme] // 8
    subject, results = load(folder, dtype, scheme), {}
    for name, (num_requests, length) in WORKLOADS.items():
        if name == "prefill":
            (seconds, ops), num_rows = prefill(subject, length), length
        else:
            (seconds, ops), num_rows = decode(subject, num_requests, length, num_steps), num_requests
        whole = ops.pop(WHOLE) - ops.pop(NOTING, 0.0)
        shares = {op: round(spent / whole, 3) for op, spent in ops.most_common()}
        results[name] = {
            "ms_per_step": round(1e3 * seconds, 2),
            "shares": {**shares, "the rest": round(1 - sum(shares.values()), 3)},
            "weights_gb_s": round(weight_bytes / seconds / 1e9, 2),
            "products_gflop_s": round(2 * num_weights * num_rows / ops["products"] / 1e9, 1),
        }
    return results


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
