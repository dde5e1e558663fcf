"""Every kernel against the reference on the device, and collectives through NCCL in a group of one."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from benchmarks.gpu.models import make_loop
from benchmarks.ports import free_port
from benchmarks.workloads import Job
from inferflux.config.tree import DistributedConfig
from inferflux.dist.check import problems
from inferflux.dist.context import ParallelContext
from inferflux.dist.launch import launch, leave
from inferflux.kernels.backends import KV_OPS, OPS, find_backend
from inferflux.kernels.check import check_op, dtypes_of


def kernels(device: torch.device, toy: bool) -> Iterator[tuple[str, Any]]:
    """Checks in processes side by side: most of the time goes into compiling."""
    tasks = [(op, dtype, False) for op in OPS for dtype in dtypes_of(op)]
    tasks += [(op, dtype, True) for op in sorted(KV_OPS) for dtype in dtypes_of(op)]
    if toy:
        tasks = [("norm", torch.float32, False)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), mp_context=spawn) as pool:
        futures = {
            pool.submit(_check, op, str(dtype), str(device), narrow): (op, dtype, narrow) for op, dtype, narrow in tasks
        }
        for future in as_completed(futures):
            op, dtype, narrow = futures[future]
            try:
                figures = future.result()
            except Exception as error:
                figures = {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
            yield f"{op} {str(dtype).removeprefix('torch.')}{', 8-bit pages' if narrow else ''}", figures


def _check(op: str, dtype: str, device: str, narrow: bool) -> dict[str, Any]:
    """narrow: with pages of 8 bits."""
    # float32 means float32 to the rivals too.
    torch.backends.cuda.matmul.allow_tf32 = False
    name = "triton" if device.startswith("cuda") else "torch"
    backend = find_backend(name)
    kind = getattr(torch, dtype.removeprefix("torch."))
    if backend.refusal(op, torch.device(device), kind) is not None:
        backend = find_backend("torch")
    results = list(check_op(backend.find(op), op, kind, torch.device(device), narrow_kv=narrow))
    problems = [f"{result.case}: {result.problem}" for result in results if not result.ok]
    finite = [result.error for result in results if result.error != float("inf")]
    return {
        "ok": not problems,
        "backend": backend.name,
        "cases": len(results),
        "largest_error": max(finite, default=None),
        "problems": problems[:20],
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
