"""Every kernel against the reference on the device, and collectives through NCCL in a group of one."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, Final, NamedTuple

import torch

from benchmarks.gpu.models import make_loop
from benchmarks.ports import free_port
from benchmarks.workloads import Job
from inferflux.config.tree import DistributedConfig
from inferflux.dist.check import problems
from inferflux.dist.context import ParallelContext
from inferflux.dist.launch import launch, leave
from inferflux.kernels.backends import KV_OPS, OPS, find_backend
from inferflux.kernels.bench.roofline import synchronize
from inferflux.kernels.cases import cases_of
from inferflux.kernels.check import check_case, dtypes_of
from inferflux.kernels.dtypes import dtype_name

# Of an op's cases, by one process: attention has some 60, of which each takes seconds to compile in float32.
CASES_AT_ONCE: Final = 5
# Each takes half a GB of the device.
MOST_PROCESSES: Final = 16
MOST_PROBLEMS: Final = 20


class _Part(NamedTuple):
    """Some of an op's cases, from the number `first` on. quantized: with pages of 8 bits."""

    op: str
    dtype: torch.dtype
    quantized: bool
    first: int

    @property
    def name(self) -> str:
        return f"{self.op} {dtype_name(self.dtype)}{', 8-bit pages' if self.quantized else ''}"


def kernels(device: torch.device, toy: bool) -> Iterator[tuple[str, Any]]:
    """Checks some cases at a time in processes side by side, since most of the time goes into compiling. Yields what is
    known of an op whenever that is more than before: `cases` of `of`."""
    parts = [_Part("norm", torch.float32, False, 0)] if toy else _parts()
    found: dict[str, dict[str, Any]] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(MOST_PROCESSES, os.cpu_count() or 1), mp_context=spawn) as pool:
        futures = {pool.submit(_check, part, str(device)): part for part in parts}
        for future in as_completed(futures):
            part = futures[future]
            try:
                figures = future.result()
            except Exception as error:
                figures = {"ok": False, "cases": 0, "problems": [f"{type(error).__name__}: {error}"[:500]]}
            found[part.name] = _joined(
                found.get(part.name), figures, len(cases_of(part.op, quantized_kv=part.quantized))
            )
            yield part.name, found[part.name]


def _parts() -> list[_Part]:
    """Attention first, which takes longest to compile."""
    return [
        _Part(op, dtype, quantized, first)
        for op in OPS
        for dtype in dtypes_of(op)
        for quantized in ((False, True) if op in KV_OPS else (False,))
        for first in range(0, len(cases_of(op, quantized_kv=quantized)), CASES_AT_ONCE)
    ]


def _joined(earlier: dict[str, Any] | None, figures: dict[str, Any], num_cases: int) -> dict[str, Any]:
    """Returns what is known of an op's cases, which are so many in all."""
    both = [each for each in (earlier, figures) if each is not None]
    errors = [each["largest_error"] for each in both if each.get("largest_error") is not None]
    return {
        "ok": all(each["ok"] for each in both),
        "backend": next((each["backend"] for each in both if each.get("backend")), None),
        "cases": sum(each["cases"] for each in both),
        "of": num_cases,
        "largest_error": max(errors, default=None),
        "problems": [problem for each in both for problem in each["problems"]][:MOST_PROBLEMS],
    }


def _check(part: _Part, device: str) -> dict[str, Any]:
    # float32 means float32 to the rivals too.
    torch.backends.cuda.matmul.allow_tf32 = False
    on = torch.device(device)
    backend = find_backend("triton" if on.type == "cuda" else "torch")
    if backend.refusal(part.op, on, part.dtype) is not None:
        backend = find_backend("torch")
    # After an illegal access this process can compute nothing more; that is not these cases' fault.
    synchronize(on)
    cases = cases_of(part.op, quantized_kv=part.quantized)[part.first : part.first + CASES_AT_ONCE]
    results = [check_case(backend.find(part.op), case, part.dtype, on) for case in cases]
    return {
        "ok": all(result.ok for result in results),
        "backend": backend.name,
        "cases": len(results),
        "largest_error": max((each.error for each in results if each.error != float("inf")), default=None),
        "problems": [f"{result.case}: {result.problem}" for result in results if not result.ok],
    }


def collectives(device: torch.device, toy: bool) -> Iterator[tuple[str, Any]]:
    """World size 1 through the path that several ranks take."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    start = time.perf_counter()
    context = launch(DistributedConfig(rank=0, world_size=1, backend=backend, master_port=free_port()), device)
    yield "group", {"ok": True, "backend": backend, "seconds": time.perf_counter() - start}
    wrong = list(problems(context))
    yield "results, in a CUDA graph too" if device.type == "cuda" else "results", {"ok": not wrong, "wrong": wrong}
    yield "a model in the group", _beside_one_process(context, toy)
    leave(context)


def _beside_one_process(context: ParallelContext, toy: bool) -> dict[str, Any]:
    """A model whose steps hold the group's collectives, recorded as CUDA graphs, and the same model without a group."""
    name = "toy" if toy else "qwen3-0.6b"
    alone = ParallelContext(rank=0, size=1, device=context.device)
    jobs = [Job([1 + index] * (20 + 9 * index), 32) for index in range(4)]
    said, seconds, recorded = [], [], []
    for each in (alone, context):
        torch.manual_seed(0)
        loop = make_loop(name, each, num_pages=64, max_model_len=256, max_batch_size=4)
        loop.run(jobs)
        said.append(loop.said)
        seconds.append(loop.run(jobs))
        recorded.append(loop.runner.has_recordings)
        # Before the group is left whose collectives the graphs hold.
        loop.runner.close()
    return {
        "ok": said[0] == said[1] and (all(recorded) or context.device.type == "cpu"),
        "same_tokens": said[0] == said[1],
        "recorded": recorded,
        "seconds_alone_and_in_group": seconds,
    }
