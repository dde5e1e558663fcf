"""Offline throughput: InferFlux beside transformers' `generate`, on the same random weights, in one run, in turns.

    python -m benchmarks.offline --shapes S M --dtypes float32 bfloat16 --rounds 2
    python -m benchmarks.offline --shapes S M --quantization none int8 int4

Each (system, shape, dtype, quantization) runs in a process of its own, so that memory figures are its own; transformers
runs without quantization only. A system too slow for the time limit is recorded as such. Results go to
benchmarks/results/offline.json unless --out says otherwise.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.children import exits_by_exception
from benchmarks.shapes import SHAPES, write_model
from benchmarks.workloads import WORKLOADS, Job
from inferflux.kernels.cases.quantized import SCHEMES

# Runs jobs to their end; returns (seconds to the first token of the first job, seconds in all).
Run = Callable[[list[Job]], tuple[float, float]]

NONE = "none"
STATIC_BATCH = 8  # rows per padded batch of `generate`; larger ones pad more than they gain here


def inferflux(folder: Path, dtype: str, quantization: str | None = None) -> Run:
    from inferflux import LLM, SamplingParams

    llm = LLM(folder, dtype=dtype, quantization=quantization, max_model_len=2048)

    def run(jobs: list[Job]) -> tuple[float, float]:
        params = [SamplingParams(max_tokens=job.num_output, temperature=0, ignore_eos=True) for job in jobs]
        start = time.perf_counter()
        if len(jobs) == 1:
            stream = llm.stream(jobs[0].prompt, params[0])
            next(stream)
            first = time.perf_counter() - start
            count = 1 + sum(len(delta.token_ids) for delta in stream)
            assert count == jobs[0].num_output
            return first, time.perf_counter() - start
        outputs = llm.generate([job.prompt for job in jobs], params, progress=False)
        assert all(len(out.token_ids) == job.num_output for out, job in zip(outputs, jobs, strict=True))
        return 0.0, time.perf_counter() - start

    return run


def transformers(folder: Path, dtype: str, quantization: str | None = None) -> Run:
    from transformers import AutoModelForCausalLM

    assert quantization is None, "the yardstick is the float model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def generate(jobs: list[Job], num_output: int) -> None:
        longest = max(len(job.prompt) for job in jobs)
        ids = torch.tensor([[0] * (longest - len(job.prompt)) + job.prompt for job in jobs])
        mask = torch.tensor([[0] * (longest - len(job.prompt)) + [1] * len(job.prompt) for job in jobs])
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=num_output,
            min_new_tokens=num_output,
            do_sample=False,
            pad_token_id=0,
        )

    def run(jobs: list[Job]) -> tuple[float, float]:
        start = time.perf_counter()
        first = 0.0
        if len(jobs) == 1:
            generate(jobs, 1)
            first = time.perf_counter() - start
            start = time.perf_counter()
        ordered = sorted(jobs, key=lambda job: len(job.prompt))
        for index in range(0, len(jobs), STATIC_BATCH):
            group = ordered[index : index + STATIC_BATCH]
            generate(group, max(job.num_output for job in group))
        return first, time.perf_counter() - start

    return run


SYSTEMS: dict[str, Callable[[Path, str, str | None], Run]] = {"inferflux": inferflux, "transformers": transformers}


def measure(run: Run, workload: str, seed: int) -> dict[str, float]:
    """Runs one workload once and returns its figures (tokens per second, seconds)."""
    jobs = WORKLOADS[workload](seed)
    first, total = run(jobs)
    outputs = sum(job.num_output for job in jobs)
    if workload == "single":
        return {"ttft_s": first, "decode_tok_s": (outputs - 1) / (total - first)}
    if workload == "prefill":
        return {"prefill_tok_s": len(jobs[0].prompt) / first}
    if workload == "prefix":
        return {"cold_s": total, "warm_s": run(jobs)[1]}
    return {"output_tok_s": outputs / total}


def child(arguments: argparse.Namespace) -> None:
    """Loads one system and prints one JSON line per workload and round."""
    start = time.perf_counter()
    (scheme,) = arguments.quantization
    run = SYSTEMS[arguments.child](Path(arguments.folder), arguments.dtypes[0], None if scheme == NONE else scheme)
    print(json.dumps({"workload": "load", "load_s": time.perf_counter() - start}), flush=True)
    measure(run, "single", seed=999)
    for seed in range(arguments.rounds):
        for workload in arguments.workloads:
            print(json.dumps({"workload": workload, **measure(run, workload, seed)}), flush=True)
    print(json.dumps({"workload": "memory", "peak_rss_mb": peak_rss_mb()}), flush=True)


def peak_rss_mb() -> float:
    """This program's own peak; `ru_maxrss` begins with that of the process which started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


def run_child(
    system: str, folder: Path, dtype: str, arguments: argparse.Namespace, scheme: str = NONE
) -> dict[str, list[float]]:
    """Returns figure name → one value per round; `timeout` when the time limit cut it off."""
    command = [sys.executable, "-m", "benchmarks.offline", "--child", system, "--folder", str(folder)]
    command += ["--dtypes", dtype, "--quantization", scheme]
    command += ["--rounds", str(arguments.rounds), "--workloads", *arguments.workloads]
    figures: dict[str, list[float]] = {}
    try:
        with exits_by_exception():
            done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.limit_s, check=False)
        output, failed = done.stdout, done.returncode != 0
        if failed:
            print(done.stderr[-2000:], file=sys.stderr)
    except subprocess.TimeoutExpired as expired:
        output, failed = (expired.stdout or b"").decode(), True
    for line in output.splitlines():
        values: dict[str, Any] = json.loads(line)
        workload = values.pop("workload")
        for name, value in values.items():
            figures.setdefault(f"{workload}.{name}", []).append(round(value, 4))
    if failed:
        figures["timeout"] = [arguments.limit_s]
    return figures


def show(results: dict[str, dict[str, dict[str, list[float]]]]) -> None:
    for shape, runs in results.items():
        names = sorted({name for figures in runs.values() for name in figures})
        table = Table(title=f"shape {shape}: best of rounds", show_lines=False)
        table.add_column("figure")
        for system in runs:
            table.add_column(system, justify="right")
        for name in names:
            best = min if name.endswith("_s") and "tok_s" not in name else max
            table.add_row(name, *(f"{best(f[name]):.4g}" if name in f else "-" for f in runs.values()))
        Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["S"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--quantization", nargs="+", choices=[NONE, *SCHEMES], default=[NONE])
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=900.0, help="per system, shape and dtype")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "inferflux-bench-models")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=list(SYSTEMS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    results: dict[str, dict[str, dict[str, list[float]]]] = {}
    for shape in arguments.shapes:
        results[shape] = {}
        for dtype in arguments.dtypes:
            folder = write_model(arguments.cache / f"{shape}-{dtype}", SHAPES[shape], getattr(torch, dtype))
            for scheme, system in itertools.product(arguments.quantization, arguments.systems):
                if scheme == NONE or system == "inferflux":
                    name = f"{system} {dtype}" if scheme == NONE else f"{system} {scheme} {dtype}"
                    results[shape][name] = run_child(system, folder, dtype, arguments, scheme)
                    show({shape: results[shape]})
    print(record.write("offline", results, arguments.out))


if __name__ == "__main__":
    main()
