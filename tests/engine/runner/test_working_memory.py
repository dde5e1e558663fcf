"""What steps need of a GPU's memory is set aside before the pool takes the rest: else a server could start, answer for
hours, and run out of memory in its first full step."""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import msgspec
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from inferflux.config import KernelsConfig, ModelConfig, PagedKvConfig, RuntimeConfig, SchedulerConfig
from inferflux.dist.context import ParallelContext
from inferflux.engine.models.decoder import Decoder
from inferflux.engine.models.load import load_model
from inferflux.engine.models.spec import LayerSpec, ModelSpec
from inferflux.engine.runner import working_memory
from inferflux.engine.runner.memory import FreeMemory, plan_pool
from inferflux.engine.runner.working_memory import activation_bytes, logit_bytes, step_bytes, working_bytes
from inferflux.errors import ModelLoadError
from inferflux.kernels.kernel_set import KernelSet, select
from tests.support.models import TinyModel
from tests.support.paged import PAGE_TOKENS, step_metadata

CPU = torch.device("cpu")
GB = 10**9
MIB = 2**20
NUM_TOKENS = 512
NUM_ROWS = 128
LLAMA_3_8B = ModelSpec(
    architecture="LlamaForCausalLM", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32,
    num_heads=32, num_kv_heads=8, head_dim=128, max_position_embeddings=8192, max_model_len=8192,
    layers=(LayerSpec(None, None),) * 32, ropes=(), norm_eps=1e-5, activation="silu", attention_scale=0.1,
    attention_soft_cap=None, final_soft_cap=None, embedding_scale=1.0, qkv_bias=False, o_bias=False, mlp_bias=False,
    qk_norm=False, norm_offset=False, sandwich_norms=False,
)  # fmt: skip


def peak_bytes(function: Callable[[], object]) -> int:
    """The most that the tensors take which it makes, as torch's allocator counts them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        result = function()
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    del result
    return max(accumulate(changes))


def fused(kernels: KernelSet) -> KernelSet:
    """Kernels that make what the Triton kernels make, and compute nothing."""

    def add_norm(x: torch.Tensor, residual: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(x), torch.zeros_like(residual)

    def rope(qkv: torch.Tensor, *_: Any, num_heads: int) -> torch.Tensor:
        return qkv.new_zeros((len(qkv), num_heads, qkv.shape[2]))

    class Experts:
        pack = staticmethod(kernels.moe.pack)

        @staticmethod
        def run(experts: Any, x: torch.Tensor, expert_ids: torch.Tensor, _weights: Any, _kind: Any) -> torch.Tensor:
            pairs, inner = expert_ids.numel(), experts[0][0].shape[0]
            gate_up = x.new_zeros((pairs, inner))
            parts = x.new_zeros((pairs, x.shape[1]), dtype=torch.float32)
            gated = x.new_zeros((pairs, inner // 2))
            del gate_up, gated
            return parts.view(len(x), -1, x.shape[1]).sum(1).to(x.dtype)

    stand_ins: dict[str, Any] = {
        "norm": lambda x, *_: torch.zeros_like(x),
        "add_norm": add_norm,
        "rope": rope,
        "attention": lambda query, *_, **__: torch.zeros_like(query),
        "activation": lambda gate_up, _: gate_up.new_zeros((len(gate_up), gate_up.shape[1] // 2)),
        "moe": Experts,
    }
    return replace(kernels, **stand_ins)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "qwen2_moe"])
def test_a_forward_takes_what_is_foreseen(tiny_model: Callable[[str], TinyModel], family: str) -> None:
    """With kernels that make no more than their results, as those for GPUs do. More than twice as much would be
    missing from the pool for nothing."""
    kernels = fused(select(CPU, torch.float32, KernelsConfig(linear="reference", moe="reference")))
    decoder: Decoder = load_model(
        tiny_model(family).folder,
        kernels=kernels, device=CPU, dtype=torch.float32, context=ParallelContext(0, 1, CPU),
    )  # fmt: skip
    spec = decoder.spec
    table = torch.arange(-(-NUM_TOKENS // PAGE_TOKENS), dtype=torch.int32).view(1, -1)
    metadata = step_metadata([(0, NUM_TOKENS)], table)
    tokens, pool = torch.zeros(NUM_TOKENS, dtype=torch.int64), torch.zeros(1, spec.num_layers, 2, 1, 1, 1)
    chosen = torch.arange(NUM_ROWS)
    peak = peak_bytes(lambda: decoder.hidden_states(tokens, metadata, pool, chosen))
    assert peak <= activation_bytes(spec, NUM_TOKENS, 4, 1) <= 2 * peak
    hidden = torch.zeros(NUM_ROWS, spec.hidden_size)
    peak = peak_bytes(lambda: decoder.logits(hidden).log_softmax(dim=1))
    assert peak <= logit_bytes(spec, NUM_ROWS, 4) <= 3 * peak


def test_what_steps_of_a_large_model_need() -> None:
    """Two thousand tokens of a 14336 wide MLP and 128 rows of logits are half a gigabyte, recordings 0.2."""
    runtime = RuntimeConfig()
    step = step_bytes(LLAMA_3_8B, 2, runtime)
    assert activation_bytes(LLAMA_3_8B, 2048, 2, 1) == 2048 * 2 * (6 * 4096 + 3 * 14336)
    assert 0.6 * GB < step < 0.8 * GB
    plain = step_bytes(LLAMA_3_8B, 2, replaced(runtime, cuda_graphs="off"))
    assert 0.1 * GB < step - plain < 0.3 * GB
    small = SchedulerConfig(max_batch_tokens=512, max_batch_size=16)
    assert step_bytes(LLAMA_3_8B, 2, replaced(runtime, scheduler=small)) < step / 3
    assert step_bytes(LLAMA_3_8B, 2, runtime, num_ranks=4) < step


def test_a_gpus_pool_leaves_room_for_steps() -> None:
    """Where a tenth of what is free is less than they need."""
    working, page_bytes, runtime = working_bytes([step_bytes(LLAMA_3_8B, 2, RuntimeConfig())]), 2 * MIB, RuntimeConfig()
    model = ModelConfig(id="m", path="x")
    for free_gb, least_left in ((7.5, working), (60, 6 * GB)):
        free = FreeMemory("cuda", int(free_gb * GB), working=working)
        left = free.num_bytes - plan_pool(model, runtime, 8192, page_bytes, free).num_pages * page_bytes
        assert least_left <= left < least_left + 2 * page_bytes
    fixed = replaced(runtime, paged_kv=PagedKvConfig(device_pages=28000))
    assert plan_pool(model, fixed, 8192, page_bytes, free).num_pages == 28000, "who gives a number knows better"
    with pytest.raises(ModelLoadError, match=r"or lower runtime.scheduler.max_batch_tokens \(a step needs .* MiB\)"):
        plan_pool(model, runtime, 8192, page_bytes, FreeMemory("cuda", working, working=working))


def replaced(runtime: RuntimeConfig, **changes: Any) -> RuntimeConfig:
    return msgspec.structs.replace(runtime, **changes)


def test_the_triton_kernels_make_no_more_splits_than_are_counted() -> None:
    pytest.importorskip("triton")
    from inferflux.kernels.triton.tuning import SHIPPED

    splits = [decode.split for decode in SHIPPED.decode.values()]
    assert splits
    assert min(split.tokens for split in splits) >= working_memory.SPLIT_TOKENS
    assert max(split.most for split in splits) <= working_memory.MOST_SPLITS
