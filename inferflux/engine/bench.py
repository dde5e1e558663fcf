"""`inferflux bench step`: what one engine step costs in Python, with a model that costs nothing.

The scheduler, the input builder, the sampler's bookkeeping and the outputs run as they always do; the decoder returns
ready-made logits of a tiny vocabulary. What is left is the overhead that every step of every model pays.
"""

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from inferflux.command_line import positive
from inferflux.config import FairnessConfig, SchedulerConfig
from inferflux.dist.context import ParallelContext
from inferflux.engine import bench_dist
from inferflux.engine.kv.manager import KVManager
from inferflux.engine.layers.lora import StepAdapters
from inferflux.engine.request import Request
from inferflux.engine.runner.runner import Runner
from inferflux.engine.scheduler.scheduler import Scheduler
from inferflux.kernels.kernel_set import select
from inferflux.kernels.metadata import AttentionMetadata
from inferflux.sampling_params import SamplingParams

PAGE_TOKENS = 16
VOCAB_SIZE = 256
PHASES = ("schedule", "run", "update")


@dataclass(frozen=True)
class NullSpec:
    """All that the runner reads of a model's description."""

    vocab_size: int = VOCAB_SIZE


class NullDecoder:
    """Returns the same logits whatever it is given, of num_rows positions at most."""

    def __init__(self, num_rows: int) -> None:
        self.spec = NullSpec()
        self.context = ParallelContext(0, 1, torch.device("cpu"))
        self._logits = torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))

    def hidden_states(
        self,
        token_ids: torch.Tensor,
        metadata: AttentionMetadata,
        kv_pool: torch.Tensor,
        indices: torch.Tensor,
        adapters: StepAdapters | None = None,
    ) -> torch.Tensor:
        return self._logits[: indices.shape[0]]

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return hidden


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="step|dist")
    step = actions.add_parser("step", help="Python overhead of one engine step, outside the kernels")
    step.add_argument("--rows", type=positive, default=32, help="concurrently decoding requests (default 32)")
    step.add_argument("--steps", type=positive, default=300, help="steps to measure (default 300)")
    step.add_argument("--prompt-tokens", type=positive, default=128, help="length of each prompt (default 128)")
    step.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    step.add_argument("--json", action="store_true", help="print JSON")
    step.set_defaults(run=_run_step)
    dist = actions.add_parser("dist", help="cost of sending plans between ranks, and of collectives")
    bench_dist.add_arguments(dist)
    dist.set_defaults(run=bench_dist.run)


def run(args: argparse.Namespace) -> int:
    code: int = args.run(args)
    return code


def _run_step(args: argparse.Namespace) -> int:
    params = SamplingParams(max_tokens=args.steps + 50, temperature=args.temperature, ignore_eos=True)
    times = measure_step(args.rows, args.steps, args.prompt_tokens, params)
    results = {
        name: {"p50_us": round(statistics.median(values) * 1e6, 1), "max_us": round(max(values) * 1e6, 1)}
        for name, values in times.items()
    }
    if args.json:
        print(json.dumps({"rows": args.rows, "steps": args.steps, "phases": results}))
        return 0
    table = Table(title=f"one step of {args.rows} decoding rows, kernels excluded")
    for column in ("phase", "median µs", "max µs"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for name, figures in results.items():
        table.add_row(name, str(figures["p50_us"]), str(figures["max_us"]))
    Console().print(table)
    return 0


def measure_step(num_rows: int, num_steps: int, num_prompt: int, params: SamplingParams) -> dict[str, list[float]]:
    """Returns seconds per measured step, by phase and in total, once all rows decode."""
    scheduler, runner = _build(num_rows, num_prompt + num_steps + 100)
    rng = random.Random(0)
    for index in range(num_rows):
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(num_prompt)]
        total = num_prompt + (params.max_tokens or num_steps)
        scheduler.add(Request(index, prompt, params, seed=index, max_total_tokens=total, salt=bytes([index % 256])))
    while scheduler.stats().waiting or scheduler.stats().generation_tokens < 10 * num_rows:
        _step(scheduler, runner)
    samples = [_step(scheduler, runner) for _ in range(num_steps)]
    times = {name: [sample[index] for sample in samples] for index, name in enumerate(PHASES)}
    times["total"] = [sum(sample) for sample in samples]
    return times


def _build(num_rows: int, num_tokens: int) -> tuple[Scheduler, Runner]:
    max_pages = -(-num_tokens // PAGE_TOKENS) + 1
    kv = KVManager(num_rows * max_pages, PAGE_TOKENS, fingerprint=b"bench", prefix_cache=True)
    config = SchedulerConfig(max_batch_size=num_rows, max_batch_tokens=max(2048, num_rows))
    pool = torch.zeros(1, 1, 2, PAGE_TOKENS, 1, 1)
    kernels = select(torch.device("cpu"), torch.float32)
    # A step looks at a position of each row that samples, and at all of prompts' chunks.
    decoder = NullDecoder(num_rows + config.max_batch_tokens)
    runner = Runner(decoder, kernels, pool, max_batch_size=num_rows, max_pages_per_row=max_pages)
    return Scheduler(config, FairnessConfig(), kv, clock=time.monotonic), runner


def _step(scheduler: Scheduler, runner: Runner) -> tuple[float, float, float]:
    start = time.perf_counter()
    plan = scheduler.schedule()
    assert plan is not None
    scheduled = time.perf_counter()
    output = runner.execute(plan)
    computed = time.perf_counter()
    scheduler.update(plan, output)
    return scheduled - start, computed - scheduled, time.perf_counter() - computed
