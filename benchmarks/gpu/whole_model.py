"""Whole models on the GPU: decode at batch 1 beside the time of reading the weights, and many requests at once."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, Final
from unittest.mock import patch

import torch

from benchmarks.gpu.models import Loop, config_of, make_loop, weight_bytes
from benchmarks.workloads import Job
from inferflux.dist.context import ParallelContext
from inferflux.kernels.bench.roofline import CUDA_PROBE, TOY_PROBE, measure_roofline

PROMPT: Final = list(range(2, 130))


def decode(device: torch.device, toy: bool) -> Iterator[tuple[str, Any]]:
    """Llama-3-8B's shape at batch 1: tokens per second, and the share of the weight-bandwidth roofline.

    With CUDA graphs and without, and with the sizes of Triton's kernels as they are shipped, all in turns.
    """
    context = ParallelContext(rank=0, size=1, device=device)
    name, num_output = ("toy", 8) if toy else ("llama-3-8b", 256)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    copy = measure_roofline(device, (dtype,), TOY_PROBE if toy else CUDA_PROBE).bytes_per_s
    loops = {}
    for way, graphs, sizes in (
        ("graphs on", True, nullcontext),
        ("graphs on, shipped sizes", True, shipped_sizes),
        ("graphs off", False, nullcontext),
    ):
        with sizes():
            loops[way] = make_loop(name, context, num_pages=256, max_model_len=2048, max_batch_size=4, graphs=graphs)
            loops[way].run([Job(PROMPT, 8)])
    times: dict[str, list[float]] = {way: [] for way in loops}
    for _ in range(3):
        for way, loop in loops.items():
            times[way].append(_seconds_per_token(loop, num_output))
    for way, loop in loops.items():
        num_bytes, seconds = weight_bytes(loop.decoder, dtype), min(times[way])
        yield (
            way,
            {
                "recorded": loop.runner.has_recordings,
                "tokens_per_s": 1 / seconds,
                "ms_per_token": seconds * 1e3,
                "weight_gb": num_bytes / 1e9,
                "copy_gb_per_s": copy / 1e9,
                "share_of_roofline": num_bytes / copy / seconds,
            },
        )


@contextmanager
def shipped_sizes() -> Iterator[None]:
    """What is chosen and recorded inside has the sizes that the package ships, whatever was measured here."""
    if find_spec("triton") is None:  # a dry run
        yield
        return
    from inferflux.kernels.triton import tuning

    with patch.object(tuning, "sizes_on", lambda device: tuning.SHIPPED):
        yield


def _seconds_per_token(loop: Loop, num_output: int) -> float:
    """The difference of a long and a short answer to one prompt: what prefill takes cancels out."""
    return (loop.run([Job(PROMPT, 8 + num_output)]) - loop.run([Job(PROMPT, 8)])) / num_output


def jobs_of(num_requests: int, vocab_size: int, longest: int) -> list[Job]:
    """The nano-vllm workload: 100 to 1024 tokens in, 100 to 1024 out."""
    rng = random.Random(0)
    low = min(100, longest // 2)
    return [
        Job([rng.randrange(2, vocab_size) for _ in range(rng.randint(low, longest))], rng.randint(low, longest))
        for _ in range(num_requests)
    ]


def workload(device: torch.device, toy: bool) -> Iterator[tuple[str, Any]]:
    """256 requests, Qwen3-0.6B's shape, random weights: output tokens per second; and a quarter of them, as `rival`."""
    name, num_requests, longest = ("toy", 4, 20) if toy else ("qwen3-0.6b", 256, 1024)
    context = ParallelContext(rank=0, size=1, device=device)
    num_pages = num_requests * (2 * longest // 16 + 1)
    loop = make_loop(name, context, num_pages=num_pages, max_model_len=4096, max_batch_size=num_requests)
    vocab_size = config_of(name)["vocab_size"]
    loop.run(jobs_of(4, vocab_size, min(longest, 64)))
    for count in (num_requests, num_requests // 4):
        jobs = jobs_of(num_requests, vocab_size, longest)[:count]
        seconds = loop.run(jobs)
        outputs = sum(job.num_output for job in jobs)
        figures = {"seconds": seconds, "output_tokens": outputs, "output_tokens_per_s": outputs / seconds}
        yield f"inferflux, {count} requests", figures


def rival(device: torch.device, toy: bool) -> Iterator[tuple[str, Any]]:
    """A quarter of the same requests by transformers' continuous batching: all of them would take it minutes."""
    if device.type == "cpu":
        yield "transformers", {"skipped": "its continuous batching needs a GPU"}
        return
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    name, num_requests, longest = ("toy", 4, 20) if toy else ("qwen3-0.6b", 256, 1024)
    config = AutoConfig.for_model(**{key: value for key, value in config_of(name).items() if key != "torch_dtype"})
    config.pad_token_id = 1
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    settings = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=1, max_new_tokens=longest)
    jobs = jobs_of(num_requests, config.vocab_size, longest)[: num_requests // 4]
    manager = model.init_continuous_batching(generation_config=settings)
    manager.start()
    start = time.perf_counter()
    for index, job in enumerate(jobs):
        manager.add_request(job.prompt, request_id=str(index), max_new_tokens=job.num_output)
    outputs = sum(_finished(manager) for _ in jobs)
    seconds = time.perf_counter() - start
    figures = {"seconds": seconds, "output_tokens": outputs, "output_tokens_per_s": outputs / seconds}
    yield f"transformers, {len(jobs)} requests", figures
    manager.stop(block=True)


def _finished(manager: Any) -> int:
    """Waits for the next request to finish; returns how many tokens it has."""
    while True:
        result = manager.get_result(timeout=60)
        if result is None:
            raise TimeoutError("no result for a minute")
        if result.is_finished():
            return len(result.generated_tokens)
