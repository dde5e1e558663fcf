"""Models of published sizes with random weights, made on the device; and the loop that drives them.

Nothing is read from or written to a disk but a config.json.
"""

import json
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.workloads import Job
from inferflux.config import FairnessConfig, SchedulerConfig
from inferflux.dist.channel import Channel
from inferflux.dist.context import ParallelContext
from inferflux.engine.kv.manager import KVManager
from inferflux.engine.kv.store.device import PageShape, allocate_pool
from inferflux.engine.models.decoder import Decoder
from inferflux.engine.models.load import build_decoder
from inferflux.engine.models.spec import read_spec, with_max_model_len
from inferflux.engine.request import Request
from inferflux.engine.runner.runner import Runner
from inferflux.engine.scheduler.scheduler import Scheduler
from inferflux.engine.weights.loader import WeightLoader
from inferflux.engine.weights.source import Weight
from inferflux.kernels.kernel_set import KernelSet, select
from inferflux.sampling_params import SamplingParams

PAGE_TOKENS = 16

# As in the models' own config.json; toy: for a dry run.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336,
        "vocab_size": 128256, "rope_theta": 500000.0, "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
        "vocab_size": 151936, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    },
    "toy": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96,
        "vocab_size": 500, "rope_theta": 10000.0, "tie_word_embeddings": True,
    },
}  # fmt: skip
COMMON = {
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False,
    "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16",
}  # fmt: skip


def config_of(name: str) -> dict[str, Any]:
    return {**COMMON, **CONFIGS[name]}


class RandomWeights(WeightLoader):
    """Gives every weight at once and at random; norms are ones."""

    def __init__(self, context: ParallelContext, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.device = context.device
        self._context = context

    def load(self, weight: Weight, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = torch.empty(self.shape(weight), dtype=dtype or self.dtype, device=self.device)
        return values.fill_(1.0) if values.dim() == 1 else values.normal_(std=values.shape[1] ** -0.5)


@dataclass
class Loop:
    """A scheduler and a runner, stepped as the engine steps them: one step ahead of the results.

    said: what each job of the last run was answered.
    """

    decoder: Decoder
    kernels: KernelSet
    runner: Runner
    scheduler: Scheduler
    max_in_flight: int
    said: dict[int, list[int]] = field(default_factory=dict)

    def run(self, jobs: list[Job]) -> float:
        """Runs jobs greedily to their full lengths; returns the seconds taken."""
        self.said = {index: [] for index in range(len(jobs))}
        for index, job in enumerate(jobs):
            params = SamplingParams(max_tokens=job.num_output, temperature=0.0, ignore_eos=True)
            total = len(job.prompt) + job.num_output
            self.scheduler.add(Request(index, job.prompt, params, seed=index, max_total_tokens=total))
        flights: deque[Any] = deque()
        start = time.perf_counter()
        while self.scheduler.has_work or flights:
            plan = self.scheduler.schedule()
            if plan is not None:
                flights.append((plan, self.runner.launch(plan)))
            if flights and (plan is None or len(flights) >= self.max_in_flight):
                plan, launched = flights.popleft()
                for output in self.scheduler.update(plan, launched.result()):
                    self.said[output.request_id] += output.token_ids
        return time.perf_counter() - start


def make_loop(
    name: str, context: ParallelContext, *, num_pages: int, max_model_len: int, max_batch_size: int, graphs: bool = True
) -> Loop:
    device = context.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_of(name)))
        spec = with_max_model_len(read_spec(Path(folder)), max_model_len)
    kernels = select(device, dtype)
    decoder = build_decoder(spec, RandomWeights(context, dtype), kernels, context)
    page = PageShape(spec.num_layers, PAGE_TOKENS, spec.num_kv_heads, spec.head_dim, dtype)
    pages_per_row = -(-max_model_len // PAGE_TOKENS)
    pool = allocate_pool(num_pages, page, device)
    runner = Runner(decoder, kernels, pool, max_batch_size=max_batch_size, max_pages_per_row=pages_per_row)
    if graphs and device.type == "cuda":
        runner.record_graphs(max_model_len, Channel(context).agree)
    config = SchedulerConfig(max_batch_size=max_batch_size, max_batch_tokens=16384, chunked_prefill_tokens=16384)
    kv = KVManager(num_pages, PAGE_TOKENS, fingerprint=b"gpu check", prefix_cache=False)
    scheduler = Scheduler(config, FairnessConfig(), kv, clock=time.monotonic)
    return Loop(decoder, kernels, runner, scheduler, 2 if device.type == "cuda" else 1)


def weight_bytes(decoder: Decoder, dtype: torch.dtype) -> int:
    """Bytes that a decode step reads of the weights: all but the embeddings, of which it reads a row."""
    spec = decoder.spec
    # A tied matrix is read once, as the output's; one of its own besides is only looked into.
    looked_into = 0 if spec.tied_embeddings else spec.vocab_size * spec.hidden_size
    return int(spec.num_parameters - looked_into) * dtype.itemsize
